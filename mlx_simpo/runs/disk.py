"""Whether a folder can be written, and how much space its disk has, before any work is done."""

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

from ..errors import SimPOError

_REMEDIES = {
    errno.EACCES: "name a folder of your own, or change the permissions",
    errno.EPERM: "name a folder of your own, or change the permissions",
    errno.EROFS: "the disk is mounted read-only: name a folder on another one",
    errno.ENOSPC: "delete what you no longer need, or name a folder on another disk",
    errno.EDQUOT: "delete what you no longer need, or name a folder on another disk",
}
WRITABLE = ".writable-"  # begins the name of the folder that `check_writable` creates


def check_writable(folder: Path) -> None:
    """Check that a folder and files in it can be created, by doing so; nothing of it stays.

    If the folder does not exist yet, this is tried in the nearest parent that does.

    Raises:
        SimPOError: they cannot be, or the path leads through a file.
    """
    nearest = _nearest_existing(folder)
    if not nearest.is_dir():
        what = "a link to nowhere" if nearest.is_symlink() else "a file"
        raise SimPOError(f"{folder} cannot be a folder: {nearest} is {what}; name another folder")
    try:
        with tempfile.TemporaryDirectory(prefix=WRITABLE, dir=nearest) as attempt:
            Path(attempt, "file").write_bytes(bytes(4096))
    except OSError as error:
        where = f"{folder}" if folder == nearest else f"{folder} (tried in {nearest})"
        remedy = _REMEDIES.get(error.errno or 0, "name a folder on another disk")
        raise SimPOError(f"cannot write to {where}: {error.strerror or error}; {remedy}") from None


def free_bytes(folder: Path) -> int:
    """Return how many bytes this user can still write on the disk of a folder.

    The folder need not exist. `sys.maxsize` if the file system does not tell.

    Raises:
        SimPOError: the file system cannot be asked.
    """
    nearest = _nearest_existing(folder)
    try:
        usage = shutil.disk_usage(nearest)
    except OSError as error:
        raise SimPOError(
            f"cannot tell how much space is left for {folder}: {error}; name another folder"
        ) from None
    return usage.free if usage.total else sys.maxsize  # some network folders have no size at all


def check_space(folder: Path, needed: int, what: str) -> None:
    """Check that the disk of a folder has space for so many bytes.

    Args:
        what: what needs them, for the message.

    Raises:
        SimPOError: it has not, or cannot be asked.
    """
    if (free := free_bytes(folder)) < needed:
        raise SimPOError(
            f"{what} needs {_readable(needed)}, and the disk of {folder} has {_readable(free)} "
            "left; delete what you no longer need, or name a folder on another disk"
        )


def _nearest_existing(folder: Path) -> Path:
    """Return the folder, or the innermost of its parents that exists, be it a file."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))


def _readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
