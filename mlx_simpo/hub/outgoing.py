"""Which files of a folder are sent, and how local paths in them are shortened.

What is sent is listed by name, so that a file nobody thought of is not sent.
"""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SimPOError, redacted
from ..files import PICKLES, is_inside_its_folder, read_json
from ..model.adapters import CONFIG
from ..model.record import RECORD_FILE
from .folders import (
    HF,
    MLX,
    MODEL_CONFIG,
    PEFT,
    RUN,
    Folder,
    FolderKind,
    is_local_path,
    last_path_part,
)

_LICENSE = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_MODEL = (
    MODEL_CONFIG,
    "generation_config.json",
    "model.safetensors.index.json",
    # The code of a model that comes with its own, without which it does not load.
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    RECORD_FILE,
    *_TOKENIZER,
    *_LICENSE,
)
# Sent beside the weights and README.md.
SENT_FILES: dict[FolderKind, tuple[str, ...]] = {
    RUN: (CONFIG, "chat_template.jinja", "summary.json", "metrics.jsonl", *_LICENSE),
    PEFT: (CONFIG, RECORD_FILE, *_TOKENIZER, *_LICENSE),
    HF: _MODEL,
    MLX: _MODEL,
}
# Known files that are never sent, whatever their size, and why.
NEVER_SENT = {
    ".*": "hidden",
    "quarantined.jsonl": "may hold private text",
    "config.yaml": "holds paths of this machine; the card has the settings",
    "optimizer*": "state of a training",
    "scheduler*": "state of a training",
    "scaler*": "state of a training",
    "rng_state*": "state of a training",
    "trainer_state.json": "state of a training",
    "training_args.bin": "state of a training",
    "[0-9]*_adapters.safetensors": "an earlier step",
}
# A larger file that is not listed may be one that the others need.
MAX_UNLISTED_BYTES = 10_000_000
CARD = "README.md"
# Keys under which libraries write paths of the machine; "*": any key of the file.
PATH_KEYS = {
    CONFIG: ("*",),
    RECORD_FILE: ("*",),
    "summary.json": ("*",),
    MODEL_CONFIG: ("_name_or_path",),
    "tokenizer_config.json": ("name_or_path", "*_file"),
}


class SortedFiles(NamedTuple):
    """The files of a folder. sent: without README.md. stays: (name, reason)."""

    sent: list[Path]
    stays: list[tuple[str, str]]


def sort_files(folder: Folder) -> SortedFiles:
    """Return which files are sent and which stay, each in order of their names.

    Raises:
        SimPOError: there is a pickle or a large file that is not listed, a file is a link that
            leads out of the folder, or a part of the model is missing.
    """
    patterns = (folder.kind.weights, *SENT_FILES[folder.kind])
    files = SortedFiles([], [])
    for path in sorted(folder.path.iterdir()):
        if path.name == CARD:
            check_link(path)
            continue
        reasons = (why for name, why in NEVER_SENT.items() if fnmatchcase(path.name, name))
        reason = next(reasons, "a folder" if path.is_dir() else None)
        is_listed = any(fnmatchcase(path.name, pattern) for pattern in patterns)
        if reason is None and path.is_file() and is_listed:
            check_link(path)
            files.sent.append(path)
            continue
        if reason is None:
            check_unlisted(path, folder.kind)
            reason = f"not one of the files of a {folder.kind.description}"
        files.stays.append((path.name, reason))
    check_complete(folder.path)
    return files


def check_link(path: Path) -> None:
    """Reject a link that leads out of its folder: with a folder from elsewhere, a private file.

    Raises:
        SimPOError: it does.
    """
    if not is_inside_its_folder(path):
        raise SimPOError(
            f"{path.name} is a link to {path.resolve()}, which is not in this folder; copy the "
            "file here if it is to be sent"
        )


def check_unlisted(path: Path, kind: FolderKind) -> None:
    """Reject a file that is not listed and must not stay behind unnoticed.

    Raises:
        SimPOError: it may be a pickle, or it is large.
    """
    if path.suffix.lower() in PICKLES:
        raise SimPOError(
            f"{path.name} may be a pickle, which runs code when it is read and is never sent; move "
            "it out of the folder, or save it as safetensors"
        )
    size = path.stat().st_size if path.exists() else 0  # a link may lead nowhere
    if size > MAX_UNLISTED_BYTES:
        raise SimPOError(
            f"{path.name} ({size:,} bytes) is not one of the files of a {kind.description}; move "
            "it out of the folder"
        )


def check_complete(path: Path) -> None:
    """Check that all files exist that the index of a sharded model names.

    Raises:
        SimPOError: one is missing or in another folder, or the index names none.
    """
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    weight_map = read_json(index).get("weight_map")
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    # A name with a folder in it could point at any file of this machine.
    here = {file.name for file in path.iterdir() if file.is_file()}
    if missing := sorted(names - here):
        raise SimPOError(f"{index} names {missing[0]}, which is not there; save the model again")
    if not names:
        raise SimPOError(f"{index} names no files; save the model again")


def without_paths(file: Path, folder: Folder) -> bytes | None:
    """Return a file's content with local paths cut down to their last parts and without tokens and
    passwords; None if it has none of these.

    Raises:
        SimPOError: a file that may hold paths cannot be read as JSON.
    """
    patterns = PATH_KEYS.get(file.name)
    if patterns is None:
        return None

    def cut(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {inner_key: cut(inner, str(inner_key)) for inner_key, inner in value.items()}
        if isinstance(value, list):
            return [cut(inner, key) for inner in value]
        may_be_path = any(fnmatchcase(key, pattern) for pattern in patterns)
        if may_be_path and is_path(value, folder.path):
            value = last_path_part(value)
        return redacted(value) if isinstance(value, str) else value

    content = read_json(file)
    shorter = cut(content, "")
    if shorter == content:
        return None
    return (json.dumps(shorter, indent=2, ensure_ascii=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def is_path(value: Any, folder: Path) -> bool:
    """Return whether a value is a local path of more than one part.

    Text of several lines is not, such as a chat template.
    """
    if not isinstance(value, str) or "\n" in value or not ("/" in value or "\\" in value):
        return False
    return is_local_path(value, folder)
