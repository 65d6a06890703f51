"""One process per run folder: a second one is refused, a dead one's lock is taken over."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_simpo.errors import SimPOError
from mlx_simpo.runs import lock
from mlx_simpo.runs.lock import LOCK, lock_run

ROOT = Path(__file__).parents[2]
HOLD = """
import os, sys, time
from pathlib import Path
from mlx_simpo.errors import SimPOError
from mlx_simpo.runs.lock import lock_run
try:
    with lock_run(Path(sys.argv[1])):
        pass  # do
        print("locked", flush=True)
        sys.stdin.readline()
except SimPOError as error:
    print(error, flush=True)
"""


def start(folder: Path, do: str = "pass") -> subprocess.Popen[str]:
    """Start a process that locks the folder, does something, says that it holds the lock, or why
    it does not, and ends when it reads a line."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLD.replace("pass  # do", do), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Hold the lock in another process."""
    process = start(folder)
    try:
        assert first_line(process) == "locked"
        yield process
    finally:
        process.communicate("\n")


def is_free(folder: Path) -> bool:
    try:
        with lock_run(folder):
            return True
    except SimPOError:
        return False


def write_lock(folder: Path, **content: Any) -> None:
    """Leave a lock file that nobody holds."""
    other = {"host": socket.gethostname(), "pid": 12, "started": "2026-01-01T10:00:00+01:00"}
    (folder / LOCK).write_text(json.dumps({**other, **content}))


# --- two processes ----------------------------------------------------------------------------


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(SimPOError) as error, lock_run(tmp_path):
            pass
        pid = process.pid
        time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d"
        expected = (
            rf"{tmp_path} is in use by process {pid} on {re.escape(socket.gethostname())}, started "
            rf"at {time}; wait until it has ended, stop it \(kill {pid}\), or name another output"
        )
        assert re.match(expected, str(error.value))
        content = json.loads((tmp_path / LOCK).read_text())
        assert content.keys() == {"host", "pid", "started"}
    assert list(tmp_path.iterdir()) == []
    assert is_free(tmp_path)


def test_one_of_five_processes_that_start_at_once_wins(tmp_path: Path) -> None:
    for _ in range(3):
        processes = [start(tmp_path) for _ in range(5)]
        lines = [first_line(process) for process in processes]
        assert lines.count("locked") == 1
        winner = processes[lines.index("locked")].pid
        for line in set(lines) - {"locked"}:
            assert f"is in use by process {winner} on " in line
        for process in processes:
            process.communicate("\n")
        assert list(tmp_path.iterdir()) == []


def test_the_same_process_cannot_lock_a_folder_twice(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        with pytest.raises(SimPOError, match=f"in use by process {os.getpid()} "):
            lock_run(tmp_path).__enter__()
        assert (tmp_path / LOCK).exists()
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


def test_the_lock_ends_with_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), lock_run(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_folder_may_be_deleted_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with lock_run(tmp_path / "run"):
        (tmp_path / "run" / LOCK).unlink()
        (tmp_path / "run").rmdir()


# --- left by somebody else --------------------------------------------------------------------


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGABRT])
def test_the_lock_of_a_dead_process_is_taken_over(end: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path)
    assert first_line(process) == "locked"
    process.send_signal(end)
    process.communicate()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
    with lock_run(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pid", [1, os.getpid()], ids=["1", "own"])
def test_a_running_process_with_the_number_of_the_dead_one_does_not_matter(
    pid: int, tmp_path: Path
) -> None:
    write_lock(tmp_path, pid=pid)
    assert is_free(tmp_path)


def test_a_longer_file_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    write_lock(tmp_path, more="x" * 1000)
    with lock_run(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_the_lock_of_another_host_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_is_local", lambda path: False)
    write_lock(tmp_path, host="other.local", pid=77)
    before = (tmp_path / LOCK).read_bytes()
    with pytest.raises(SimPOError) as error:
        lock_run(tmp_path).__enter__()
    assert str(error.value) == (
        f"{tmp_path} was locked by process 77 on other.local, started at "
        "2026-01-01T10:00:00+01:00, and whether that still runs cannot be seen from "
        f"{socket.gethostname()}; if it does not, remove {tmp_path / LOCK}"
    )
    assert (tmp_path / LOCK).read_bytes() == before
    (tmp_path / LOCK).unlink()
    assert is_free(tmp_path)


def test_a_host_with_a_new_name_takes_over_on_its_own_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what gettempdir returns
    write_lock(tmp_path, host="my-mac.at-home")
    assert is_free(tmp_path)


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs a disk that is never the own one"
)
def test_other_disks_are_not_taken_for_the_own_one() -> None:
    assert lock._is_local(Path("/"))
    assert not lock._is_local(Path("/proc/self"))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"host": "x"}']
)
def test_a_damaged_lock_file_is_taken_over_and_does_not_hide_a_holder(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / LOCK).write_bytes(content)
    assert is_free(tmp_path)
    with lock_run(tmp_path):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(SimPOError, match=r"in use by another process; wait .* \(kill PID\)"):
            lock_run(tmp_path).__enter__()


def test_a_file_that_is_removed_while_it_is_being_locked_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former owner ends between the opening of its file and the locking of it."""
    calls = []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_run(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert len(calls) == 2


# --- children ---------------------------------------------------------------------------------


def test_a_forked_child_does_not_hold_the_lock_of_its_dead_parent(tmp_path: Path) -> None:
    process = start(tmp_path, "os.fork() or time.sleep(60)")
    try:
        assert first_line(process) == "locked"
        assert not is_free(tmp_path)
        process.kill()
        process.wait()
        os.killpg(process.pid, 0)  # the child still runs
        assert is_free(tmp_path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_forked_child_that_leaves_the_context_leaves_the_lock(tmp_path: Path) -> None:
    process = start(tmp_path, "child = os.fork(); child or sys.exit(); os.waitpid(child, 0)")
    assert first_line(process) == "locked"
    assert (tmp_path / LOCK).exists()
    assert not is_free(tmp_path)
    process.communicate("\n")
    assert list(tmp_path.iterdir()) == []


def test_a_started_program_does_not_hold_the_lock(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        program = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert is_free(tmp_path)
    finally:
        program.kill()
        program.wait()


# --- no lock possible -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no folder", "folder", "link", "pipe"])
def test_a_lock_file_that_cannot_be_locked_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / LOCK
    folder = tmp_path / "none" if kind == "no folder" else tmp_path
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(
        SimPOError, match=f"^cannot lock {folder}/{LOCK}: .*; name an output folder"
    ):
        lock_run(folder).__enter__()
    assert not (tmp_path / "elsewhere").exists()


def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        SimPOError, match=r"not supported; name .* can be written and supports locks"
    ):
        lock_run(tmp_path).__enter__()
