"""The terminal: stderr only, text as it is, and progress bars if it is a terminal."""

import errno
import io
import os
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from helpers.commands import captured_display
from rich.console import Console

from mlx_simpo import Evaluation
from mlx_simpo.reporting import display as display_module
from mlx_simpo.reporting.display import EVALUATION_ROWS, Display, step_note

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that moves the time forward."""
    now = 100.0
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now)

    def forward(seconds: float) -> None:
        nonlocal now
        now += seconds

    return forward


# --- lines -----------------------------------------------------------------------------------


def test_everything_goes_to_stderr(capsys: Capture, clock: Callable[[float], None]) -> None:
    display = Display()
    display.note("a note")
    display.warn("a warning")
    with display.progress("Training", 2) as advance:
        clock(60)
        advance()
    display.evaluations({"before": evaluation(0.5)})
    captured = capsys.readouterr()
    assert captured.out == ""
    for line in ("a note", "warning: a warning", "Training 1/2", "before"):
        assert line in captured.err


def test_control_characters_are_shown_and_not_sent() -> None:
    display, text = captured_display(terminal=True)
    display.note("rejected by the chat template: \x1b[2J\x07\ttab")
    assert "template: \\x1b[2J\\x07" in text.getvalue()
    assert "\x1b[2J" not in text.getvalue()


def test_tokens_and_passwords_are_not_shown() -> None:
    display, text = captured_display()
    display.note("read hf_plantedSecretToken0123456789")
    display.warn("trained on https://ann:pass1234@example.org/x")
    assert text.getvalue() == "read …\nwarning: trained on https://…@example.org/x\n"


def test_no_message_is_nothing_written() -> None:
    display, text = captured_display()
    display.note(None)
    display.warn(None)
    assert text.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_quiet_console_shows_nothing(
    terminal: bool, capsys: Capture, clock: Callable[[float], None]
) -> None:
    display = Display(Console(stderr=True, quiet=True, force_terminal=terminal))
    display.note("a note")
    display.warn("a warning")
    with display.progress("Training", 2) as advance:
        clock(60)
        advance()
    display.evaluations({"before": evaluation(0.5)})
    assert capsys.readouterr() == ("", "")


def test_a_long_line_is_not_broken(capsys: Capture) -> None:
    Display().note("word " * 100 + "end")
    assert capsys.readouterr().err == "word " * 100 + "end\n"


@pytest.mark.parametrize(
    "words",
    [
        "[red]file[/red].jsonl",
        "[/]",
        "x[0] = [1, 2]",
        "a\\[b]",
        "pairs.jsonl:100: :smile:",
        "C:\\runs\\",
    ],
)
@pytest.mark.parametrize("write", [Display.note, Display.warn])
def test_text_is_written_as_it_is(words: str, write: Callable, capsys: Capture) -> None:
    write(Display(), words)
    assert capsys.readouterr().err.removeprefix("warning: ") == f"{words}\n"


def test_bytes_that_are_not_text_are_escaped(capsys: Capture) -> None:
    Display().note("odd \udcff name")
    assert capsys.readouterr().err == "odd \\udcff name\n"


# --- progress without a terminal -------------------------------------------------------------


def test_a_short_task_writes_no_lines(clock: Callable[[float], None]) -> None:
    display, text = captured_display()
    with display.progress("Training", 3) as advance:
        for _ in range(3):
            clock(1)
            advance()
    assert text.getvalue() == ""


def test_a_long_task_writes_a_line_every_few_seconds(clock: Callable[[float], None]) -> None:
    display, text = captured_display()
    with display.progress("Training", 12) as advance:
        for step in range(12):
            clock(2)
            advance(1, f"loss {step}")
    assert text.getvalue().splitlines() == [
        f"Training {done}/12: loss {done - 1}" for done in (3, 6, 9, 12)
    ]


def test_several_steps_at_once_and_no_note(clock: Callable[[float], None]) -> None:
    display, text = captured_display()
    with display.progress("Tokenizing", 9) as advance:
        advance(4)
        clock(60)
        advance(3)
    assert text.getvalue() == "Tokenizing 7/9\n"


# --- progress on a terminal ------------------------------------------------------------------


def last_frame(text: io.StringIO) -> str:
    """What the screen shows in the end: what follows the last erased line."""
    return text.getvalue().rpartition("\x1b[2K")[2]


def test_a_terminal_has_a_bar() -> None:
    display, text = captured_display(terminal=True)
    with display.progress("Training", 4) as advance:
        advance(1, "loss 1.31")
        advance(2)
    frame = last_frame(text)
    assert all(part in frame for part in ("Training", "━", "3/4", "loss 1.31"))


def test_a_bar_shows_its_latest_note() -> None:
    display, text = captured_display(terminal=True)
    with display.progress("Training", 4) as advance:
        advance(1, "loss 1.31")
        advance(1, "loss 1.25")
    assert "loss 1.25" in last_frame(text)
    assert "loss 1.31" not in last_frame(text)


def test_a_nested_bar_is_removed_when_it_is_done() -> None:
    display, text = captured_display(terminal=True)
    with display.progress("Training", 4) as advance:
        with display.progress("Step 2", 2) as inner:
            inner(1)
            assert display._live is not None
            display._live.refresh()
        assert "Step 2" in text.getvalue()
        advance(4)
    assert "Training" in last_frame(text)
    assert "Step 2" not in last_frame(text)


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_passes_through_and_the_next_bar_is_new(terminal: bool) -> None:
    display, text = captured_display(terminal=terminal)
    with pytest.raises(KeyError), display.progress("Before", 4):
        raise KeyError
    with display.progress("After", 4) as advance:
        advance(4)
    assert ("After" in last_frame(text)) == terminal
    assert "Before" not in last_frame(text)


# --- what cannot be written ------------------------------------------------------------------


class FullDisk(io.StringIO):
    """A log on a disk that is full for a while."""

    is_full = True

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_log_on_a_full_disk_ends_nothing_and_has_its_lines_later() -> None:
    log = FullDisk()
    display = Display(Console(file=log, width=100))
    display.warn("the checkpoint could not be written")
    display.evaluations({"before": evaluation(0.5)})
    with display.progress("Training", 2) as advance:
        advance()
    log.is_full = False
    display.note("later")
    lines = log.getvalue().splitlines()
    assert (lines[0], lines[-1]) == ("warning: the checkpoint could not be written", "later")


def test_a_reader_that_has_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-simpo train … 2>&1 | less, and less is quit."""
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    with os.fdopen(writing_end, "w", buffering=1) as closed:
        monkeypatch.setattr("sys.stderr", closed)
        display = Display()
        for _ in range(2):
            display.note("step 1")
        monkeypatch.undo()
        with suppress(BrokenPipeError):
            closed.close()


# --- tables ----------------------------------------------------------------------------------


def evaluation(value: float, *without: str) -> Evaluation:
    names = [name for name in EVALUATION_ROWS if name not in without]
    none = np.zeros(0, np.float32)
    return Evaluation((), dict.fromkeys(names, value), (0.25, 0.875), none, none, none, none)


def rows(text: io.StringIO) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in text.getvalue().splitlines()]
    return {first: others for first, *others in filter(None, cells)}


def test_evaluations_are_shown_side_by_side() -> None:
    display, text = captured_display()
    display.evaluations({"before": evaluation(0.5), "after": evaluation(0.75)})
    cells = rows(text)
    assert cells["loss"] == ["0.5000", "0.7500"]
    assert cells["rewards/accuracies"] == ["50.0%", "75.0%"]
    assert cells["95 % interval"] == ["25.0% to 87.5%"] * 2
    assert cells["chosen_tokens"] == ["0.5", "0.8"]


def test_a_metric_that_was_not_computed_has_no_row() -> None:
    display, text = captured_display()
    display.evaluations({"before": evaluation(0.5, "sft_loss")})
    assert rows(text).keys() == {*EVALUATION_ROWS, "95 % interval"} - {"sft_loss"}


def test_the_note_beside_the_bar() -> None:
    metrics = {"loss": 1.3133, "rewards/accuracies": 0.5, "rewards/margins": -0.018}
    assert step_note(metrics) == "loss 1.313  accuracy 50%  margin -0.02"
