"""Tokens that are kept: a folder a key under the user's cache, complete or not there at all.

A folder is written under another name and renamed when it is whole, so that neither an interrupted
run nor a second one at the same time leaves anything that is taken for complete. manifest.json
tells the hash of each file and what was left out; a folder that disagrees with it is made anew.
"""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import SimPOError, one_line
from ..paths import cache_folder
from .encode import Encoder
from .keys import NoKeyError, digest, file_sha256, token_key
from .pairs import Quarantined
from .sources import Source
from .tokenize import write_tokens
from .tokens import FILES, TokenizedPairs

MANIFEST = "manifest.json"
UNFINISHED = "unfinished-"
DAY = 24 * 60 * 60
# Folders that no run has used for so long are deleted by the next run that makes one.
KEPT_DAYS = 30
# A context whose value is told the rows done, for so many in all.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@dataclass
class Tokenized:
    """A source as tokens, what is left out of it, and what to tell the user."""

    pairs: TokenizedPairs
    quarantined: list[Quarantined]
    note: str
    warnings: list[str] = field(default_factory=list)


class DamagedError(Exception):
    """What is wrong with a folder of the cache."""


def tokens_folder() -> Path:
    """Where tokens are kept: in $MLX_SIMPO_CACHE, or mlx_simpo under the user's cache."""
    return cache_folder() / "tokens"


def tokenized(encoder: Encoder, source: Source, progress: Progress) -> Tokenized:
    """The source's pairs as tokens: those that were kept, or made now and kept.

    Raises:
        SimPOError: the source cannot be read or encoded, it changes meanwhile, or there is no room.
    """
    root, key, note = tokens_folder(), None, ""
    before, warnings = stamps(source), []
    try:
        key = token_key(encoder, source)
    except NoKeyError as reason:
        note = f"tokens are not kept for the next run: {reason}"
    except OSError as error:
        raise SimPOError(f"cannot read {source.name}: {error}") from None
    try:
        root.mkdir(parents=True, exist_ok=True)
        if key is not None and (root / key).exists():
            try:
                return read_folder(root / key)
            except DamagedError as problem:
                warnings.append(f"the tokens kept in {root / key} are made anew: {problem}")
                remove(root / key)
        sweep(root)
        made = make(encoder, source, root, key, progress)
    except OSError as error:
        raise SimPOError(
            f"cannot keep tokens in {root}: {error}; make room there, or name another folder in "
            "the environment variable MLX_SIMPO_CACHE"
        ) from None
    if stamps(source) != before:
        if key is not None:
            remove(root / key)
        raise SimPOError(f"{source.name} was changed while it was read; start again")
    return replace(made, note=made.note or note, warnings=warnings)


def make(
    encoder: Encoder, source: Source, root: Path, key: str | None, progress: Progress
) -> Tokenized:
    """Tokenize into a new folder, which stays as ``root/key`` if there is a key."""
    scratch = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=root))
    try:
        with progress(source.count()) as advance:
            count, quarantined = write_tokens(scratch, encoder, source.rows(), advance)
        write_manifest(scratch, source.name, quarantined)
        # What is mapped stays readable whatever becomes of the files' names.
        made = Tokenized(TokenizedPairs(scratch), quarantined, "")
        if key is None or not count:
            return made
        size = megabytes([scratch])
        publish(scratch, root / key)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    made.note = (
        f"tokens are kept for the next run in {root / key} ({size}; {megabytes(root.iterdir())} in "
        f"all, of which goes what no run uses for {KEPT_DAYS} days)"
    )
    return made


def publish(scratch: Path, folder: Path) -> None:
    """Give a finished folder its name, unless another run was faster."""
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def write_manifest(folder: Path, name: str, quarantined: Iterable[Quarantined]) -> None:
    """Size and hash of every file, so that a damaged folder is known as one."""
    body = {
        "data": name,
        "files": {f: [(folder / f).stat().st_size, file_sha256(folder / f)] for f in FILES},
        "quarantined": list(quarantined),
    }
    text = json.dumps(body)  # in ASCII: a detail may quote what is no text
    (folder / MANIFEST).write_text(f"{digest(text.encode())}\n{text}\n", encoding="ascii")


def read_folder(folder: Path) -> Tokenized:
    """What is kept in a folder, looked through from the first byte to the last.

    Raises:
        DamagedError: it is not as it was written.
    """
    try:
        checksum, text = (folder / MANIFEST).read_text("ascii").splitlines()
        if digest(text.encode()) != checksum:
            raise DamagedError(f"{MANIFEST} is not as it was written")
        body = json.loads(text)
        for name, (size, sha256) in body["files"].items():
            found = (folder / name).stat().st_size
            if found != size:
                raise DamagedError(f"{name} has {found} bytes instead of {size}")
            if file_sha256(folder / name) != sha256:
                raise DamagedError(f"{name} is not as it was written")
        pairs = TokenizedPairs(folder)
        os.utime(folder / MANIFEST)  # used now, says `sweep`
    except (OSError, ValueError) as error:
        raise DamagedError(one_line(error)) from None
    quarantined = [Quarantined(*entry) for entry in body["quarantined"]]
    return Tokenized(pairs, quarantined, f"tokens are those kept in {folder}")


def sweep(root: Path) -> None:
    """Delete what no run has used for long, and what runs that were killed have left."""
    for folder in root.iterdir():
        if re.fullmatch("[0-9a-f]{32}", folder.name):
            kept = KEPT_DAYS * DAY
        elif folder.name.startswith(UNFINISHED):
            kept = DAY
        else:
            continue
        newest = max((found.st_mtime for found in contents(folder)), default=time.time())
        if time.time() - newest > kept:
            remove(folder)


def contents(folder: Path) -> list[os.stat_result]:
    """Of a folder and its files: what there is, while other runs rename and delete theirs."""
    try:
        with os.scandir(folder) as entries:
            return [folder.stat(), *(entry.stat() for entry in entries)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove(folder: Path) -> None:
    """Delete a folder, out of sight first: no run finds half of it."""
    gone = folder.with_name(f"{UNFINISHED}{folder.name[-32:]}-{os.getpid()}")
    try:
        folder.rename(gone)
    except FileNotFoundError:  # another run was faster
        return
    shutil.rmtree(gone, ignore_errors=True)


def stamps(source: Source) -> list[tuple[int, int]]:
    """Size and time of change of the source's files.

    Raises:
        SimPOError: one is gone.
    """
    try:
        found = [path.stat() for path in source.files]
    except OSError as error:
        raise SimPOError(f"cannot read {source.name}: {error}") from None
    return [(stat.st_size, stat.st_mtime_ns) for stat in found]


def megabytes(folders: Iterable[Path]) -> str:
    """What the files in these folders take, in MB."""
    total = sum(found.st_size for folder in folders for found in contents(folder)[1:])
    return f"{total / 1e6:.1f} MB"
