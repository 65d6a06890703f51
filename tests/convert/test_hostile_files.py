"""Safetensors files that lie: one clear error, nothing written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.hostile import FILE, SOURCE, Header, conversions, convert, file_of, first, parts
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.errors import SimPOError
from mlx_simpo.files import load_safetensors, read_header


@conversions
def test_controls_what_is_not_spoilt_is_converted(name: str, good: Path, tmp_path: Path) -> None:
    convert(name, good / SOURCE[name], tmp_path / "out", str(good / "model"), verify=True)
    assert any((tmp_path / "out").glob("*.safetensors"))


def renamed(name: str) -> Callable[[Header, bytes], bytes]:
    def spoil(header: Header, data: bytes) -> bytes:
        old = next(n for n in header if n != "__metadata__")
        return file_of({name if n == old else n: entry for n, entry in header.items()}, data)

    return spoil


def again(header: Header) -> Header:
    """The first tensor's bytes under another name as well."""
    return header | {"zz": next(e for n, e in header.items() if n != "__metadata__")}


BROKEN: dict[str, Callable[[Header, bytes], bytes]] = {
    "nothing": lambda h, d: b"",
    "eight zeros": lambda h, d: bytes(8),
    "length too big": lambda h, d: file_of(h, d, 2**63),
    "length all ones": lambda h, d: file_of(h, d, 2**64 - 1),
    "length one more": lambda h, d: file_of(h, d, len(json.dumps(h)) + 1),
    "length zero": lambda h, d: file_of(h, d, 0),
    "not JSON": lambda h, d: file_of(b"{{{{", d),
    "no UTF-8": lambda h, d: file_of(b"\xff\xfe\xfd", d),
    "UTF-16": lambda h, d: file_of(json.dumps(h).encode("utf-16"), d),
    "deep": lambda h, d: file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", d),
    "a list": lambda h, d: file_of([], d),
    "a number": lambda h, d: file_of(b"5", d),
    "no tensors": lambda h, d: file_of({}),
    "data without tensors": lambda h, d: file_of({}, d),
    "entries no tables": lambda h, d: file_of(dict.fromkeys(h, 5), d),
    "metadata no text": lambda h, d: file_of(h | {"__metadata__": {"format": 1}}, d),
    "a byte too many": lambda h, d: file_of(h, d + b"x"),
    "negative offset": lambda h, d: file_of(first(h, data_offsets=[-4, 0]), d),
    "huge offset": lambda h, d: file_of(first(h, data_offsets=[0, 2**70]), d),
    "float offset": lambda h, d: file_of(first(h, data_offsets=[0.0, 256.0]), d),
    "reversed offsets": lambda h, d: file_of(first(h, data_offsets=[256, 0]), d),
    "NaN in shape": lambda h, d: file_of(first(h, shape=[float("nan")]), d),
    "negative shape": lambda h, d: file_of(first(h, shape=[-1, -64]), d),
    "shape that does not fit": lambda h, d: file_of(first(h, shape=[3, 5]), d),
    "huge shape of nothing": lambda h, d: file_of(again(h) | {"zz": EMPTY}, d),
    "100,000 axes": lambda h, d: file_of(first(h, shape=[1] * 100_000 + [2, 3]), d),
    "overlapping": lambda h, d: file_of(again(h), d),
    "unknown type": lambda h, d: file_of(first(h, dtype="C64"), d),
    "other size of type": lambda h, d: file_of(first(h, dtype="F8_E5M2"), d),
    "no type": lambda h, d: file_of(first(h, dtype=None), d),
    "type a list": lambda h, d: file_of(first(h, dtype=["F32"]), d),
    "name with a path": renamed("../../x"),
    "name with NUL": renamed("a\0b"),
    "name with lines": renamed("a\nb\r\u2028c"),
    "name of 10,000 letters": renamed("x" * 10_000),
    "name of nothing": renamed(""),
    "name of dots": renamed("." * 1000),
    "name too deep": renamed("a." * 100_000),
    "name with a huge number": renamed("model.layers.99999999999.x"),
    "name half an emoji": renamed("\ud800"),
}
EMPTY = {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}


@conversions
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_safetensors(name: str, broken: str, refused: Callable[..., str]) -> None:
    def spoil(folder: Path) -> None:
        path = folder / FILE[SOURCE[name]]
        path.write_bytes(BROKEN[broken](*parts(path.read_bytes())))

    refused(name, spoil)


@conversions
@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 200, 0.3, 0.6, 0.9, -257, -1])
def test_truncated_safetensors(name: str, cut: float, refused: Callable[..., str]) -> None:
    def spoil(folder: Path) -> None:
        path = folder / FILE[SOURCE[name]]
        whole = path.read_bytes()
        path.write_bytes(whole[: int(cut * len(whole)) if 0 < cut < 1 else int(cut)])

    assert "not a valid safetensors file" in refused(name, spoil)


def test_truncated_at_any_byte(good: Path, tmp_path: Path) -> None:
    whole = (good / "peft" / FILE["peft"]).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(SimPOError, match="not a valid safetensors file"):
            read_header(tmp_path / "cut")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(position=st.integers(0, 900), byte=st.integers(0, 255))
def test_any_byte_changed_is_read_or_refused(position: int, byte: int) -> None:
    weights = {f"layers.{n}.{k}": mx.ones((n + 2, 3)) for n in range(4) for k in "ab"}
    path = Path(os.environ["MLX_SIMPO_CACHE"]) / "changed.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), weights, {"format": "pt"})
    whole = bytearray(path.read_bytes())
    whole[position % len(whole)] = byte
    path.write_bytes(whole)
    try:
        for array in load_safetensors([path]).values():
            np.array(array.astype(mx.float32))
    except SimPOError:
        pass


@conversions
@pytest.mark.parametrize("what", ["missing", "a folder", "a broken link", "/dev/zero"])
def test_weights_that_are_no_file(name: str, what: str, refused: Callable[..., str]) -> None:
    def spoil(folder: Path) -> None:
        path = folder / FILE[SOURCE[name]]
        path.unlink()
        if what == "a folder":
            path.mkdir()
        elif what != "missing":
            path.symlink_to("/no/such" if what == "a broken link" else what)

    refused(name, spoil)
