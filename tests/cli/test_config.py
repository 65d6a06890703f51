"""`mlx-simpo config`: what is printed reads back, and says where it comes from."""

from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
from helpers.commands import command, complaint
from helpers.settings import SETTINGS, write_config

from mlx_simpo import SimPOConfig, load_config
from mlx_simpo.cli.main import build_parser

Capture = pytest.CaptureFixture[str]
FILE = """\
# A comment
model: org/name
data:
  train: [a.jsonl, {path: b.jsonl, max_samples: 5}]
  columns:
    prompt: question
lora: {rank: 8,
  dora: true}
train:

  early_stopping: {patience: 2}
  eval_every: 10
"""


def test_what_is_printed_reads_back_to_an_equal_configuration(
    capsys: Capture, tmp_path: Path
) -> None:
    file = write_config(tmp_path, FILE)
    template = "{% for m in messages %}\n# {{ m }}: 'x'\n{% endfor %}"
    prompts = 'train.sample_prompts=["Why # not?", \'a: b\', "\\n"]'
    settings = [f"data.chat_template={template}", prompts, "data.valid={a: x, b: {path: y}}"]
    ran = command(capsys, "config", file, *settings, "--lr", "1e-5", "data.columns.chosen=good")
    assert ran.status == 0
    (tmp_path / "printed.yaml").write_text(ran.out, encoding="utf-8")
    expected = load_config(
        file, [*settings, "train.learning_rate=1e-5", "data.columns.chosen=good"]
    )
    assert load_config(tmp_path / "printed.yaml") == expected
    assert "\t" not in ran.out
    assert ran.err == "mlx-simpo: --lr 1e-5: train.learning_rate=1e-5\n"


def test_the_defaults_read_back(capsys: Capture, tmp_path: Path) -> None:
    ran = command(capsys, "config", "model=x")
    assert load_config(write_config(tmp_path, ran.out)) == SimPOConfig(model="x")


def test_every_line_says_where_its_value_comes_from(capsys: Capture, tmp_path: Path) -> None:
    file = write_config(tmp_path, FILE)
    words = ["seed=7", "--lora-rank", "4", "--iters", "9", "data.columns.chosen=good"]
    out = command(capsys, "config", "-c", file, *words).out
    comments = {line.split(":")[0].strip(): line.rpartition("# ")[2] for line in out.splitlines()}
    expected = {
        "model": f"{file}:2",
        "train": "train:",  # the section; data.train comes before it
        "columns": f"{file}:5 and data.columns.chosen=good",
        "rank": "--lora-rank 4",
        "dora": f"{file}:8",
        "patience": f"{file}:11",
        "eval_every": f"{file}:12",
        "steps": "--iters 9",
        "seed": "seed=7",
        "output": "default",
        "beta": "default",
    }
    assert {name: comments[name] for name in expected} == expected
    assert f"  train: [{{path: a.jsonl}}, {{path: b.jsonl, max_samples: 5}}]  # {file}:4\n" in out
    lines = [line for line in out.splitlines() if not line.endswith(":")]
    assert len(lines) == len(SETTINGS)
    assert all("  # " in line for line in lines)


def test_json_has_the_settings_and_their_origins(capsys: Capture, tmp_path: Path) -> None:
    file = write_config(tmp_path, FILE)
    result = command(capsys, "config", file, "--seed=3", "--json").json
    assert result["settings"] == replace(load_config(file), seed=3).as_dict()
    assert set(result["origins"]) == set(SETTINGS)
    assert result["origins"]["seed"] == "--seed=3"
    assert result["origins"]["lora.rank"] == f"{file}:7"
    assert result["origins"]["lora.scale"] == "default"
    for name in SETTINGS:
        reduce(lambda inner, key: inner[key], name.split("."), result["settings"])


def test_without_a_model_the_rest_is_a_file_to_begin_with(capsys: Capture, tmp_path: Path) -> None:
    ran = command(capsys, "config", "lora.rank=3")
    assert (ran.status, ran.err) == (0, "mlx-simpo: model is not set; a run needs it: model=…\n")
    assert ran.out.startswith("# model:  # not set: Hugging Face id or local folder of the model\n")
    config = load_config(write_config(tmp_path, ran.out), ["model=x"])
    assert config == load_config(None, ["model=x", "lora.rank=3"])
    assert command(capsys, "config", "--json").json["settings"]["model"] is None


def test_settings_that_are_wrong_are_errors_and_nothing_is_printed(
    capsys: Capture, tmp_path: Path
) -> None:
    assert complaint(command(capsys, "config", "lora.rank=0")).startswith("lora.rank is 0")
    file = write_config(tmp_path, "model: 5")
    assert complaint(command(capsys, "config", file)) == "model is 5; it must be text"
    assert complaint(command(capsys, "config", tmp_path / "no.yaml")).startswith("cannot read")


def test_it_is_a_command_with_settings() -> None:
    assert build_parser().commands["config"].takes_settings
