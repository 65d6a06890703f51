"""Keeping a Mac awake while it trains, by macOS's own `caffeinate`.

`caffeinate -i -s -w PID` (its manual page): -i prevents idle sleep; -s prevents system sleep, on
the charger only; -w lets it end when the process PID does, so that it never outlives a run that is
killed. Without -d the display may sleep, which is meant: macOS's GPU watchdog has been reported
only with the display on (docs/troubleshooting.md). A closed lid, the Apple menu and a low battery
still put a Mac to sleep, as Apple documents for this kind of assertion.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_TO_END = 5.0


@contextmanager
def keep_awake(setting: bool | None, notify: Callable[[str], None]) -> Iterator[None]:
    """Keep the Mac awake while the context lasts; never let that fail the run.

    Args:
        setting: ``train.keep_awake``; None: on macOS, if the process has a terminal.
        notify: called with a line about what is done, or why it cannot be.
    """
    is_mac = sys.platform == "darwin"
    if not (is_mac and has_terminal() if setting is None else setting):
        yield
        return
    if not is_mac:
        notify(
            "train.keep_awake has no effect here: it needs macOS's caffeinate; keep this machine "
            "awake by its own means, for example systemd-inhibit mlx-simpo train …"
        )
        yield
        return
    process = _start_caffeinate(notify)
    try:
        yield
    finally:
        if process is not None:
            _end(process, notify)


def has_terminal() -> bool:
    """Return whether one of the standard streams is a terminal."""
    return any(os.isatty(fd) for fd in (0, 1, 2))


def _start_caffeinate(notify: Callable[[str], None]) -> subprocess.Popen[bytes] | None:
    try:
        process = subprocess.Popen(
            ["caffeinate", "-i", "-s", "-w", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Or Ctrl-C would end it while the run finishes its step and saves.
            start_new_session=True,
        )
    except OSError as error:
        notify(f"this Mac may fall asleep during the run: caffeinate does not start ({error})")
        return None
    notify(
        "caffeinate keeps this Mac awake during the run, but not with its lid closed or a low "
        "battery; train.keep_awake=false turns it off"
    )
    return process


def _end(process: subprocess.Popen[bytes], notify: Callable[[str], None]) -> None:
    status = process.poll()
    if status is not None:
        notify(f"caffeinate ended before the run, with status {status}: the Mac may have slept")
        return
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
