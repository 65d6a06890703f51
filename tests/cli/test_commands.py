"""The command line: results alone on stdout, the rest on stderr."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import (
    Ran,
    changed_copy,
    command,
    complaint,
    json_lines,
    small_run,
    with_bad_rows,
)
from helpers.tiny import (
    some_pairs,
    write_jsonl,
)

from mlx_simpo import SimPOConfig, __version__, evaluate, inspect, load_config
from mlx_simpo.config.schema import all_settings

Capture = pytest.CaptureFixture[str]
EVALUATION_KEYS = {
    "pairs",
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
}


# --- what commands print ---------------------------------------------------------------------


def test_train_prints_the_adapters_folder_and_nothing_else(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    ran = command(capsys, "train", *small_run(model_folder, pairs_file, output))
    assert (ran.status, ran.out) == (0, f"{output}\n")
    assert (output / "adapters.safetensors").is_file()
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
    assert ran.json["before"].keys() >= EVALUATION_KEYS


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
    found = load_config(tmp_path / "run" / "config.yaml")
    assert (found.lora.rank, found.seed, found.train.steps) == (3, 7, 1)
    assert not (tmp_path / "no").exists()


def test_evaluate_prints_a_table_of_all_metrics(
    capsys: Capture, adapter: Path, pairs_file: Path
) -> None:
    ran = command(capsys, "evaluate", "--adapter", adapter, "--data", pairs_file)
    assert ran.status == 0
    for words in ("12 pairs", "base", "adapter", *(EVALUATION_KEYS - {"pairs"})):
        assert words in ran.out
    assert "12 pairs" not in ran.err


def test_evaluate_as_json_without_an_adapter(
    capsys: Capture, model_folder: Path, pairs_file: Path
) -> None:
    ran = command(capsys, "evaluate", "--model", model_folder, "--data", pairs_file, "--json")
    assert ran.status == 0
    assert ran.json.keys() >= EVALUATION_KEYS
    assert "base" not in ran.json
    config = load_config(None, [f"model={model_folder}", f"data.valid={pairs_file}"])
    expected = evaluate(config)["base"].metrics
    assert {key: ran.json[key] for key in expected} == pytest.approx(expected)


def test_evaluate_as_json_with_an_adapter(
    capsys: Capture, adapter: Path, model_folder: Path, pairs_file: Path
) -> None:
    ran = command(capsys, "evaluate", "--adapter", adapter, "--data", pairs_file, "--json")
    assert ran.status == 0
    assert ran.json["adapter"] == str(adapter)
    bare = command(capsys, "evaluate", "--model", model_folder, "--data", pairs_file, "--json")
    expected = {key: bare.json[key] for key in EVALUATION_KEYS}
    assert {key: ran.json["base"][key] for key in EVALUATION_KEYS} == pytest.approx(expected)
    assert ran.json["loss"] != pytest.approx(bare.json["loss"], abs=1e-4)  # the adapter's own


def test_evaluate_takes_the_settings_of_the_adapters_run(
    capsys: Capture, adapter: Path, pairs_file: Path
) -> None:
    command_line = ("evaluate", "--adapter", adapter, "--data", pairs_file, "--json")
    plain = command(capsys, *command_line).json
    changed = command(capsys, *command_line, "objective.beta=20").json
    assert changed["rewards/chosen"] == pytest.approx(10 * plain["rewards/chosen"])


def test_evaluate_writes_a_line_a_pair_in_input_order(
    capsys: Capture, adapter: Path, tmp_path: Path
) -> None:
    data = with_bad_rows(tmp_path / "pairs.jsonl", 12, (0, 4, 5))
    per_pair = tmp_path / "per-pair.jsonl"
    arguments = ("--data", data, "--per-pair", per_pair, "--json", "data.max_quarantined=0.5")
    ran = command(capsys, "evaluate", "--adapter", adapter, *arguments)
    assert ran.status == 0
    assert "3 records quarantined" in ran.err
    records = json_lines(per_pair)
    assert [r["index"] for r in records] == [1, 2, 3, *range(6, 15)]
    numbers = {f"{side}_{what}" for side in ("chosen", "rejected") for what in ("logp", "tokens")}
    assert all(r.keys() == numbers | {"index", "margin"} for r in records)
    assert ran.json["pairs"] == len(records)
    for side in ("chosen", "rejected"):
        mean = sum(r[f"{side}_logp"] for r in records) / len(records)
        assert mean == pytest.approx(ran.json[f"logps/{side}"])
    for record in records:
        margin = 2.0 * (record["chosen_logp"] - record["rejected_logp"])
        assert record["margin"] == pytest.approx(margin, abs=1e-4)


def test_evaluate_with_a_settings_file_takes_its_own_data(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """The file's validation split is not the --data's."""
    settings = tmp_path / "recipe.yaml"
    data = "{train: x, valid: elsewhere, valid_split: test}"
    settings.write_text(f"model: {model_folder}\ndata: {data}\nobjective: {{beta: 4}}\n")
    ran = command(capsys, "evaluate", "--data", str(pairs_file), "--json", str(settings))
    assert ran.status == 0, ran.err
    assert ran.json["pairs"] == 12
    assert ran.json["rewards/chosen"] == pytest.approx(4 * ran.json["logps/chosen"], rel=1e-5)


def test_evaluate_takes_one_split_of_a_folder(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "train.jsonl", some_pairs(3))
    write_jsonl(tmp_path / "test.jsonl", some_pairs(5))
    arguments = ("--model", model_folder, "--data", tmp_path, "--json")
    assert command(capsys, "evaluate", *arguments, "--split", "test").json["pairs"] == 5
    assert "holds several splits" in complaint(command(capsys, "evaluate", *arguments))


def test_generate_prints_the_answer(capsys: Capture, adapter: Path, model_folder: Path) -> None:
    asked = ("--prompt", "Why is the sky [blue]?", "--max-tokens", 5)
    bare = command(capsys, "generate", "--model", model_folder, *asked, "--json")
    assert bare.json.keys() == {"prompt", "base"}
    plain = command(capsys, "generate", "--model", model_folder, *asked)
    assert plain.out == bare.json["base"] + "\n"
    both = command(capsys, "generate", "--adapter", adapter, *asked, "--json")
    assert both.json["prompt"] == "Why is the sky [blue]?"
    assert both.json["base"] == bare.json["base"]
    text = command(capsys, "generate", "--adapter", adapter, *asked)
    assert text.out == f"base: {both.json['base']}\nadapter: {both.json['adapter']}\n"


def test_inspect_shows_counts_and_one_pair_in_tokens(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    rows = some_pairs(4)
    rows[2]["prompt"] = "Say [bold] and :100: and [/]."
    data = write_jsonl(tmp_path / "pairs.jsonl", [*rows, {"prompt": "?"}])
    ran = command(capsys, "data", "inspect", data, "--model", model_folder, "--pair", 2)
    assert ran.status == 0
    for words in ("5 │ records", "4 │ pairs", "quarantined: missing response"):
        assert words in ran.out
    assert "Say [bold] and :100: and [/]." in ran.out.replace("↵\n", "")
    assert "scored tokens, between" in ran.out


def test_inspect_as_json_is_the_summary(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    data = with_bad_rows(tmp_path / "pairs.jsonl", 6, (1, 3))
    ran = command(capsys, "data", "inspect", data, "--model", model_folder, "--json")
    expected = inspect(load_config(None, [f"model={model_folder}"]), str(data)).summary
    assert ran.json == expected
    assert (ran.json["records"], ran.json["pairs"]) == (8, 6)
    assert ran.json["quarantined"] == {"missing response": 2}
    assert [q["source"] for q in ran.json["quarantined_records"]] == [f"{data}:2", f"{data}:4"]


def test_inspect_names_row_100(capsys: Capture, model_folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", some_pairs(100))
    ran = command(capsys, "data", "inspect", data, "--model", model_folder, "--pair", 99)
    assert "p.jsonl:100: " in ran.out.replace("\n", "")


@pytest.mark.parametrize("folder", ["a[bold]b", "a[/x]"])
def test_inspect_shows_brackets_in_a_path(
    folder: str,
    capsys: Capture,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hub data sets too: their rows are called "name[split]:number"."""
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / folder / "p.jsonl"
    path.parent.mkdir(parents=True)
    with_bad_rows(path, 5, (5,))
    ran = command(capsys, "data", "inspect", path, "--model", model_folder)
    assert ran.status == 0
    assert f"e.g. {path}:6" in ran.out
    assert f"chosen of {path}:1" in ran.out


# --- help and version ------------------------------------------------------------------------


def test_version(capsys: Capture) -> None:
    assert command(capsys, "--version") == Ran(0, f"mlx-simpo {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], ["train", "evaluate", "generate", "data"]),
        (["train"], ["--json", "[CONFIG.yaml]", "name=value"]),
        (["evaluate"], ["--data", "--split", "--adapter", "--model", "--per-pair", "--json"]),
        (["generate"], ["--prompt", "--max-tokens", "--adapter", "--model", "--json"]),
        (["data"], ["inspect"]),
        (["data", "inspect"], ["--model", "--split", "--pair", "--json"]),
    ],
)
def test_help(capsys: Capture, arguments: list[str], options: list[str]) -> None:
    ran = command(capsys, *arguments, "--help")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(" ".join(["usage: mlx-simpo", *arguments]))
    assert all(option in ran.out for option in options)


def test_train_help_lists_every_setting_with_meaning_and_default(capsys: Capture) -> None:
    lines = command(capsys, "train", "--help").out.splitlines()
    for name, item, _ in all_settings(SimPOConfig):
        meaning = lines[lines.index(f"  {name}") + 1].strip()
        assert meaning.startswith(item.metadata["help"])
    listed = "\n".join(lines)
    for text in ("(required)", "(default 5e-05)", "(default null)", "(default all-linear)"):
        assert text in listed


@pytest.mark.parametrize(
    ("arguments", "needed"), [(["data", "inspect"], "DATA"), (["evaluate"], "--data")]
)
def test_the_usage_line_has_what_is_required(
    capsys: Capture, arguments: list[str], needed: str
) -> None:
    usage = command(capsys, *arguments, "--help").out.partition("\n\n")[0]
    assert needed.lower() in usage.removeprefix("usage: mlx-simpo data").lower()


# --- adapters with a run of their own --------------------------------------------------------


def test_a_run_on_a_hub_subset_can_be_evaluated_on_a_file(
    capsys: Capture, adapter: Path, pairs_file: Path, tmp_path: Path
) -> None:
    text = (adapter / "config.yaml").read_text("utf-8").replace("subset: null", "subset: some")
    text = re.sub("  train: .*pairs.jsonl", "  train: owner/name", text)
    copy = changed_copy(adapter, tmp_path / "run", config__yaml=text)
    ran = command(capsys, "evaluate", "--adapter", copy, "--data", pairs_file, "--json")
    assert ran.status == 0


@pytest.mark.parametrize("fate", ["changed", "gone"])
def test_the_template_of_training_is_the_template_of_evaluation(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path, fate: str
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}", "utf-8")
    run = small_run(model_folder, pairs_file, tmp_path / "run", f"data.valid={pairs_file}")
    trained = command(capsys, "train", "--json", *run, f"data.chat_template={template}")
    if fate == "gone":
        template.unlink()
    else:
        template.write_text("{{ messages[0]['content'] }} » {{ messages[-1]['content'] }}", "utf-8")
    arguments = ("--adapter", tmp_path / "run", "--data", pairs_file, "--json")
    ran = command(capsys, "evaluate", *arguments)
    assert ran.status == 0
    assert ran.json["loss"] == pytest.approx(trained.json["after"]["loss"], rel=1e-4)


# --- interrupted -----------------------------------------------------------------------------


def test_ctrl_c_before_the_first_step(
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


# --- as a program ----------------------------------------------------------------------------


def program(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlx_simpo", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_program_prints_results_alone(model_folder: Path, pairs_file: Path) -> None:
    ended = program("data", "inspect", pairs_file, "--model", model_folder, "--json")
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["pairs"] == 12
    template, tokens = ended.stderr.splitlines()[-2:]
    assert template == "chat template: the tokenizer's own"
    assert tokens.startswith("tokens are ")


def test_the_program_refuses_in_one_line(pairs_file: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "no-model", pairs_file, tmp_path / "run")
    ended = program("train", *run)
    found = complaint(Ran(ended.returncode, ended.stdout, ended.stderr))
    assert found == f"model is '{tmp_path / 'no-model'}'; there is no such folder"
    assert not (tmp_path / "run").exists()
