"""Which files of a folder go to others, which stay, and the paths that are cut out of them.

What goes is listed, so that a file nobody thought of stays.
"""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SimPOError
from ..files import PICKLES, read_json
from ..model.adapters import CONFIG
from ..model.record import RECORD_FILE
from .folders import HF, MLX, MODEL_CONFIG, PEFT, RUN, Folder, Kind, is_local, last_part

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
# Beside the weights and README.md.
GOES: dict[Kind, tuple[str, ...]] = {
    RUN: (CONFIG, "chat_template.jinja", "summary.json", "metrics.jsonl", *_LICENSE),
    PEFT: (CONFIG, RECORD_FILE, *_TOKENIZER, *_LICENSE),
    HF: _MODEL,
    MLX: _MODEL,
}
# Known files that stay, whatever their size.
STAYS = {
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
# An unknown file of more bytes may be something that the others are no use without.
UNKNOWN_BYTES = 10_000_000
CARD = "README.md"
# Settings in which libraries write down a path of the machine; "*": any text in the file.
PATHS = {
    CONFIG: ("*",),
    RECORD_FILE: ("*",),
    "summary.json": ("*",),
    MODEL_CONFIG: ("_name_or_path",),
    "tokenizer_config.json": ("name_or_path", "*_file"),
}


class Sorted(NamedTuple):
    """goes: the files that are sent, README.md not among them. stays: (name, why)."""

    goes: list[Path]
    stays: list[tuple[str, str]]


def sort_files(folder: Folder) -> Sorted:
    """What goes and what stays, in name order.

    Raises:
        SimPOError: a pickle, a large file that nobody knows, or a missing part of the model.
    """
    patterns = (folder.kind.weights, *GOES[folder.kind])
    found = Sorted([], [])
    for path in sorted(folder.path.iterdir()):
        if path.name == CARD:
            continue
        reason = next((why for name, why in STAYS.items() if fnmatchcase(path.name, name)), None)
        if reason is None and path.is_dir():
            reason = "a folder"
        if reason is None and path.is_file() and any(fnmatchcase(path.name, p) for p in patterns):
            found.goes.append(path)
            continue
        if reason is None:
            refuse_unknown(path, folder.kind)
        found.stays.append((path.name, reason or f"no file of a {folder.kind.what}"))
    check_parts(folder.path)
    return found


def refuse_unknown(path: Path, kind: Kind) -> None:
    """SimPOError for an unlisted file that must not pass unseen: a pickle, or a large one."""
    if path.suffix.lower() in PICKLES:
        raise SimPOError(
            f"{path.name} may be a pickle, which runs code when it is read and is never sent; move "
            "it out of the folder, or save it as safetensors"
        )
    size = path.stat().st_size if path.exists() else 0
    if size > UNKNOWN_BYTES:
        raise SimPOError(
            f"{path.name} ({size:,} bytes) is no file of a {kind.what}; move it out of the folder"
        )


def check_parts(path: Path) -> None:
    """SimPOError if the index of a model in several files names one that is not there."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    places = read_json(index).get("weight_map")
    named = {str(name) for name in places.values()} if isinstance(places, dict) else set()
    missing = sorted(name for name in named if not (path / name).is_file())
    if missing or not named:
        what = f"{missing[0]}, which is not there" if missing else "no files"
        raise SimPOError(f"{index} names {what}; save the model again")


def without_paths(file: Path, folder: Folder) -> bytes | None:
    """The file's content with local paths cut down to their last parts; None if it has none.

    Raises:
        SimPOError: a file that may hold paths is not readable as JSON.
    """
    settings = PATHS.get(file.name)
    if settings is None:
        return None

    def cut(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: cut(inner, str(key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [cut(inner, name) for inner in value]
        named = any(fnmatchcase(name, pattern) for pattern in settings)
        return last_part(value) if named and is_path(value, folder.path) else value

    content = read_json(file)
    shorter = cut(content, "")
    if shorter == content:
        return None
    return (json.dumps(shorter, indent=2, ensure_ascii=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def is_path(value: Any, folder: Path) -> bool:
    """Whether a setting's value is a local path of more than one part (and no text of several
    lines, such as a chat template)."""
    if not isinstance(value, str) or "\n" in value or not ("/" in value or "\\" in value):
        return False
    return is_local(value, folder)
