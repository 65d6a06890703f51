"""Checkpoints of a run: folders that are whole or are not used.

checkpoints/step-000120/            one checkpoint: what the trainer has written, and a manifest
checkpoints/step-000120-replaced/   the former one of that step, while it is being replaced
checkpoints/.saving-…, .deleting-…  one that is being written or deleted, or was when the run died

A checkpoint gets its name when all of it is on the disk, and loses it before any of it is deleted.
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import SimPOError, one_line
from ..files import sync
from .manifest import (
    DamagedCheckpointError,
    checkpoint_name,
    contents,
    verify_checkpoint,
    write_manifest,
)

_NAME = re.compile(r"step-([0-9]{6,})(-replaced)?")
_SAVING, _DELETING = ".saving-", ".deleting-"


def save_checkpoint(root: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Save the checkpoint of a step: whole, or not at all if the process or the machine dies.

    An existing checkpoint of the same step is replaced.

    Args:
        root: the folder of all checkpoints; it is created.
        write: writes the files into the folder that it is called with, subfolders if it likes.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it cannot be written, as on a full disk.
        Exception: what ``write`` raises. Either way the other checkpoints are as they were.
    """
    new_folders = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f"{_SAVING}{secrets.token_hex(4)}"
    try:
        temporary.mkdir()
        write(temporary)
        write_manifest(temporary, step)
        files, folders = contents(temporary)
        for path in (*files, *folders):
            sync(path)
        target = root / checkpoint_name(step)
        _rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for folder in new_folders:
        sync(folder.parent)
    return target


def _rename(folder: Path, target: Path) -> None:
    """Give a folder its final name, and delete what had that name before."""
    replaced = target.with_name(f"{target.name}-replaced")
    if os.path.lexists(target):
        # No moment without a whole one: the new one is complete, the old one keeps a name that
        # counts until the new one has its own.
        if os.path.lexists(replaced):
            _delete(replaced)
        target.rename(replaced)
    folder.rename(target)
    sync(target.parent)
    if os.path.lexists(replaced):
        _delete(replaced)


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first by step number, whole or damaged.

    Raises:
        SimPOError: the folder cannot be read.
    """
    try:
        paths = [path for path in root.iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SimPOError(f"cannot read the checkpoints in {root}: {one_line(error)}") from None

    def age(path: Path) -> tuple[int, str]:
        match = _NAME.fullmatch(path.name)
        assert match
        return -int(match[1]), path.name  # of one step, the replaced one is second

    return sorted(paths, key=age)


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is whole, and a message for each newer one that is not.

    Raises:
        SimPOError: the folder cannot be read, or a newer version of mlx_simpo has saved into it:
            going on from an older checkpoint would lose what that version has done.
    """
    messages: list[str] = []
    for folder in list_checkpoints(root):
        try:
            verify_checkpoint(folder)
        except DamagedCheckpointError as error:
            messages.append(str(error))
        else:
            return folder, messages
    return None, messages


def delete_old(root: Path, keep: int) -> None:
    """Delete all checkpoints but the newest, and what dead runs have left half written.

    The newest whole one is among those that stay: a damaged one is never all that is left. Damaged
    ones that are newer are deleted. Without a whole one, all stay. Call this only while the run is
    locked: another process may be saving.

    Args:
        keep: how many stay, at least 1.

    Raises:
        OSError: a checkpoint cannot be renamed. What is renamed and cannot be deleted is tried
            again by the next call.
        SimPOError: as `newest_valid`.
    """
    assert keep >= 1
    for prefix in (_SAVING, _DELETING):
        for remains in root.glob(f"{prefix}*"):
            _remove(remains)
    checkpoints = list_checkpoints(root)
    if len(checkpoints) == 1:
        return  # nothing to delete: it need not be read
    newest, _ = newest_valid(root)
    if newest is None:
        return
    older = checkpoints[checkpoints.index(newest) + 1 :]
    # A replaced one beside its successor is no checkpoint of its own.
    staying = [newest, *[p for p in older if p.name != f"{newest.name}-replaced"][: keep - 1]]
    for path in checkpoints:
        if path not in staying:
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint; from the first moment on it does not count as one.

    Raises:
        OSError: it cannot be renamed.
    """
    doomed = path.with_name(f"{_DELETING}{secrets.token_hex(4)}")
    path.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Delete a folder or file as far as possible."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
