"""Files as they come from elsewhere: looked at before anything else reads them."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from .errors import SimPOError, one_line

# https://github.com/huggingface/safetensors: 8 bytes of header length, the header (JSON), the data.
_MAX_HEADER = 100_000_000
_MAX_AXES = 16
_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
MODEL_WEIGHTS = "model*.safetensors"


class Header(NamedTuple):
    """Of one file. shapes: by tensor; format: "pt", "mlx" or "" as the file says."""

    shapes: dict[str, tuple[int, ...]]
    format: str


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's size.

    Raises:
        SimPOError: no such file, no safetensors, truncated, or sizes that contradict each other.
    """

    def refuse(reason: str) -> SimPOError:
        return SimPOError(f"{path} is no sound safetensors file: {reason}; fetch or save it again")

    try:
        size = ordinary(path).stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise refuse(f"its header claims {length} bytes, the file has {size}")
            content = json.loads(file.read(length))
    except OSError as error:
        raise SimPOError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise refuse("its header is not JSON") from None
    if not isinstance(content, dict):
        raise refuse("its header is no table of tensors")
    metadata = content.pop("__metadata__", None) or {}
    shapes: dict[str, tuple[int, ...]] = {}
    spans = []
    for name, entry in content.items():
        shape, begin, end = tensor_entry(entry)
        if shape is None:
            raise refuse(f"the entry of {name[:80]!r} makes no sense")
        shapes[name] = shape
        spans.append((begin, end))
    spans.sort()
    if any(a[1] > b[0] for a, b in pairwise(spans)):
        raise refuse("tensors overlap")
    if spans and spans[-1][1] != size - 8 - length:
        raise refuse(f"its tensors need {spans[-1][1]} bytes, it holds {size - 8 - length}")
    return Header(shapes, str(metadata.get("format", "")) if isinstance(metadata, dict) else "")


def tensor_entry(entry: Any) -> tuple[tuple[int, ...] | None, int, int]:
    """(shape, begin, end) of one tensor of the header; shape is None if it contradicts itself."""
    table = entry if isinstance(entry, dict) else {}
    shape, span = whole_numbers(table.get("shape")), whole_numbers(table.get("data_offsets"))
    size = _BYTES.get(str(table.get("dtype")))
    if shape is None or span is None or size is None or len(span) != 2 or len(shape) > _MAX_AXES:
        return None, 0, 0
    if span[1] - span[0] != size * math.prod(shape):
        return None, 0, 0
    return tuple(shape), span[0], span[1]


def whole_numbers(values: Any) -> list[int] | None:
    """The list if it is one of whole numbers from 0 on."""
    good = isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
    return values if good else None


def load_safetensors(paths: Sequence[Path]) -> dict[str, mx.array]:
    """All tensors of these files, read from disk when first used.

    Raises:
        SimPOError: as `read_header`; a file that MLX cannot read; a name in two files.
    """
    tensors: dict[str, mx.array] = {}
    for path in paths:
        read_header(path)
        try:
            content = mx.load(str(path))
        except (RuntimeError, ValueError) as error:
            raise SimPOError(f"MLX cannot read {path}: {error}") from None
        assert isinstance(content, dict)
        if twice := tensors.keys() & content.keys():
            raise SimPOError(f"{min(twice)} is in two files of {path.parent}")
        tensors |= content
    return tensors


def save_safetensors(path: Path, tensors: dict[str, mx.array], form: str) -> None:
    """Write tensors, with what the file is to say of its format ("pt" or "mlx").

    Raises:
        OSError: the file cannot be written.
    """
    try:
        mx.save_safetensors(str(path), tensors, {"format": form})
    except (RuntimeError, ValueError) as error:  # MLX's own: of a full disk, say
        raise OSError(str(error)) from None


def ordinary(path: Path) -> Path:
    """The path if it is a file; OSError if not: a pipe would be waited for."""
    if path.exists() and not path.is_file():
        raise OSError(0, "it is no ordinary file")
    return path


def weight_files(folder: Path) -> list[Path]:
    """A model folder's weights, as mlx-lm finds them.

    Raises:
        SimPOError: there are none, or only pickles, which are never loaded.
    """
    files = sorted(folder.glob(MODEL_WEIGHTS))
    if files:
        return files
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix.lower() in PICKLES)
    if pickles:
        raise SimPOError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run any code and is "
            "never loaded; save the model as safetensors where you trust it"
        )
    raise SimPOError(f"{folder} holds no {MODEL_WEIGHTS}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        SimPOError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(ordinary(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SimPOError(f"cannot read {path}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise SimPOError(f"{path} must hold a JSON object, not {str(content)[:40]}")
    return content


def write_text(path: Path, text: str, *, append: bool = False) -> None:
    """Text as UTF-8; what is no text (half an emoji, a file name of other bytes) as \\u escapes.

    Raises:
        SimPOError: it cannot be written.
    """
    try:
        with path.open("a" if append else "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise SimPOError(f"cannot write {path}: {error}") from None
