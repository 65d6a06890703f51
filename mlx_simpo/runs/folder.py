"""A run's folder: the adapter, and the record of how it was trained.

config.yaml           the whole configuration, defaults included
metrics.jsonl         one line per training step and per evaluation
quarantined.jsonl     records that were not used, and why (if any)
nonfinite.jsonl       steps whose loss or gradient was not finite, with their pairs (if any)
samples.jsonl         responses to train.sample_prompts, at each evaluation
checkpoints/          what `mlx-simpo train --resume` continues from (see `checkpoints`)
adapters.safetensors, adapter_config.json      the trained adapter, in mlx-lm's format
chat_template.jinja   the template it was trained with (if any)
best/                 the adapter with the lowest evaluation loss (with train.eval_every)
summary.json          the result of the run, see `training.result.TrainResult`
"""

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from ..errors import SimPOError
from ..files import sync, write_durably, write_text
from ..paths import local_path
from .checkpoints import list_checkpoints
from .disk import WRITABLE, check_space, check_writable
from .lock import LOCK, lock_run

LEAST_SPACE = 10**7  # bytes; what the adapter needs is known when the model is loaded
CONFIG, ADAPTER, CHECKPOINTS = "config.yaml", "adapters.safetensors", "checkpoints"
METRICS, SAMPLES, NONFINITE = LOGS = ("metrics.jsonl", "samples.jsonl", "nonfinite.jsonl")
# What a run leaves that is killed before it has written its configuration.
_REMAINS = re.compile(rf"{re.escape(LOCK)}|{re.escape(WRITABLE)}.*|\.{re.escape(CONFIG)}\.writing")


def check_output_free(output: str) -> None:
    """Check that the output folder does not exist or is empty, before any work is done.

    Raises:
        SimPOError: it is not empty, or is a file.
    """
    path = local_path(output)
    if path.is_file():
        raise SimPOError(f"output is {output!r}, which is a file; it must be a new folder")
    if path.is_dir() and not all(_REMAINS.fullmatch(entry.name) for entry in path.iterdir()):
        what = "holds a run already" if (path / CONFIG).exists() else "is not empty"
        raise SimPOError(f"output is {output!r}, which {what}; name a new folder, or remove it")


@contextmanager
def open_run(output: str, resume: Literal["never", "auto", "always"]) -> "Iterator[RunFolder]":
    """Create a run's folder or open the one that is there, and lock it while the context lasts.

    A folder in which nothing has happened that is worth keeping is deleted at the end.

    Args:
        resume: never: the folder must be new or empty; always: it must hold a run; auto: either.

    Raises:
        SimPOError: it must not be used, cannot be written, or another process runs in it.
    """
    path = local_path(output)
    holds_run = (path / CONFIG).is_file()
    if resume == "always" and not holds_run:
        raise SimPOError(
            f"{output} holds no run that could be resumed (it has no {CONFIG}); name the output "
            "folder of a run, or begin the run anew"
        )
    if holds_run and resume == "never":
        raise SimPOError(
            f"output is {output!r}, which holds a run already; go on with it "
            f"({resume_command(output)}), name a new folder, or remove it"
        )
    if holds_run:
        _check_has_state(path)
    if not holds_run:
        check_output_free(output)
    check_writable(path)
    check_space(path, LEAST_SPACE, "a run")
    new_parents = [parent for parent in path.parents if not parent.exists()]
    folder = RunFolder(path, resuming=holds_run)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with lock_run(path):
            if not holds_run:
                check_output_free(output)  # another run may have begun and ended in the meantime
            try:
                yield folder
            finally:
                if not folder.is_worth_keeping:
                    _delete(path)
    finally:
        if not path.exists():
            for parent in new_parents:
                with suppress(OSError):  # somebody else uses it by now
                    parent.rmdir()


def resume_command(output: str) -> str:
    """Return the command that goes on with the run in a folder."""
    return f"mlx-simpo train --resume {shlex.quote(output)}"


def _check_has_state(path: Path) -> None:
    """Check that a folder with a configuration is not that of an adapter, which has one, too.

    A run without a checkpoint would begin again, and overwrite what is there.

    Raises:
        SimPOError: it has an adapter and no checkpoints.
    """
    if not (path / ADAPTER).exists() or list_checkpoints(path / CHECKPOINTS):
        return
    run = next((p for p in path.absolute().parents if (p / CHECKPOINTS).is_dir()), None)
    remedy = (
        f"name the folder of the run, {run}"
        if run
        else f"begin a new run in another folder (lora.init_from={path} starts from its adapter)"
    )
    raise SimPOError(f"{path} has an adapter but no {CHECKPOINTS}/ to go on from; {remedy}")


class RunFolder:
    """The record of one run on disk.

    path: the folder. resuming: it holds a run that goes on. is_worth_keeping: whether it has
    something that no other run could do again.
    """

    def __init__(self, path: Path, *, resuming: bool = False) -> None:
        self.path = path
        self.resuming = self.is_worth_keeping = resuming
        self._logs = {name: _Log(path / name) for name in LOGS}

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / CHECKPOINTS

    def begin(self, config_yaml: str, quarantined: Iterable[dict[str, Any]]) -> None:
        """Write the configuration and the quarantined records (as JSON objects).

        Raises:
            SimPOError: they cannot be written.
        """
        (self.path / "summary.json").unlink(missing_ok=True)  # of the run so far
        self._write(CONFIG, config_yaml)  # first: without it, the folder counts as somebody else's
        lines = [json.dumps(q, ensure_ascii=False) + "\n" for q in quarantined]
        if lines:
            write_text(self.path / "quarantined.jsonl", "".join(lines))

    def log(self, record: dict[str, Any], name: str = METRICS) -> None:
        """Append one line to a log; lines that a full disk refuses are written with a later one.

        A record with the number of a finished step as "step" makes the folder worth keeping.
        """
        self.is_worth_keeping |= record["step"] > 0
        self._logs[name].append(json.dumps(record).encode() + b"\n")

    def log_positions(self) -> dict[str, list[Any]]:
        """Return [size, SHA-256] of each log, whose content is on the disk by then.

        Raises:
            OSError: a log cannot be written.
        """
        return {name: log.position() for name, log in self._logs.items()}

    def rewind_logs(self, positions: dict[str, list[Any]]) -> list[str]:
        """Cut the logs to these positions; {} empties them.

        A log that is no longer what it was at its position is put aside.

        Returns:
            A message for each log that was put aside.

        Raises:
            SimPOError: a log cannot be written.
        """
        messages = []
        for name, log in self._logs.items():
            size, digest = positions.get(name, [0, sha256().hexdigest()])
            try:
                if not log.rewind(size, digest):
                    messages.append(
                        f"{name} is not as the run left it; it is now {log.put_aside().name}, and "
                        "the lines from here on are in a new file"
                    )
            except OSError as error:
                raise SimPOError(f"cannot write {self.path / name}: {error}") from None
        return messages

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json.

        Raises:
            SimPOError: it cannot be written.
        """
        self._write("summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        """Write a file durably; raises SimPOError if it cannot be."""
        try:
            write_durably(self.path / name, text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise SimPOError(f"cannot write {self.path / name}: {error}") from None


def _delete(folder: Path) -> None:
    """Delete a folder as far as possible; of a link to a folder, the content."""
    for path in list(folder.iterdir()) if folder.is_symlink() else [folder]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class _Log:
    """A file that grows line by line, and whose content up to a position can be recognized."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size, self._digest = 0, sha256()  # of what is written
        self._waiting = b""

    def append(self, line: bytes) -> None:
        self._waiting += line
        try:
            self._flush()
        except OSError:
            return  # a full disk must not end the run; `position` tells

    def _flush(self) -> None:
        if not self._waiting:
            return
        # Opened again for each line: after a crash, the file has every finished step. Written at
        # the known size: a disk that filled up may have taken half a line.
        with self.path.open("r+b" if self._size else "wb") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(self._waiting)
        self._size += len(self._waiting)
        self._digest.update(self._waiting)
        self._waiting = b""

    def position(self) -> list[Any]:
        self._flush()
        if self._size:
            sync(self.path)
            sync(self.path.parent)  # its name, too: the file may be new
        return [self._size, self._digest.hexdigest()]

    def rewind(self, size: int, digest: str) -> bool:
        """Cut the file to ``size`` bytes if these have this SHA-256; return whether they have."""
        content = self.path.read_bytes()[:size] if self.path.is_file() else b""
        self._digest = sha256(content)
        if len(content) != size or self._digest.hexdigest() != digest:
            return False
        self._size, self._waiting = size, b""
        if size:
            with self.path.open("r+b") as file:
                file.truncate(size)
        else:
            self.path.unlink(missing_ok=True)
        return True

    def put_aside(self) -> Path:
        """Rename the file, if it is there, and begin a new one."""
        names = (f"{self.path.stem}-damaged{n or ''}{self.path.suffix}" for n in itertools.count())
        aside = next(path for name in names if not (path := self.path.with_name(name)).exists())
        if self.path.is_file():
            self.path.replace(aside)
        self._size, self._digest, self._waiting = 0, sha256(), b""
        return aside
