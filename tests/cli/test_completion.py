"""Completion: what each shell offers, asked of the real shells where they are installed."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import command, complaint
from helpers.settings import SETTINGS

from mlx_simpo.cli.completion import SHELLS, script
from mlx_simpo.cli.main import COMMANDS, build_parser

Capture = pytest.CaptureFixture[str]
Complete = Callable[[str], list[str]]

BASH = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_mlx_simpo
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
# The function as it is, with stand-ins for zsh's own functions, which need a terminal.
ZSH = """
compdef() {{ : }}
_describe() {{ [[ $1 == -o ]] && shift; print -l -- ${{${{(P)2}}%%:*}}; }}
_files() {{ print FILES; }}
compset() {{ : }}
source {script}
words=({words}); CURRENT=$#words
_mlx_simpo | grep -e "^${{words[CURRENT]}}" -e FILES
"""
FISH = "source {script}; complete -C {words} | string replace -r '\\t.*' ''"


@pytest.fixture(params=SHELLS)
def complete(request: pytest.FixtureRequest, tmp_path: Path) -> Complete:
    """Return what a shell offers after the words of a line, the last of which may be a part."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    file = tmp_path / f"completion.{shell}"
    file.write_text(script(shell, build_parser()), encoding="utf-8")
    (tmp_path / "pairs.jsonl").touch()

    def run(line: str) -> list[str]:
        # bash splits words at "=".
        words = line.replace("=", " = ").split(" ") if shell == "bash" else line.split(" ")
        quoted = f"'{line}'" if shell == "fish" else " ".join(f"'{word}'" for word in words)
        code = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell].format(script=file, words=quoted)
        more = ["-f"] if shell == "zsh" else ["--no-config"] if shell == "fish" else ["--norc"]
        ended = subprocess.run(
            [shell, *more, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
        )
        assert ended.stderr == ""
        files = {"FILES", "pairs.jsonl", f"completion.{shell}"}
        lines = [text.rstrip(" ") for text in ended.stdout.splitlines() if text.strip()]
        return [text.rstrip("=") for text in lines if text not in files]

    return run


def test_commands(complete: Complete) -> None:
    assert complete("mlx-simpo tr") == ["train"]
    assert {"data", "doctor", "completion"} <= set(complete("mlx-simpo "))
    assert complete("mlx-simpo data ins") == ["inspect"]
    assert set(complete("mlx-simpo convert from-")) == {"from-hf", "from-peft"}
    assert complete("mlx-simpo completion z") == ["zsh"]


def test_options(complete: Complete) -> None:
    assert complete("mlx-simpo train --res") == ["--resume"]
    assert complete("mlx-simpo train --learning-r") == ["--learning-rate"]
    assert "--adapter-path" in complete("mlx-simpo evaluate --ada")
    assert complete("mlx-simpo fuse --learning-r") == []


def test_settings(complete: Complete) -> None:
    assert complete("mlx-simpo train lora.ran") == ["lora.rank"]
    assert complete("mlx-simpo data inspect data.columns") == ["data.columns"]
    assert complete("mlx-simpo train --json train.early_stopping.p")[0].endswith("patience")
    assert complete("mlx-simpo push lora.ran") == []


def test_values_are_files_and_nothing_of_ours(complete: Complete) -> None:
    for line in ("train --output ", "train data.train=", "train -c ", "evaluate --adapter "):
        offered = complete(f"mlx-simpo {line}")
        # fish offers what is typed already, too.
        assert not [text for text in offered if text in SETTINGS and not line.endswith(f"{text}=")]
        assert not [text for text in offered if text.startswith("--")]


def test_scripts_have_every_command_and_setting() -> None:
    parser = build_parser()
    for shell in SHELLS:
        text = script(shell, parser)
        assert all(name in text for name in (*parser.commands, *SETTINGS))
    assert len(parser.commands) == len(COMMANDS)


def test_the_command(capsys: Capture) -> None:
    ran = command(capsys, "completion", "bash")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == script("bash", build_parser())
    message = complaint(command(capsys, "completion", "csh"))
    assert message.startswith("argument SHELL: invalid choice: 'csh' (choose from")
