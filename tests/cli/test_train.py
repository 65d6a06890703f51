"""`mlx-simpo train`: what it prints, its arguments, its help, and Ctrl-C."""

import json
from itertools import takewhile
from pathlib import Path

import pytest
from helpers.commands import command, small_run

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
