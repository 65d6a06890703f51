"""`mlx-simpo generate`: one response, or two side by side."""

from pathlib import Path

import pytest
from helpers.commands import command

Capture = pytest.CaptureFixture[str]


def test_generate_prints_the_response(capsys: Capture, adapter: Path, model_folder: Path) -> None:
    prompt = ("--prompt", "Why is the sky [blue]?", "--max-tokens", 5)
    base = command(capsys, "generate", "--model", model_folder, *prompt, "--json")
    assert base.json.keys() == {"prompt", "base"}
    plain = command(capsys, "generate", "--model", model_folder, *prompt)
    assert plain.out == base.json["base"] + "\n"
    both = command(capsys, "generate", "--adapter", adapter, *prompt, "--json")
    assert both.json["prompt"] == "Why is the sky [blue]?"
    assert both.json["base"] == base.json["base"]
    text = command(capsys, "generate", "--adapter", adapter, *prompt)
    assert text.out == f"base: {both.json['base']}\nadapter: {both.json['adapter']}\n"
