"""Runs programs that are killed, or find the disk full, at a chosen operation on a folder's files.

    run = run_with_fault([sys.executable, "-m", "mlx_simpo", "train", …], folder)
    for number in range(1, len(run.operations) + 1):
        run_with_fault(…, folder, kill_at=number)

An operation is an open for writing, write, truncate, sync, mkdir, rename, link or unlink that the
program's own process does below the folder; see shim.c. They are counted from 1. Syncs are counted
and not executed.
"""

import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
KILLED = -signal.SIGKILL


@cache
def missing() -> str | None:
    """Return why faults cannot be injected on this machine, or None if they can."""
    if platform.system() != "Linux":
        return "injecting faults needs Linux, whose LD_PRELOAD it uses"
    return None if shutil.which("cc") else "injecting faults needs a C compiler, cc"


class Operation(NamedTuple):
    """Something that a process has done to a file.

    name: open, write, truncate, sync, mkdir, rename (path: the new one), link, unlink or rmdir.
    path: relative to the watched folder. inode: of writes, truncations and syncs, else 0.
    """

    name: str
    path: str
    inode: int


class Ended(NamedTuple):
    """How a program ended: its exit status, negative for a signal, what it wrote to the terminal,
    and what it did or was about to do when it was killed."""

    status: int
    out: str
    err: str
    operations: list[Operation]


class Fault(NamedTuple):
    """What happens at which operation.

    kill_at: the process is killed before it. full_at: it fails with ``error``, and so do all
    later ones that need space, until the operation ``full_until``. torn: if it is a write, a part
    of it is done first.
    """

    kill_at: int = 0
    full_at: int = 0
    full_until: int = 0
    torn: int = False
    error: int = errno.ENOSPC


@cache
def shim() -> Path:
    """Compile shim.c, once per process, and return the library."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    library = folder / "shim.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


def run_with_fault(
    program: str | Sequence[str],
    folder: Path,
    *,
    env: dict[str, str] | None = None,
    **fault: int,
) -> Ended:
    """Run Python code, or a command, with a fault in the files below ``folder``.

    Args:
        env: added to the environment.
        fault: as in `Fault`; without any, the operations are counted.
    """
    command = [sys.executable, "-c", program] if isinstance(program, str) else list(program)
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch, "trace")
        values = {
            f"FAULTS_{name.upper()}": str(int(v)) for name, v in Fault(**fault)._asdict().items()
        }
        values |= {"FAULTS_FOLDER": str(folder.resolve()), "FAULTS_TRACE": str(trace)}
        process = subprocess.run(
            command,
            env=_environment() | (env or {}) | values,
            capture_output=True,
            text=True,
            check=False,
        )
        return Ended(process.returncode, process.stdout, process.stderr, _operations(trace))


class Forks:
    """Runs pieces of Python code after a common one, each in a fork: what the common one imports is
    imported once. Use it as a context."""

    def __init__(self, setup: str) -> None:
        self._setup = setup

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        self._ask({"setup": self._setup})
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()
        self._scratch.cleanup()

    def run(self, code: str, folder: Path, **fault: int) -> Ended:
        """Run code, with the names that the common code has defined, as `run_with_fault` does."""
        files = {name: Path(self._scratch.name, name) for name in ("trace", "out", "err")}
        for file in files.values():
            file.write_bytes(b"")
        paths = {name: str(path) for name, path in files.items()}
        values = Fault(**fault)._asdict()
        status = self._ask({"code": code, "folder": str(folder.resolve()), **paths, **values})
        out, err = (files[name].read_text(encoding="utf-8") for name in ("out", "err"))
        return Ended(status, out, err, _operations(files["trace"]))

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def cut_power(folder: Path, operations: Iterable[Operation]) -> None:
    """Empty every file below ``folder`` that was not synced after these operations wrote to it.

    File systems write names before content: after a power cut, a new file may be there and empty.
    """
    unsynced: set[int] = set()
    for operation in operations:
        if operation.name == "sync":
            unsynced.discard(operation.inode)
        elif operation.inode:
            unsynced.add(operation.inode)
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_ino in unsynced:
            os.truncate(path, 0)


def _environment() -> dict[str, str]:
    inherited = os.environ
    paths = [str(TESTS.parent), str(TESTS), inherited.get("PYTHONPATH", "")]
    preloaded = f"{shim()} {inherited.get('LD_PRELOAD', '')}".strip()
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LD_PRELOAD": preloaded,
    }


def _operations(trace: Path) -> list[Operation]:
    lines = trace.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    fields = (line.split("\t", 2) for line in lines)
    return [Operation(name, path, int(inode)) for name, inode, path in fields]
