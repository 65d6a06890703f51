"""`mlx-simpo train`: what it prints, its arguments, its help, its exit statuses, --resume."""

import json
import re
import shlex
import signal
from itertools import takewhile
from pathlib import Path

import pytest
from helpers.commands import command, complaint, json_lines, small_run
from helpers.kills import Runner
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import SimPOConfig, __version__, load_config
from mlx_simpo.config.schema import all_settings

Capture = pytest.CaptureFixture[str]


def test_train_prints_only_the_adapters_folder(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    ran = command(capsys, "train", *small_run(model_folder, pairs_file, output))
    assert (ran.status, ran.out) == (0, f"{output}\n")
    assert (output / "adapters.safetensors").is_file()
    start = f"mlx-simpo {__version__}: training {model_folder}, output in {output} …\n"
    assert ran.err.startswith(start)
    for words in ("chat template: the tokenizer's own", "pairs to train on", "before", "after"):
        assert words in ran.err


def test_train_with_json_prints_one_object(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    run = small_run(model_folder, pairs_file, tmp_path / "run")
    ran = command(capsys, "train", "--json", *run)
    assert ran.status == 0
    assert ran.json == json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert (ran.json["steps"], ran.json["interrupted"]) == (3, False)
    assert {"pairs", "loss", "rewards/margins", "logps/chosen"} <= ran.json["before"].keys()


def test_train_takes_a_file_and_overrides_in_any_order(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    run = small_run(model_folder, pairs_file, tmp_path / "no", "train.steps=1")
    file = tmp_path / "recipe.yaml"
    file.write_text(load_config(None, run).to_yaml(), encoding="utf-8")
    ran = command(
        capsys, "train", "lora.rank=3", file, "--json", f"output={tmp_path / 'run'}", "seed=7"
    )
    assert ran.status == 0
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.lora.rank, config.seed, config.train.steps) == (3, 7, 1)
    assert not (tmp_path / "no").exists()


def test_train_help_lists_every_setting_with_meaning_and_default(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = command(capsys, "train", "--help").out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, item, _ in all_settings(SimPOConfig):
        following = lines[lines.index(f"  {name}") + 1 :]
        meaning = " ".join(map(str.strip, takewhile(lambda s: s.startswith(" " * 6), following)))
        assert meaning.startswith(item.metadata["help"])
    headings = [line for line in lines if line and re.match(r"(the run$|[a-z_.]+: [a-z])", line)]
    assert [line.partition(":")[0] for line in headings[headings.index("the run") :]] == [
        *("the run", "data", "objective", "lora", "train", "train.early_stopping", "logps"),
        *("engine", "memory"),
    ]
    listed = " ".join(" ".join(lines).split())
    for text in ("(required)", "(default 5e-05)", "(default null)", "(default all-linear)"):
        assert text in listed


def test_ctrl_c_before_the_first_step_leaves_nothing_behind(
    capsys: Capture,
    model_folder: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_simpo.training.session.train_steps", interrupt)
    ran = command(capsys, "train", *small_run(model_folder, pairs_file, tmp_path / "run"))
    assert (ran.status, ran.out) == (130, "")
    assert ran.err.splitlines()[-1] == "mlx-simpo: interrupted"
    assert not (tmp_path / "run").exists()


# --- resuming, and exit statuses ---------------------------------------------------------------


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


def test_a_run_is_interrupted_and_resumed_with_the_command_that_is_shown(
    runner: Runner, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Processes of their own: a chain with && stops, and stdout has nothing but the adapter."""
    output, log = tmp_path / "my run", tmp_path / "log"
    run = small_run(model_folder, pairs_file, output, "train.steps=100000")
    cache = str(tmp_path / "cache")
    metrics = output / "metrics.jsonl"
    ended = runner(
        ["train", *run],
        log,
        when=lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 2,
        number=signal.SIGTERM,
        MLX_SIMPO_CACHE=cache,
    )
    assert ended.status == 143, log.read_text()
    lines = log.read_text().splitlines()
    assert "warning: SIGTERM: finishing this step, then saving; again to stop at once" in lines
    (shown,) = (line for line in lines if "to go on from there: mlx-simpo train --resume" in line)
    words = shlex.split(shown.partition("mlx-simpo ")[2])
    step = json.loads((output / "summary.json").read_text("utf-8"))["steps"]
    log.unlink()
    ended = runner([*words, f"train.steps={step + 1}", "--json"], log, MLX_SIMPO_CACHE=cache)
    assert ended.status in (0, 3), log.read_text()
    text = log.read_text()
    assert f"mlx-simpo {__version__}: resuming {output}, training {model_folder} …" in text
    assert json.loads(text[text.index("\n{\n") :])["steps"] == step + 1


def test_a_process_that_is_killed_is_resumed_without_a_gap_or_a_double_line(
    runner: Runner, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    run = small_run(model_folder, pairs_file, output, "train.steps=100000", "train.save_every=1")
    metrics = output / "metrics.jsonl"

    def has_begun() -> bool:
        return metrics.exists() and len(metrics.read_bytes().splitlines()) > 3

    ended = runner(["train", *run], log, when=has_begun, number=signal.SIGKILL)
    assert ended.status == -signal.SIGKILL
    assert not (output / "adapters.safetensors").exists()
    ended = runner(["train", "--resume", output, "train.steps=5"], log)
    assert ended.status in (0, 3), log.read_text()
    steps = [line["step"] for line in json_lines(metrics) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5]


def test_a_run_that_ends_worse_has_a_status_of_its_own(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    swapped = [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in some_pairs()
    ]
    valid = write_jsonl(tmp_path / "swapped.jsonl", swapped)
    run = small_run(model_folder, pairs_file, tmp_path / "run", f"data.valid={valid}")
    ran = command(capsys, "train", *run)
    assert (ran.status, ran.out) == (3, f"{tmp_path / 'run'}\n")
    assert "warning: the run ended worse than it began: " in ran.err
    again = command(capsys, "train", "--resume", tmp_path / "run", "--json")
    assert (again.status, again.json["worse"], again.json["steps"]) == (3, True, 3)


def test_resume_takes_settings_and_no_file(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run = small_run(model_folder, pairs_file, output, "train.steps=1")
    assert command(capsys, "train", *run).status in (0, 3)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(load_config(None, run).to_yaml(), encoding="utf-8")
    assert complaint(command(capsys, "train", recipe, "--resume", output)) == (
        f"--resume takes the settings of the run in {output}; leave out {recipe}, and write what "
        "changes as name=value"
    )
    elsewhere = tmp_path / "elsewhere"
    message = complaint(command(capsys, "train", "--resume", output, f"output={elsewhere}"))
    assert message == (
        f"output is {str(elsewhere)!r}, but a run goes on in its own folder, {output}; leave "
        "output=… away (the folder may be moved before)"
    )
    message = complaint(command(capsys, "train", "--resume", elsewhere))
    assert message == (
        f"{elsewhere} holds no run that could be resumed (it has no config.yaml); name the output "
        "folder of a run"
    )
    message = complaint(command(capsys, "train", "--resume", output, "lora.rank=5"))
    assert "lora.rank was 2 and is 5. Undo these changes, or begin a new run" in message
    message = complaint(command(capsys, "train", "--resume", output, "train.epochs=2"))
    assert message == (
        "train.epochs and train.steps both set the length; remove one of them, or set it to null"
    )
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    command(capsys, "train", "--resume", output, "train.steps=null", "train.epochs=1")
    assert load_config(output / "config.yaml").train.epochs == 1


def test_the_same_command_again_goes_on_if_the_settings_say_so(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run = small_run(model_folder, pairs_file, output, "train.steps=1")
    assert command(capsys, "train", *run).status in (0, 3)
    assert complaint(command(capsys, "train", *run)) == (
        f"output is {str(output)!r}, which holds a run already; go on with it (mlx-simpo train "
        f"--resume {output}), name a new folder, or remove it"
    )
    ran = command(capsys, "train", *run, "train.resume=auto")
    assert ran.status in (0, 3)
    assert "resuming after step 1 of 1" in ran.err
