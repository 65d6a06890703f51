"""Chats in a terminal, and through pipes."""

import sys
from pathlib import Path

import pytest
from helpers.commands import Ran, captured_display, command, complaint, text_stream
from helpers.terminal import CTRL_C, CTRL_D, terminal
from helpers.tiny import assistant, user

from mlx_simpo import SimPOConfig, generate

Capture = pytest.CaptureFixture[str]


def response(model: Path, prompt: list | str, adapter: Path | None = None) -> str:
    """The response of 6 tokens to a prompt or a conversation."""
    config = SimPOConfig(model=str(model))
    texts = generate(config, prompt, adapter, max_tokens=6, display=captured_display()[0])
    assert isinstance(texts, dict)
    return texts["adapter" if adapter else "base"]


def test_a_pipe_gets_the_responses_and_nothing_else(
    capsys: Capture, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "Why?\n\n/help\nWho?\n/reset\nWhy?\n/usr/bin is what?\n/exit\nnever\n"
    monkeypatch.setattr(sys, "stdin", text_stream(lines))
    ran = command(capsys, "generate", "--model", model_folder, "--chat", "-m", 6)
    first = response(model_folder, "Why?")
    second = response(model_folder, [user("Why?"), assistant(first), user("Who?")])
    third = response(model_folder, [user("Why?"), assistant(first), user("/usr/bin is what?")])
    assert (ran.status, ran.out) == (0, "".join(f"{t}\n" for t in (first, second, first, third)))
    assert "/reset   begin a new conversation" in ran.err
    assert "(a new conversation)" in ran.err
    assert ran.err.count("the response was cut at 6 tokens") == 4


def chat(capsys: Capture, monkeypatch: pytest.MonkeyPatch, lines: str, *options: object) -> Ran:
    monkeypatch.setattr(sys, "stdin", text_stream(lines))
    return command(capsys, "generate", "--chat", "-m", 6, *options)


def test_base_model_and_adapter_can_be_exchanged(
    capsys: Capture,
    model_folder: Path,
    strong_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = "Why?\n/base\n/reset\nWhy?\n/base\n/reset\nWhy?\n"
    ran = chat(capsys, monkeypatch, lines, "--adapter", strong_adapter)
    adapted = response(model_folder, "Why?", strong_adapter)
    base = response(model_folder, "Why?")
    assert ran.out == f"{adapted}\n{base}\n{adapted}\n"
    assert "(the base model responds now)" in ran.err
    assert "(the adapter responds now)" in ran.err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/rest\n", "there is no command /rest; /help shows those that there are"),
        ("/base\n", "there is no adapter; start with --adapter to compare with one"),
    ],
)
def test_a_mistake_in_a_pipe_ends_the_chat(
    capsys: Capture,
    model_folder: Path,
    lines: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = chat(capsys, monkeypatch, lines, "--model", model_folder)
    assert message in complaint(ran)


def test_a_chat_needs_a_template(
    capsys: Capture, bare_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = chat(capsys, monkeypatch, "Why?\n", "--model", bare_folder)
    assert "a chat needs a chat template, and the one in use is none" in complaint(ran)


def test_a_chat_in_a_terminal(model_folder: Path) -> None:
    """Ctrl-C stops a response and only that, a mistake does not end the chat, Ctrl-D does."""
    options = ("--model", model_folder, "--chat", "--max-tokens", 10**6)
    with terminal("generate", *options) as screen:
        assert "/help shows what else you can type" in screen.wait_for("\n> ")
        screen.type("/help\n")
        assert "/reset   begin a new conversation" in screen.wait_for("\n> ")
        screen.type("/rest\n")
        assert "error: there is no command /rest; /help" in screen.wait_for("\n> ")
        screen.type("Why is the sky blue?\n")
        screen.wait_for("blue?\n")
        while len(screen.text) < 60:  # the response is coming
            screen.read()
        screen.type(CTRL_C)
        stopped = screen.wait_for("\n> ")
        assert "Traceback" not in stopped
        assert "interrupted" not in stopped
        screen.type_until(CTRL_C, "(Ctrl-D ends the chat)\n")  # while nothing is generated
        screen.wait_for("> ")
        screen.type("/reset\n")
        assert "(a new conversation)" in screen.wait_for("> ")
        screen.type("/exut\x7f\x7f\x7fxit")  # lines can be edited
        screen.type("\n")
        status, rest = screen.finish()
    assert status == 0
    assert "Traceback" not in rest


def test_ctrl_d_ends_a_chat(model_folder: Path) -> None:
    with terminal("generate", "--model", model_folder, "--chat") as screen:
        screen.wait_for("\n> ")
        screen.type(CTRL_D)
        assert screen.finish()[0] == 0
