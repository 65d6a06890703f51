"""The command line as a whole: help, version, and `mlx-simpo` as a program."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import Ran, command, complaint, small_run

from mlx_simpo import __version__

Capture = pytest.CaptureFixture[str]


def test_version(capsys: Capture) -> None:
    assert command(capsys, "--version") == Ran(0, f"mlx-simpo {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], ["train", "evaluate", "generate", "data", "fuse", "convert", "push", "doctor"]),
        ([], ["config", "completion"]),
        (["config"], ["--json", "[CONFIG.yaml]", "name=value"]),
        (["completion"], ["SHELL", "bash", "zsh", "fish"]),
        (["train"], ["--json", "[CONFIG.yaml]", "name=value"]),
        (["evaluate"], ["--data", "--split", "--adapter", "--model", "--per-pair", "--json"]),
        (["generate"], ["--prompt", "--max-tokens", "--adapter", "--model", "--json"]),
        (["data"], ["inspect"]),
        (["data", "inspect"], ["--model", "--split", "--pair", "--html", "--json"]),
        (["fuse"], ["OUT", "--adapter", "--format {hf,mlx}", "--dequantize", "--verify"]),
        (["convert"], ["to-peft", "from-peft", "from-hf", "architectures"]),
        (["push"], ["FOLDER", "REPO", "--private", "--dry-run", "--revision", "--message"]),
        (["doctor"], ["--json"]),
    ],
)
def test_help(capsys: Capture, arguments: list[str], options: list[str]) -> None:
    ran = command(capsys, *arguments, "--help")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(" ".join(["usage: mlx-simpo", *arguments]))
    assert all(option in ran.out for option in options)


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (["train"], "[options] [CONFIG.yaml] [name=value ...]"),
        (["evaluate"], "[options] --data DATA [CONFIG.yaml] [name=value ...]"),
        (
            ["generate"],
            "[options] (--prompt TEXT | --prompts FILE | --chat) [CONFIG.yaml] [name=value ...]",
        ),
        (["data", "inspect"], "[options] [DATA ...] [CONFIG.yaml] [name=value ...]"),
    ],
)
def test_the_usage_line_shows_what_is_required(
    capsys: Capture, arguments: list[str], usage: str
) -> None:
    first = command(capsys, *arguments, "--help").out.partition("\n\n")[0]
    assert first == f"usage: mlx-simpo {' '.join(arguments)} {usage}"


def program(*arguments: object) -> subprocess.CompletedProcess:
    """Run ``python -m mlx_simpo`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mlx_simpo", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_program_prints_only_results_to_stdout(model_folder: Path, pairs_file: Path) -> None:
    ended = program("data", "inspect", pairs_file, "--model", model_folder, "--json")
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["pairs"] == 12
    template, tokens = ended.stderr.splitlines()[-2:]
    assert template == "chat template: the tokenizer's own"
    assert tokens.startswith("tokens are ")


def test_the_program_reports_bad_input_in_one_line(pairs_file: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "no-model", pairs_file, tmp_path / "run")
    ended = program("train", *run)
    error = complaint(Ran(ended.returncode, ended.stdout, ended.stderr))
    assert error == f"model is '{tmp_path / 'no-model'}'; there is no such folder"
    assert not (tmp_path / "run").exists()
