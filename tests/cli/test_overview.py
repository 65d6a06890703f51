"""The page of `mlx-simpo` alone: its size, and that each of its examples is valid."""

import re
import shlex

import pytest
from helpers.commands import Ran, command

from mlx_simpo.cli.command_line import read_command_line
from mlx_simpo.cli.main import build_parser
from mlx_simpo.cli.overview import OVERVIEW

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("words", [[], ["help"]])
def test_the_page(capsys: Capture, words: list[str]) -> None:
    assert command(capsys, *words) == Ran(0, OVERVIEW, "")


def test_it_fits_on_a_screen() -> None:
    lines = OVERVIEW.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_every_example_is_a_valid_command_line() -> None:
    text = OVERVIEW.replace("\\\n", " ")
    examples = re.findall(r"^     mlx-simpo (.*)$", text, re.MULTILINE)
    assert [example.split()[0] for example in examples] == [
        *("data", "train", "evaluate", "generate", "fuse")
    ]
    for example in examples:
        parser, words = build_parser(), shlex.split(example)
        while parser.commands:
            parser, words = parser.commands[words[0]], words[1:]
        line = read_command_line(parser, words)
        assert line.mistakes == []


def test_it_names_every_command() -> None:
    assert all(name in OVERVIEW for name in build_parser().commands)


def test_help_of_a_command(capsys: Capture) -> None:
    assert command(capsys, "help", "train") == command(capsys, "train", "--help")
    assert command(capsys, "help", "data", "inspect").out.startswith(
        "usage: mlx-simpo data inspect"
    )
    assert "write mlx-simpo train" in command(capsys, "help", "trian").err
