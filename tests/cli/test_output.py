"""What is printed: text that is not valid Unicode, and what a terminal would act on."""

import json
import sys

import pytest

from mlx_simpo import SimPOError, __version__
from mlx_simpo.cli.output import announce, print_error, print_json, print_text

Capture = pytest.CaptureFixture[str]


def test_json_with_half_an_emoji(capsys: Capture) -> None:
    print_json({"text": "a \ud83d b", "é": None})
    out = capsys.readouterr().out
    assert json.loads(out) == {"text": "a \ud83d b", "é": None}
    assert "é" in out


def test_an_error_is_one_line_without_control_characters(capsys: Capture) -> None:
    print_error(SimPOError("a\nname\x1b[31m is\tred \udcff"))
    assert capsys.readouterr() == ("", "mlx-simpo: error: a name\\x1b[31m is red \\udcff\n")


def test_the_announcement_of_a_command(capsys: Capture) -> None:
    announce("training m\x07")
    assert capsys.readouterr() == ("", f"mlx-simpo {__version__}: training m\\x07 …\n")


def test_tokens_are_printed_neither_in_errors_nor_in_announcements(capsys: Capture) -> None:
    token = "hf_plantedSecretToken0123456789"
    print_error(f"no such file: 'https://ann:pass1234@example.org/{token}'")
    announce(f"reading {token}")
    error, note = capsys.readouterr().err.splitlines()
    assert error == "mlx-simpo: error: no such file: 'https://…@example.org/…'"
    assert note == f"mlx-simpo {__version__}: reading … …"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_response_cannot_act_on_a_terminal(
    is_terminal: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    print_text("one\n\x1b]52;c;eA==\x07two\n")
    expected = "one\n\\x1b]52;c;eA==\\x07two\n" if is_terminal else "one\n\x1b]52;c;eA==\x07two\n"
    assert capsys.readouterr().out == expected
