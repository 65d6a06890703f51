"""One process per run: a second one would mix its metrics and checkpoints with the first one's."""

import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import SimPOError

LOCK = ".lock"
_held: set[int] = set()  # descriptors of the locks of this process


def _close_inherited() -> None:
    """Close a parent's locks in a forked child, which would hold them for as long as it lives."""
    for descriptor in _held:
        os.close(descriptor)  # and no LOCK_UN: that would take the lock from the parent
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which exists, while the context lasts.

    The lock is the operating system's, on the file .lock, and ends with the process, however that
    ends. A file that a dead process of this host has left is therefore taken over. One that
    another host has left is not, even if the system grants its lock: not every network folder
    passes locks between hosts, so that the other process may be running. On the disk of the
    system or of its temporary files it is taken over, too: no other host writes there, and it is
    this one that has a new name, as Macs get with every network.

    Raises:
        SimPOError: another process holds the lock, or may hold it, or the file cannot be locked.
    """
    path = folder / LOCK
    try:
        descriptor = _acquire(path)
    except OSError as error:
        raise SimPOError(
            f"cannot lock {path}: {error.strerror or error}; name an output folder on a disk that "
            "can be written and supports locks"
        ) from None
    process = os.getpid()
    _held.add(descriptor)
    try:
        yield
    finally:
        # A forked child that leaves the context has closed its copy and must not remove the file.
        if os.getpid() == process:
            _held.discard(descriptor)
            # Before the lock ends: afterwards the file may be somebody else's.
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _acquire(path: Path) -> int:
    """Lock the file, write this process into it, and return its descriptor.

    Raises:
        OSError: the file cannot be opened or locked.
        SimPOError: somebody else's lock is on it.
    """
    while True:
        # What Python opens in this way is closed in the programs that it starts.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(descriptor, path):
                _check_left_by_this_host(path, _read(descriptor))
                _write(descriptor)
                return descriptor
            os.close(descriptor)  # it was removed while this process opened it: the run has ended
        except BlockingIOError:
            time.sleep(0.1)  # if the other one has just begun, it is about to write who it is
            other = _read(descriptor)
            os.close(descriptor)
            raise SimPOError(
                f"{path.parent} is in use by {_describe(other)}; wait until it has ended, stop it "
                f"(kill {other.get('pid', 'PID')}), or name another output folder"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _check_left_by_this_host(path: Path, other: dict[str, Any]) -> None:
    """Raise SimPOError if the file, which no process of this host holds, is from another host."""
    if other.get("host", socket.gethostname()) != socket.gethostname() and not _is_local(path):
        raise SimPOError(
            f"{path.parent} was locked by {_describe(other)}, and whether that still runs cannot "
            f"be seen from {socket.gethostname()}; if it does not, remove {path}"
        )


def _is_local(path: Path) -> bool:
    """Return whether a file is on a disk that is certainly this host's own."""
    return path.stat().st_dev in {os.stat(p).st_dev for p in ("/", tempfile.gettempdir())}


def _write(descriptor: int) -> None:
    content = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(content).encode(), 0)


def _read(descriptor: int) -> dict[str, Any]:
    """Return what the file says of a process; {} if nothing that can be understood."""
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _describe(other: dict[str, Any]) -> str:
    if not {"pid", "host", "started"} <= other.keys():
        return "another process"
    return f"process {other['pid']} on {other['host']}, started at {other['started']}"
