"""A checkpoint's manifest: size and SHA-256 of every file, so that any damage is noticed.

manifest.json holds the format's version, the step, and ``files``: [size, SHA-256] by name relative
to the checkpoint. Its own ``sha256`` is that of everything else in it. All formats to come keep
this last rule, so that damage and a newer version can be told apart.
"""

import hashlib
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import SimPOError, one_line

FORMAT = 1
MANIFEST = "manifest.json"
# What the Finder and file systems put into folders by themselves: a look at a checkpoint must not
# damage it.
_NOT_OURS = re.compile(r"\.DS_Store|\._.*|\.nfs.*|Thumbs\.db|desktop\.ini")


class DamagedCheckpointError(SimPOError):
    """A checkpoint is not as it was saved."""

    def __init__(self, folder: Path, problem: str) -> None:
        super().__init__(
            f"the checkpoint {folder} is damaged: {problem}; go on from another one, or copy it "
            "again from where it is whole"
        )


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"step-{step:06d}"


def write_manifest(folder: Path, step: int) -> None:
    """Write the manifest of a folder that holds all other files of a step's checkpoint.

    Raises:
        OSError: a file cannot be read or written.
        DamagedCheckpointError: something in the folder is neither a regular file nor a folder.
    """
    files, _ = contents(folder)
    assert folder / MANIFEST not in files
    entries = {_relative(path, folder): [path.stat().st_size, _sha256(path)] for path in files}
    raw = _encode({"format": FORMAT, "step": step, "files": entries})
    (folder / MANIFEST).write_bytes(raw)


def contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return all files below a folder, and all folders, each after those in it, itself last.

    Raises:
        OSError: a folder cannot be read.
        DamagedCheckpointError: something is neither a regular file nor a folder.
    """
    files: list[Path] = []
    folders = [folder]
    for current in folders:  # grows on the way: no recursion, as folders may be nested deeply
        for path in sorted(current.iterdir()):
            if _NOT_OURS.fullmatch(path.name):
                continue
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                problem = f"{_relative(path, folder)!r} is not a regular file"
                raise DamagedCheckpointError(folder, problem)
            (folders if path.is_dir() else files).append(path)
    return files, folders[::-1]


def verify_checkpoint(folder: Path) -> None:
    """Check that a checkpoint is, bit for bit, as it was saved.

    Raises:
        DamagedCheckpointError: a file is missing, has changed, cannot be read, is not a regular
            file or does not belong to it.
        SimPOError: a newer version of mlx_simpo has saved it.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise DamagedCheckpointError(folder, "it is not a folder")
    try:
        files = {_relative(path, folder): path for path in contents(folder)[0]}
        if MANIFEST not in files:
            raise DamagedCheckpointError(folder, f"{MANIFEST} is missing")
        expected = _read_manifest(folder, files.pop(MANIFEST))
        if missing := sorted(expected.keys() - files.keys()):
            raise DamagedCheckpointError(folder, f"{missing[0]!r} is missing")
        if extra := sorted(files.keys() - expected.keys()):
            raise DamagedCheckpointError(folder, f"{extra[0]!r} does not belong to it")
        for name, path in files.items():
            size, digest = expected[name]
            actual_size = path.stat().st_size
            if actual_size != size:
                problem = f"{name!r} has {actual_size:,} bytes and must have {size:,}"
                raise DamagedCheckpointError(folder, problem)
            if _sha256(path) != digest:
                raise DamagedCheckpointError(folder, f"the content of {name!r} has changed")
    except OSError as error:
        raise DamagedCheckpointError(folder, one_line(error)) from None


def _read_manifest(folder: Path, path: Path) -> dict[str, tuple[int, str]]:
    """Return the size and SHA-256 of each file by name.

    Raises:
        OSError, DamagedCheckpointError, SimPOError: as `verify_checkpoint`.
    """
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError):  # RecursionError: deeply nested brackets
        manifest = None
    if not isinstance(manifest, dict) or _encode(manifest) != raw:
        raise DamagedCheckpointError(folder, f"the content of {MANIFEST} has changed")
    try:
        if (version := int(manifest["format"])) > FORMAT:
            raise SimPOError(
                f"the checkpoint {folder} has format {version}, and this version of mlx_simpo "
                f"reads {FORMAT}; install the version that saved it, or a newer one"
            )
        if version != FORMAT:
            raise ValueError(f"format {version}")
        expected = {name: (int(size), str(sha)) for name, (size, sha) in manifest["files"].items()}
        name = checkpoint_name(int(manifest["step"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedCheckpointError(folder, f"{MANIFEST} lacks values ({error!r})") from None
    if folder.name not in (name, f"{name}-replaced"):
        raise DamagedCheckpointError(folder, f"it is that of {name}")
    for name in expected:
        if os.path.isabs(name) or ".." in PurePosixPath(name).parts:
            raise DamagedCheckpointError(folder, f"{MANIFEST} names {name!r}, which is outside")
    return expected


def _encode(manifest: dict[str, Any]) -> bytes:
    """Return a manifest as bytes, with the SHA-256 of what else is in it."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**rest, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
