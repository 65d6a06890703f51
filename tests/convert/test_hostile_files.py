"""Safetensors files that are damaged or lie about themselves: one clear error, nothing written."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.hostile import (
    SOURCE,
    WEIGHTS,
    Header,
    Reject,
    assert_mentions,
    change_first_tensor,
    convert,
    every_conversion,
    join_safetensors,
    split_safetensors,
)

from mlx_simpo.errors import SimPOError
from mlx_simpo.files import read_header

EMPTY_TENSOR = {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}
FIRST_TENSOR = "layers.0.mlp.down_proj.lora_A"
Damage = Callable[[Header, bytes], bytes]  # (header, data) of a valid file → bytes of a bad one


@every_conversion
def test_the_undamaged_input_is_converted(
    conversion: str, valid_inputs: Path, tmp_path: Path
) -> None:
    source, model = valid_inputs / SOURCE[conversion], str(valid_inputs / "model")
    convert(conversion, source, tmp_path / "out", model, verify=True)
    assert any((tmp_path / "out").glob("*.safetensors"))


def entry(**changes: object) -> Damage:
    """Return a function that damages the entry of the first tensor in the header."""
    return lambda h, d: join_safetensors(change_first_tensor(h, **changes), d)


def renamed(name: str) -> Damage:
    """Rename the first tensor."""

    def damage(header: Header, data: bytes) -> bytes:
        first = next(n for n in header if n != "__metadata__")
        return join_safetensors({name if n == first else n: e for n, e in header.items()}, data)

    return damage


def with_copy(header: Header) -> Header:
    """The first tensor's bytes under the name zz as well."""
    return header | {"zz": next(e for n, e in header.items() if n != "__metadata__")}


# Damage → what the safetensors library says of it.
BAD_HEADERS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "empty file": (lambda h, d: b"", ("header too small",)),
    "eight zeros": (lambda h, d: bytes(8), ("header",)),
    "length 2**63": (lambda h, d: join_safetensors(h, d, 2**63), ("header too large",)),
    "length 2**64 - 1": (lambda h, d: join_safetensors(h, d, 2**64 - 1), ("header too large",)),
    "length one too many": (
        lambda h, d: join_safetensors(h, d, len(json.dumps(h)) + 1),
        ("header",),
    ),
    "length zero": (lambda h, d: join_safetensors(h, d, 0), ("header",)),
    "not JSON": (lambda h, d: join_safetensors(b"{{{{", d), ("JSON in header",)),
    "not UTF-8": (lambda h, d: join_safetensors(b"\xff\xfe\xfd", d), ("UTF-8 in header",)),
    "UTF-16": (
        lambda h, d: join_safetensors(json.dumps(h).encode("utf-16"), d),
        ("UTF-8 in header",),
    ),
    "deeply nested": (
        lambda h, d: join_safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", d),
        ("JSON in header",),
    ),
    "a list": (lambda h, d: join_safetensors([], d), ("header",)),
    "a number": (lambda h, d: join_safetensors(b"5", d), ("header",)),
    "entries that are numbers": (
        lambda h, d: join_safetensors(dict.fromkeys(h, 5), d),
        ("JSON in header", "`5`"),
    ),
    "number as metadata": (
        lambda h, d: join_safetensors(h | {"__metadata__": {"format": 1}}, d),
        ("JSON in header", "`1`"),
    ),
    "name with a lone surrogate": (renamed("\ud800"), ("JSON in header", "hex escape")),
    "one byte too many": (lambda h, d: join_safetensors(h, d + b"x"), ("not fully covered",)),
    "one byte missing": (lambda h, d: join_safetensors(h, d[:-1]), ("not fully covered",)),
    "data without tensors": (lambda h, d: join_safetensors({}, d), ("not fully covered",)),
    "cut within the length": (lambda h, d: join_safetensors(h, d)[:7], ("header too small",)),
    "cut after the length": (lambda h, d: join_safetensors(h, d)[:8], ("header length",)),
    "cut within the header": (lambda h, d: join_safetensors(h, d)[:200], ("header length",)),
    "cut within the data": (lambda h, d: join_safetensors(h, d[:100]), ("not fully covered",)),
    "negative offset": (entry(data_offsets=[-4, 0]), ("JSON in header", "`-4`")),
    "huge offset": (entry(data_offsets=[0, 2**70]), ("JSON in header", "usize")),
    "fractional offset": (entry(data_offsets=[0.0, 256.0]), ("JSON in header", "`0.0`")),
    "offsets in reverse": (entry(data_offsets=[256, 0]), ("offset", FIRST_TENSOR)),
    "NaN in the shape": (entry(shape=[float("nan")]), ("JSON in header",)),
    "negative shape": (entry(shape=[-1, -64]), ("JSON in header", "`-1`")),
    "shape of another size": (entry(shape=[3, 5]), ("shape",)),
    "100,000 axes": (entry(shape=[1] * 100_000 + [2, 3]), ("shape",)),
    "huge empty tensor": (
        lambda h, d: join_safetensors(with_copy(h) | {"zz": EMPTY_TENSOR}, d),
        ("JSON in header", "usize"),
    ),
    "unknown dtype": (entry(dtype="C128"), ("C128",)),
    "dtype of another size": (entry(dtype="F8_E5M2"), ("data type",)),
    "no dtype": (entry(dtype=None), ("JSON in header", "null")),
    "list as dtype": (entry(dtype=["F32"]), ("JSON in header", "sequence")),
    "overlapping tensors": (lambda h, d: join_safetensors(with_copy(h), d), ("invalid offset",)),
}
# These are valid files; the conversion rejects the content.
BAD_CONTENT: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no tensors": (lambda h, d: join_safetensors({}), ("no tensors", "down_proj")),
    "name with a path": (renamed("../../x"), ("'../../x'",)),
    "name with NUL": (renamed("a\0b"), (r"'a\x00b'",)),
    "name with line breaks": (renamed("a\nb\r\u2028c"), (r"'a\nb\r\u2028c'",)),
    "name of 10,000 letters": (renamed("x" * 10_000), ("'" + "x" * 80,)),
    "empty name": (renamed(""), ("''",)),
    "name of dots": (renamed("." * 1000), ("'" + "." * 80,)),
    "deep name": (renamed("a." * 100_000), ("'a.a.a.",)),
    "name with a huge number": (renamed("model.layers.99999999999.x"), ("99999999999",)),
}


@pytest.mark.parametrize("damage", BAD_HEADERS | BAD_CONTENT)
def test_bad_safetensors(damage: str, reject: Reject) -> None:
    write, parts = (BAD_HEADERS | BAD_CONTENT)[damage]
    message = reject("from-peft", damaged(WEIGHTS["peft"], write))
    assert_mentions(message, WEIGHTS["peft"], *parts)
    assert len(message) < 1000


def damaged(file: str, damage: Damage) -> Callable[[Path], None]:
    """Return a function that damages a safetensors file in a folder."""

    def corrupt(folder: Path) -> None:
        path = folder / file
        path.write_bytes(damage(*split_safetensors(path.read_bytes())))

    return corrupt


# What each conversion says first of a file whose header is valid and whose content is not. Those
# that call mlx-lm's loaders report what these find.
CONTENT_ERROR = {
    "to-peft": "adapter",
    "fuse": "adapter",
    "from-hf": "loaded",
    "fuse-model": "loaded",
}


@pytest.mark.parametrize("conversion", CONTENT_ERROR)
def test_every_conversion_checks_its_safetensors(conversion: str, reject: Reject) -> None:
    """The other conversions reject the same files, by the same checks of the header."""
    file = WEIGHTS[SOURCE[conversion]]
    for damage in ("cut within the header", "deeply nested", "overlapping tensors"):
        write, parts = BAD_HEADERS[damage]
        assert_mentions(reject(conversion, damaged(file, write)), file, *parts)
    for write, _ in BAD_CONTENT.values():
        message = reject(conversion, damaged(file, write))
        assert_mentions(message, "source", CONTENT_ERROR[conversion])
        assert len(message) < 1000


def test_a_shape_of_a_million_axes_is_rejected_within_a_second(
    tmp_path: Path, reject: Reject
) -> None:
    """Multiplying its sizes would take minutes."""
    file = WEIGHTS["peft"]
    message = reject("from-peft", damaged(file, entry(shape=[9] * 1_000_000)))
    assert_mentions(message, file, "shape")
    start = time.process_time()  # not of the clock: other processes may have the machine
    with pytest.raises(SimPOError):
        read_header(tmp_path / "source" / file)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("kind", ["missing", "folder", "broken link", "endless"])
@pytest.mark.parametrize("conversion", ["to-peft", "from-peft", "from-hf"])
def test_weights_that_are_not_a_file(conversion: str, kind: str, reject: Reject) -> None:
    file = WEIGHTS[SOURCE[conversion]]

    def corrupt(folder: Path) -> None:
        (folder / file).unlink()
        if kind == "folder":
            (folder / file).mkdir()
        elif kind != "missing":
            (folder / file).symlink_to("/dev/zero" if kind == "endless" else "/no/such/file")

    # A model's weights are all of model*.safetensors.
    name = "model*.safetensors" if (conversion, kind) == ("from-hf", "missing") else file
    assert_mentions(reject(conversion, corrupt), "source", name)
