"""The token cache: one folder per key under the user's cache, complete or not there at all.

A folder is written under a temporary name and renamed when it is complete. So neither an
interrupted run nor two runs at once leave anything that could be mistaken for complete.
manifest.json holds the hash of each file and the quarantined records; a folder that does not match
its manifest is rebuilt.
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
from typing import Any

from ..errors import SimPOError, one_line
from ..paths import cache_folder
from .encode import Encoder
from .keys import NotCacheableError, file_sha256, short_sha256, token_key
from .pairs import Quarantined
from .rows import Source
from .tokenize import write_tokens
from .tokens import FILES, TokenizedPairs

MANIFEST = "manifest.json"
UNFINISHED_PREFIX = "unfinished-"
SECONDS_PER_DAY = 24 * 60 * 60
# A run that adds a folder to the cache deletes those that no run has used for this long.
MAX_UNUSED_DAYS = 30
# Called with the number of rows; the context's value is called with the rows done since last time.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@dataclass
class TokenizedSource:
    """The pairs of a source as tokens, its quarantined records, and messages for the user."""

    pairs: TokenizedPairs
    quarantined: list[Quarantined]
    note: str
    warnings: list[str] = field(default_factory=list)


class DamagedCacheError(Exception):
    """A folder of the cache is not as it was written; the message says what is wrong."""


def token_cache_folder() -> Path:
    """Return the folder of the token cache: $MLX_SIMPO_CACHE/tokens, or in the user's cache."""
    return cache_folder() / "tokens"


def load_or_tokenize(encoder: Encoder, source: Source, progress: Progress) -> TokenizedSource:
    """Load the source's tokens from the cache, or tokenize it and cache the result.

    Raises:
        SimPOError: the source cannot be read or encoded, or changes meanwhile; or the cache cannot
            be written.
    """
    root, key, note = token_cache_folder(), None, ""
    sizes_and_times, warnings = _sizes_and_times(source), []
    try:
        key = token_key(encoder, source)
    except NotCacheableError as reason:
        note = f"tokens are not cached for the next run: {reason}"
    except OSError as error:
        raise SimPOError(f"cannot read {source.name}: {error}") from None
    try:
        root.mkdir(parents=True, exist_ok=True)
        if key is not None and (root / key).exists():
            try:
                return load_folder(root / key)
            except DamagedCacheError as error:
                warnings.append(
                    f"the cached tokens in {root / key} are damaged ({error}); tokenizing again"
                )
                delete_folder(root / key)
        delete_unused(root)
        result = _tokenize(encoder, source, root, key, progress)
    except OSError as error:
        raise SimPOError(
            f"cannot write tokens to {root}: {error}; free some space there, or set the "
            "environment variable MLX_SIMPO_CACHE to another folder"
        ) from None
    # The key was computed before the rows were read: it must not name the tokens of other content.
    if _sizes_and_times(source) != sizes_and_times:
        if key is not None:
            delete_folder(root / key)
        raise SimPOError(f"{source.name} changed while it was being read; start again")
    return replace(result, note=result.note or note, warnings=warnings)


def _tokenize(
    encoder: Encoder, source: Source, root: Path, key: str | None, progress: Progress
) -> TokenizedSource:
    """Tokenize into a temporary folder, which becomes ``root/key`` if there is a key."""
    scratch = Path(tempfile.mkdtemp(prefix=UNFINISHED_PREFIX, dir=root))
    try:
        with progress(source.count()) as advance:
            count, quarantined = write_tokens(scratch, encoder, source.rows(), advance)
        write_manifest(scratch, source.name, quarantined)
        # Mapped files stay readable after they are renamed, and even after they are deleted.
        result = TokenizedSource(TokenizedPairs(scratch), quarantined, "")
        if key is None or not count:
            return result
        size = _format_size([scratch])
        _publish(scratch, root / key)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    result.note = (
        f"tokens are cached for the next run in {root / key} ({size}; the whole cache: "
        f"{_format_size(root.iterdir())}; tokens that no run uses for {MAX_UNUSED_DAYS} days are "
        "deleted)"
    )
    return result


def _publish(scratch: Path, folder: Path) -> None:
    """Rename a complete folder, unless another run has published the same tokens first."""
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def write_manifest(folder: Path, name: str, quarantined: Iterable[Quarantined]) -> None:
    """Record the quarantined records, and size and hash of every file, to notice damage."""
    content = {
        "data": name,
        "files": {f: [(folder / f).stat().st_size, file_sha256(folder / f)] for f in FILES},
        "quarantined": list(quarantined),
    }
    text = json.dumps(content)  # ASCII: details may quote text that cannot be encoded
    (folder / MANIFEST).write_text(f"{short_sha256(text.encode())}\n{text}\n", encoding="ascii")


def load_folder(folder: Path) -> TokenizedSource:
    """Load a folder of the cache, comparing every file with its hash.

    Raises:
        DamagedCacheError: it is not as it was written.
    """
    try:
        checksum, text = (folder / MANIFEST).read_text("ascii").splitlines()
        if short_sha256(text.encode()) != checksum:
            raise DamagedCacheError(f"{MANIFEST} does not match its hash")
        content = json.loads(text)
        if not is_manifest(content):
            raise DamagedCacheError(f"{MANIFEST} is not as this version writes it")
        for name, (size, sha256) in content["files"].items():
            actual_size = (folder / name).stat().st_size
            if actual_size != size:
                raise DamagedCacheError(f"{name} has {actual_size} bytes instead of {size}")
            if file_sha256(folder / name) != sha256:
                raise DamagedCacheError(f"{name} does not match its hash")
        pairs = TokenizedPairs(folder)
        os.utime(folder / MANIFEST)  # the time of last use, for `delete_unused`
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCacheError(one_line(error)) from None
    quarantined = [Quarantined(*entry) for entry in content["quarantined"]]
    return TokenizedSource(pairs, quarantined, f"tokens are loaded from the cache in {folder}")


def is_manifest(content: Any) -> bool:
    """Return whether a value has the form that `write_manifest` writes, and names FILES alone."""
    if not isinstance(content, dict):
        return False
    files, quarantined = content.get("files"), content.get("quarantined")
    if not (isinstance(files, dict) and isinstance(quarantined, list)):
        return False
    return sorted(files) == sorted(FILES) and all(
        isinstance(entry, list) and [type(value) for value in entry] == types
        for entries, types in ((files.values(), [int, str]), (quarantined, [str, str, str]))
        for entry in entries
    )


def delete_unused(root: Path) -> None:
    """Delete folders of the cache not used for MAX_UNUSED_DAYS, and remains of killed runs."""
    for folder in root.iterdir():
        if re.fullmatch("[0-9a-f]{32}", folder.name):
            max_days = MAX_UNUSED_DAYS
        elif folder.name.startswith(UNFINISHED_PREFIX):
            max_days = 1
        else:  # not ours
            continue
        last_use = max((stat.st_mtime for stat in _stat_folder(folder)), default=time.time())
        if time.time() - last_use > max_days * SECONDS_PER_DAY:
            delete_folder(folder)


def _stat_folder(folder: Path) -> list[os.stat_result]:
    """Return stat of a folder and its files; [] if another run has just deleted or renamed it."""
    try:
        with os.scandir(folder) as entries:
            return [folder.stat(), *(entry.stat() for entry in entries)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def delete_folder(folder: Path) -> None:
    """Delete a folder of the cache so that no other run ever sees half of it."""
    renamed = folder.with_name(f"{UNFINISHED_PREFIX}{folder.name[-32:]}-{os.getpid()}")
    try:
        folder.rename(renamed)
    except FileNotFoundError:  # another run was faster
        return
    shutil.rmtree(renamed, ignore_errors=True)


def _sizes_and_times(source: Source) -> list[tuple[int, int]]:
    """Return size and modification time of the source's files; SimPOError if one is gone."""
    try:
        stats = [path.stat() for path in source.files]
    except OSError as error:
        raise SimPOError(f"cannot read {source.name}: {error}") from None
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _format_size(folders: Iterable[Path]) -> str:
    """Return the total size of the files in these folders, in MB."""
    total = sum(stat.st_size for folder in folders for stat in _stat_folder(folder)[1:])
    return f"{total / 1e6:.1f} MB"
