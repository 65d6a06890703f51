"""Read and write files that come from elsewhere: checked before MLX or mlx-lm reads them."""

import errno
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .errors import SimPOError, one_line

# What safetensors allows and MLX does not survive: arrays of many axes end the process when NumPy
# reads them (255 in MLX 0.32), and a size of more than 32 bits wraps around.
_MAX_AXES = 16
_MAX_AXIS_SIZE = 2**31 - 1
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
MODEL_WEIGHTS = "model*.safetensors"
# What a file system says that cannot do what was asked for, rather than that it failed.
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOTTY, errno.ENOSYS}


class Header(NamedTuple):
    """The header of a safetensors file.

    shapes: by tensor name. format: as the file's metadata has it, "pt" or "mlx"; "" if it has none.
    """

    shapes: dict[str, tuple[int, ...]]
    format: str


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and check it against the file's size.

    The format: https://github.com/huggingface/safetensors#format.

    Raises:
        SimPOError: the file is missing, unreadable, truncated or not safetensors, or it has a shape
            that MLX cannot hold.
    """
    try:
        # NumPy has no bfloat16 or 8-bit floats: the shapes are read, the data is not touched.
        with safe_open(require_regular_file(path), framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except OSError as error:
        raise SimPOError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise SimPOError(
            f"{path} is not a valid safetensors file ({' '.join(reason.split())[:200]}); it may be "
            "damaged or cut off: download or save it again"
        ) from None
    for name, shape in shapes.items():
        if len(shape) > _MAX_AXES or max(shape, default=0) > _MAX_AXIS_SIZE:
            raise SimPOError(
                f"{path}: tensor {name[:80]!r} has {len(shape)} axes, the longest of "
                f"{max(shape):,} entries; MLX reads at most {_MAX_AXES} axes of "
                f"{_MAX_AXIS_SIZE:,} entries: save the file again without this tensor"
            )
    return Header(shapes, metadata.get("format", ""))


def load_safetensors(paths: Sequence[Path]) -> dict[str, mx.array]:
    """Load all tensors of these files; each is read from disk when it is first used.

    Raises:
        SimPOError: a file that `read_header` rejects or MLX cannot read, or two files with a tensor
            of the same name.
    """
    tensors: dict[str, mx.array] = {}
    for path in paths:
        read_header(path)
        try:
            content = mx.load(str(path))
        except (RuntimeError, ValueError) as error:
            raise SimPOError(f"MLX cannot read {path}: {error}") from None
        assert isinstance(content, dict)
        if duplicates := tensors.keys() & content.keys():
            raise SimPOError(
                f"{path.parent} has the tensor {min(duplicates)} in two files; it must be in one: "
                "save the model again"
            )
        tensors |= content
    return tensors


def save_safetensors(path: Path, tensors: dict[str, mx.array], form: str) -> None:
    """Write tensors to a safetensors file.

    Args:
        form: the format that the file's metadata names, "pt" or "mlx".

    Raises:
        OSError: the file cannot be written.
    """
    try:
        mx.save_safetensors(str(path), tensors, {"format": form})
    except (RuntimeError, ValueError) as error:  # MLX's own, of a full disk for example
        raise OSError(str(error)) from None


def require_regular_file(path: Path) -> Path:
    """Return the path if a regular file is there.

    Opening a pipe would wait forever, and reading a device may never end.

    Raises:
        OSError: nothing is there, or a folder, pipe or device.
    """
    if not path.is_file():
        raise OSError("it is not a regular file" if path.exists() else "there is no such file")
    return path


def is_inside_its_folder(path: Path) -> bool:
    """Return whether a file of a model or adapter, with links followed, is inside that folder.

    A link that leads elsewhere could copy any file of the user's into what is published.
    """
    root = path.parent.resolve()
    # In huggingface_hub's cache, snapshots/<commit>/<file> is a link to blobs/<hash>.
    root = root.parents[1] if root.parent.name == "snapshots" else root
    return path.resolve().is_relative_to(root)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder: those that mlx-lm loads, sorted by name.

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
            "never loaded; save the model as safetensors on a machine where you trust it"
        )
    raise SimPOError(
        f"{folder} holds no {MODEL_WEIGHTS}; it must be the folder of a model with its weights"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        SimPOError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(require_regular_file(path).read_text(encoding="utf-8"))
    # json raises RecursionError at deeply nested brackets.
    except (OSError, ValueError, RecursionError) as error:
        raise SimPOError(f"cannot read {path}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise SimPOError(f"{path} must hold a JSON object, not {str(content)[:40]}")
    return content


def write_text(path: Path, text: str, *, append: bool = False) -> None:
    """Write text as UTF-8.

    Half a surrogate pair, and bytes of a file name that are not UTF-8, become backslash escapes:
    they come from other people's data and must not end a run.

    Raises:
        SimPOError: the file cannot be written.
    """
    try:
        with path.open("a" if append else "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise SimPOError(f"cannot write {path}: {error}") from None


def sync(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on the disk itself.

    Raises:
        OSError: it cannot be written there; what the file holds after a power cut is unknown.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            # macOS: fsync alone leaves the data in the drive's own cache, which loses power, too.
            fcntl.fcntl(descriptor, getattr(fcntl, "F_FULLFSYNC"))  # noqa: B009
            return
        except AttributeError:
            pass  # not macOS
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems sync files and reject folders; there is nothing else to do.
            if error.errno not in _NOT_SUPPORTED or not path.is_dir():
                raise
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that a crash or a power cut leaves the old content or the new one, whole.

    The content is first in ``.NAME.writing`` beside the file, which a killed process leaves behind
    and the next call overwrites. Only one process may write a file at a time.

    Raises:
        OSError: the file cannot be written; the old one is as it was.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
