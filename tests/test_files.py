"""Files from elsewhere: damaged ones are named in one message, valid ones are read exactly."""

import errno
import fcntl
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import faults
from helpers.faults import KILLED, Forks, cut_power
from helpers.memory import memory_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import files
from mlx_simpo.errors import SimPOError
from mlx_simpo.files import (
    is_inside_its_folder,
    load_safetensors,
    read_header,
    read_json,
    save_safetensors,
    sync,
    weight_files,
    write_durably,
    write_text,
)

needs_faults = pytest.mark.skipif(faults.missing() is not None, reason=faults.missing() or "")

DATA = bytes(range(24)) + bytes(12)
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [6], "data_offsets": [24, 36]},
}


def safetensors_bytes(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    """A safetensors file; ``length``: the header length that it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def with_entry(name: str = "a", **changes: Any) -> bytes:
    """The valid file with one tensor's entry changed."""
    return safetensors_bytes(HEADER | {name: HEADER.get(name, {}) | changes})


def tensor(dtype: str, shape: list[int], num_bytes: int) -> bytes:
    """A file of a single tensor."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]}
    return safetensors_bytes({"x": entry}, bytes(num_bytes))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


DAMAGED = {
    "empty": b"",
    "shorter than a header length": bytes(7),
    "header of no bytes": bytes(8),
    "header longer than the file": safetensors_bytes(HEADER, length=2**63),
    "header length of all ones": safetensors_bytes(HEADER, length=2**64 - 1),
    "header longer by one": safetensors_bytes(HEADER, length=len(json.dumps(HEADER)) + 1),
    "header shorter by one": safetensors_bytes(HEADER, length=len(json.dumps(HEADER)) - 1),
    "not JSON": safetensors_bytes(b"{{{{"),
    "not UTF-8": safetensors_bytes(b"\xff\xfe\xfd"),
    "UTF-16": safetensors_bytes(json.dumps(HEADER).encode("utf-16")),
    "100,000 brackets": safetensors_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "header a list": safetensors_bytes([]),
    "header a number": safetensors_bytes(5),
    "entry a number": safetensors_bytes(HEADER | {"a": 5}),
    "metadata not text": safetensors_bytes(HEADER | {"__metadata__": {"format": 1}}),
    "metadata a list": safetensors_bytes(HEADER | {"__metadata__": []}),
    "data without tensors": safetensors_bytes({}),
    "one byte missing": safetensors_bytes(HEADER, DATA[:-1]),
    "one byte too many": safetensors_bytes(HEADER, DATA + b"x"),
    "overlap": with_entry("b", data_offsets=[20, 32]),
    "the same bytes twice": safetensors_bytes(HEADER | {"c": HEADER["a"]}),
    "gap": safetensors_bytes(
        HEADER | {"b": HEADER["b"] | {"data_offsets": [28, 40]}}, DATA + bytes(4)
    ),
    "gap at the start": safetensors_bytes({"b": HEADER["b"]}),
    "negative offset": with_entry(data_offsets=[-24, 0]),
    "offset over 64 bits": with_entry(data_offsets=[0, 2**70]),
    "offset a float": with_entry(data_offsets=[0.0, 24.0]),
    "offsets reversed": with_entry(data_offsets=[24, 0]),
    "one offset": with_entry(data_offsets=[0]),
    "no offsets": safetensors_bytes(HEADER | {"a": {"dtype": "F32", "shape": [2, 3]}}),
    "shape of other bytes": with_entry(shape=[3, 5]),
    "negative shape": with_entry(shape=[-2, -3]),
    "NaN in the shape": with_entry(shape=[float("nan")]),
    "shape over 64 bits": safetensors_bytes(
        {"x": {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}}, b""
    ),
    "shape whose product overflows": safetensors_bytes(
        {"x": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 0]}}, b""
    ),
    "unknown dtype": with_entry(dtype="F33"),
    "dtype of another size": with_entry(dtype="F8_E5M2"),
    "dtype null": with_entry(dtype=None),
    "dtype a list": with_entry(dtype=["F32"]),
    "half a surrogate pair as name": safetensors_bytes(HEADER | {"\ud800": HEADER["a"]}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_safetensors_file_is_named_with_reason_and_remedy(
    damage: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "w.safetensors", DAMAGED[damage])
    message = rf"{re.escape(str(path))} is not a valid safetensors file \(.+\); .* save it again$"
    for read in (read_header, lambda path: load_safetensors([path])):
        with pytest.raises(SimPOError, match=message) as error:
            read(path)
        assert len(str(error.value)) < 400 + len(str(path))
        assert "\n" not in str(error.value)


def test_a_file_truncated_at_any_byte_is_rejected(tmp_path: Path) -> None:
    whole = safetensors_bytes(HEADER)
    for length in range(len(whole)):
        path = write(tmp_path / "cut", whole[:length])
        with pytest.raises(SimPOError, match="not a valid safetensors file"):
            read_header(path)


def tensor_bytes(content: bytes) -> dict[str, bytes]:
    """The bytes of each tensor of a safetensors file, by the format's definition alone."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {name: data[slice(*entry["data_offsets"])] for name, entry in entries.items()}


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(position=st.integers(0, 900), byte=st.integers(0, 255))
def test_a_file_with_any_byte_changed_is_read_exactly_or_rejected(position: int, byte: int) -> None:
    weights = {f"layers.{n}.{k}": mx.ones((n + 2, 3)) for n in range(4) for k in "ab"}
    path = Path(os.environ["MLX_SIMPO_CACHE"]) / "changed.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), weights, {"format": "pt"})
    valid = path.read_bytes()
    changed = bytearray(valid)
    changed[position % len(valid)] = byte
    path.write_bytes(changed)
    in_data = position % len(valid) >= len(valid) - sum(w.nbytes for w in weights.values())
    try:
        tensors = load_safetensors([path])
    except SimPOError as error:
        message = str(error)
        assert "changed.safetensors" in message
        assert not in_data, "the data may be any bytes"
        assert changed != valid, "the file was not changed"
    else:
        expected = tensor_bytes(bytes(changed))
        assert {name: np.array(t).tobytes() for name, t in tensors.items()} == expected


@pytest.mark.parametrize(
    "shape", [[1] * 17, [1] * 5000, [0, 2**31], [2**63, 0]], ids=lambda s: f"{len(s)} axes"
)
def test_shapes_that_mlx_cannot_hold_are_rejected(shape: list[int], tmp_path: Path) -> None:
    """safetensors accepts them; MLX ends the process at 255 axes and reads a size of 2**32 as 0."""
    size = 4 if 0 not in shape else 0
    path = write(tmp_path / "w.safetensors", tensor("F32", shape, size))
    with pytest.raises(SimPOError, match=r"tensor 'x' has .* axes.*; MLX reads at most 16 axes"):
        read_header(path)


@pytest.mark.parametrize(
    ("dtype", "num_bytes"),
    [
        *(("BOOL", 6), ("U8", 6), ("I8", 6), ("F8_E4M3", 6), ("F8_E5M2", 6), ("F8_E8M0", 6)),
        *(("U16", 12), ("I16", 12), ("F16", 12), ("BF16", 12), ("U32", 24), ("I32", 24)),
        *(("F32", 24), ("U64", 48), ("I64", 48), ("F64", 48)),
    ],
)
def test_shapes_of_every_dtype_are_read(dtype: str, num_bytes: int, tmp_path: Path) -> None:
    """Of bfloat16 and 8-bit floats too, which NumPy does not have."""
    path = write(tmp_path / "w.safetensors", tensor(dtype, [2, 3], num_bytes))
    assert read_header(path) == ({"x": (2, 3)}, "")


@pytest.mark.parametrize(
    ("content", "shapes", "format"),
    [
        (safetensors_bytes(HEADER), {"a": (2, 3), "b": (6,)}, "pt"),
        (safetensors_bytes(json.dumps(HEADER).encode() + b"   "), {"a": (2, 3), "b": (6,)}, "pt"),
        (safetensors_bytes({}, b""), {}, ""),
        (tensor("F32", [], 4), {"x": ()}, ""),
        (tensor("F32", [0, 3], 0), {"x": (0, 3)}, ""),
        (tensor("F32", [1] * 16, 4), {"x": (1,) * 16}, ""),
    ],
)
def test_valid_headers(content: bytes, shapes: dict, format: str, tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "w.safetensors", content)) == (shapes, format)


@pytest.mark.parametrize("name", ["../../x", "a\0b", "a\nb\r\u2028c", "x" * 10_000, "", "." * 1000])
def test_tensors_may_have_any_name(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", safetensors_bytes({name: HEADER["a"]}, DATA[:24]))
    assert read_header(path).shapes == {name: (2, 3)}
    assert load_safetensors([path])[name].shape == (2, 3)


NOT_REGULAR: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "there is no such file"),
    "broken link": (lambda path: path.symlink_to("/no/such"), "there is no such file"),
    "folder": (lambda path: path.mkdir(), "it is not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
    "pipe": (os.mkfifo, "it is not a regular file"),
}


@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_what_is_not_a_regular_file_is_not_opened(kind: str, tmp_path: Path) -> None:
    """safe_open waits for a pipe's other end forever."""
    make, reason = NOT_REGULAR[kind]
    path = tmp_path / "file"
    make(path)
    for read in (read_header, read_json):
        with pytest.raises(SimPOError) as error:
            read(path)
        assert str(error.value) == f"cannot read {path}: {reason}"


# --- weights ---------------------------------------------------------------------------------


def test_tensors_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    tensors = {"a": mx.arange(6).reshape(2, 3), "b": mx.ones((4,), mx.bfloat16)}
    for name, value in tensors.items():
        save_safetensors(tmp_path / f"{name}.safetensors", {name: value}, "mlx")
    loaded = load_safetensors([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert loaded.keys() == tensors.keys()
    assert all((loaded[name] == value).all() for name, value in tensors.items())
    assert all(loaded[name].dtype == value.dtype for name, value in tensors.items())
    assert read_header(tmp_path / "a.safetensors").format == "mlx"


def test_a_tensor_in_two_files_is_rejected(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / name, safetensors_bytes(HEADER))
        for name in ("1.safetensors", "2.safetensors")
    ]
    with pytest.raises(SimPOError, match=f"{tmp_path} has the tensor a in two files; .*save the"):
        load_safetensors(paths)


@pytest.mark.parametrize("dtype", ["F64", "F8_E5M2"])
def test_a_dtype_that_mlx_does_not_have_is_named(dtype: str, tmp_path: Path) -> None:
    content = tensor(dtype, [2], 16 if dtype == "F64" else 2)
    path = write(tmp_path / "w.safetensors", content)
    with pytest.raises(SimPOError, match=f"MLX cannot read {path}: .*{dtype}"):
        load_safetensors([path])


def test_a_failing_save_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-folder"):
        save_safetensors(tmp_path / "no-folder" / "w.safetensors", {"a": mx.ones(2)}, "pt")


def test_weight_files_are_those_that_mlx_lm_loads(tmp_path: Path) -> None:
    names = ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"]
    for name in [*names, "adapters.safetensors", "old.bin"]:
        (tmp_path / name).touch()
    assert [path.name for path in weight_files(tmp_path)] == sorted(names)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(SimPOError, match=rf"{tmp_path} holds no model\*\.safetensors; it must be"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "MODEL.PT", "x.pkl", "x.ckpt"])
def test_pickled_weights_are_never_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SimPOError, match=f"its weights in {name}, a pickle.*save the model as"):
        weight_files(tmp_path)


def test_a_link_may_lead_to_a_blob_of_the_same_repository_and_nowhere_else(tmp_path: Path) -> None:
    """huggingface_hub's cache links each file of a snapshot to a blob beside the snapshots."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    for name, target in (
        ("blob", "../../blobs/456"),
        ("other", "../../../models--c--d/blobs/456"),
        ("private", tmp_path / "private"),
    ):
        (snapshot / name).symlink_to(target)
    (tmp_path / "plain").touch()
    (tmp_path / "link").symlink_to("plain")
    assert all(map(is_inside_its_folder, (snapshot / "blob", tmp_path / "link")))
    assert not any(map(is_inside_its_folder, (snapshot / "other", snapshot / "private")))


# --- JSON and text ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_not_json_is_named(text: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", text)
    with pytest.raises(SimPOError, match=f"^cannot read {path}: ."):
        read_json(path)


@pytest.mark.parametrize("text", ["[1]", "null", "5", '"x"'])
def test_json_must_be_an_object(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", text.encode())
    with pytest.raises(SimPOError, match=rf"{path} must hold a JSON object, not "):
        read_json(path)


def test_an_object_is_read(tmp_path: Path) -> None:
    assert read_json(write(tmp_path / "x.json", '{"a": "ü"}'.encode())) == {"a": "ü"}


def test_text_that_is_not_unicode_is_escaped(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "ü \ud83d\n")
    write_text(tmp_path / "x", "more\n", append=True)
    assert (tmp_path / "x").read_text("utf-8") == "ü \\ud83d\nmore\n"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SimPOError, match=f"cannot write {tmp_path}: "):
        write_text(tmp_path, "x")


# --- files that survive ----------------------------------------------------------------------


@needs_faults
def test_a_file_is_the_old_or_the_new_one_whenever_the_process_or_the_power_ends() -> None:
    old, new = b"old" * 100, b"new" * 200
    with memory_folder() as folder, Forks("from mlx_simpo.files import write_durably") as forks:
        path = folder / "config.yaml"
        code = f"from pathlib import Path; write_durably(Path({str(path)!r}), {new!r})"
        operations = forks.run(code, folder).operations
        assert [o.name for o in operations] == ["open", "write", "sync", "rename", "sync"]
        assert [o.path for o in operations][-2:] == ["config.yaml", "."]
        for number, operation in enumerate(operations, 1):
            for torn in (False, True):
                for power in (False, True):
                    path.write_bytes(old)
                    ended = forks.run(code, folder, kill_at=number, torn=torn)
                    assert ended.status == KILLED
                    if power:
                        cut_power(folder, ended.operations[:-1])
                    assert path.read_bytes() == (new if number > 4 else old), operation
        write_durably(path, b"more")  # over what the killed ones have left
        assert [(p.name, p.read_bytes()) for p in folder.iterdir()] == [("config.yaml", b"more")]


@needs_faults
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_file_that_the_disk_rejects_is_as_it_was(code: int) -> None:
    with memory_folder() as folder, Forks("from mlx_simpo.files import write_durably") as forks:
        path = folder / "x"
        path.write_bytes(b"old")
        call = f"from pathlib import Path; write_durably(Path({str(path)!r}), b'new')"
        for number in range(1, 5):  # to the rename
            for torn in (False, True):
                ended = forks.run(call, folder, full_at=number, torn=torn, error=code)
                assert ended.err.splitlines()[-1].startswith(f"OSError: [Errno {code}] "), ended
                assert [(p.name, p.read_bytes()) for p in folder.iterdir()] == [("x", b"old")]


def test_what_cannot_be_synced_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "none" / "x", b"")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "is_folder", "is_ignored"),
    [
        (errno.EIO, False, False),
        (errno.EIO, True, False),
        (errno.ENOSPC, True, False),
        (errno.EINVAL, False, False),
        (errno.EINVAL, True, True),  # SMB shares on Linux, for example
        (errno.ENOTSUP, True, True),
    ],
)
def test_only_folders_of_disks_that_cannot_sync_them_are_not_synced(
    code: int, is_folder: bool, is_ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    path = tmp_path if is_folder else write(tmp_path / "x", b"")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    if is_ignored:
        sync(path)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync(path)


@pytest.mark.parametrize("code", [0, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, errno.EIO])
def test_macos_is_asked_to_empty_the_cache_of_the_drive(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F_FULLFSYNC first, and fsync where the file system has only that."""
    calls: list[object] = []

    def control(descriptor: int, command: int) -> None:
        calls.append(command)
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync(tmp_path)
    else:
        sync(tmp_path)
    assert calls == [51] if code in (0, errno.EIO) else calls == [51, "fsync"]
