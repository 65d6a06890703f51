"""train.keep_awake, with a stand-in for macOS's caffeinate that notes how it is called."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_simpo import SimPOError
from mlx_simpo.training import keep_awake as module
from mlx_simpo.training.keep_awake import keep_awake

# Its arguments and its process id in a file; then it waits until it is ended.
STAND_IN = """#!/bin/sh
echo "$$ $*" > {log}.new && mv {log}.new {log}
{rest}
"""
AWAKE = "caffeinate keeps this Mac awake during the run"
Patch = pytest.MonkeyPatch


class Mac:
    """A pretended Mac: its caffeinate's log, the lines that the user is shown."""

    def __init__(self, folder: Path, patch: Patch) -> None:
        self.folder, self.log, self.notes = folder, folder / "log", list[str]()
        patch.setattr(sys, "platform", "darwin")
        patch.setattr(module, "has_terminal", lambda: True)
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def install(self, rest: str = "exec sleep 600") -> None:
        path = self.folder / "caffeinate"
        path.write_text(STAND_IN.format(log=self.log, rest=rest))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def call(self) -> tuple[int, str]:
        """Wait until caffeinate has started; return its process id and its arguments."""
        while not self.log.exists():
            time.sleep(0.01)
        number, arguments = self.log.read_text().split(maxsplit=1)
        return int(number), arguments.strip()


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: Patch) -> Mac:
    return Mac(tmp_path, monkeypatch)


@contextmanager
def standard_input_of(text: str) -> Iterator[None]:
    """Let the process's standard input be a pipe with this text."""
    saved = os.dup(0)
    reading_end, writing_end = os.pipe()
    os.write(writing_end, text.encode())
    os.close(writing_end)
    os.dup2(reading_end, 0)
    os.close(reading_end)
    try:
        yield
    finally:
        os.dup2(saved, 0)
        os.close(saved)


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("setting", [None, True])
def test_caffeinate_runs_as_long_as_the_run(
    setting: bool | None, mac: Mac, capfd: pytest.CaptureFixture[str]
) -> None:
    """And neither reads what is typed nor writes into the run's output."""
    done = mac.folder / "done"
    mac.install(f"cat; echo out; echo err >&2; touch {done}; exec sleep 600")
    with standard_input_of("typed"), keep_awake(setting, mac.notes.append):
        number, arguments = mac.call()
        while not done.exists():
            time.sleep(0.01)
        assert os.read(0, 9) == b"typed"
        assert is_running(number)
        assert os.getsid(number) != os.getsid(0)  # Ctrl-C in the terminal does not reach it
    assert arguments == f"-i -s -w {os.getpid()}"
    assert not is_running(number)
    (note,) = mac.notes
    assert note.startswith(AWAKE)
    assert "lid" in note
    assert capfd.readouterr() == ("", "")


def test_it_ends_with_a_run_that_fails(mac: Mac) -> None:
    mac.install()

    def fail() -> None:
        with keep_awake(None, mac.notes.append):
            mac.call()
            raise SimPOError("the loss is not a finite number")

    with pytest.raises(SimPOError, match="finite"):
        fail()
    assert not is_running(mac.call()[0])


def test_one_that_does_not_end_is_killed(mac: Mac, monkeypatch: Patch) -> None:
    monkeypatch.setattr(module, "SECONDS_TO_END", 0.1)
    mac.install("trap '' TERM; while :; do sleep 0.1; done")
    with keep_awake(None, mac.notes.append):
        number, _ = mac.call()
        time.sleep(0.2)  # until the trap is set
    assert not is_running(number)


def test_false_starts_nothing(mac: Mac) -> None:
    mac.install()
    with keep_awake(False, mac.notes.append):
        pass
    assert (mac.notes, mac.log.exists()) == ([], False)


def test_without_a_terminal_it_must_be_asked_for(mac: Mac, monkeypatch: Patch) -> None:
    mac.install()
    monkeypatch.setattr(module, "has_terminal", lambda: False)
    with keep_awake(None, mac.notes.append):
        pass
    assert (mac.notes, mac.log.exists()) == ([], False)
    with keep_awake(True, mac.notes.append):
        mac.call()
    assert mac.notes[0].startswith(AWAKE)


def test_a_terminal_is_recognized() -> None:
    code = "from mlx_simpo.training.keep_awake import has_terminal as t; import sys; sys.exit(t())"
    ours, theirs = os.openpty()
    for terminal in (None, "stdin", "stdout", "stderr"):
        streams: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        streams |= {terminal: theirs} if terminal else {}
        ended = subprocess.run([sys.executable, "-c", code], **streams)
        assert ended.returncode == (terminal is not None), terminal
    os.close(ours)
    os.close(theirs)


def test_a_missing_caffeinate_is_one_note(mac: Mac, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PATH", str(mac.folder))
    with keep_awake(None, mac.notes.append):
        pass
    (note,) = mac.notes
    assert note.startswith("this Mac may fall asleep during the run: caffeinate does not start")


def test_one_that_ends_early_is_noticed(mac: Mac) -> None:
    mac.install("exit 7")
    with keep_awake(None, mac.notes.append):
        number, _ = mac.call()
        os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)
    assert mac.notes[1] == (
        "caffeinate ended before the run, with status 7: the Mac may have slept"
    )


def test_on_other_systems_it_says_that_it_has_no_effect(mac: Mac, monkeypatch: Patch) -> None:
    mac.install()
    monkeypatch.setattr(sys, "platform", "linux")
    with keep_awake(None, mac.notes.append), keep_awake(False, mac.notes.append):
        assert mac.notes == []
    with keep_awake(True, mac.notes.append):
        pass
    (note,) = mac.notes
    assert note.startswith("train.keep_awake has no effect here: it needs macOS's caffeinate")
    assert not mac.log.exists()
