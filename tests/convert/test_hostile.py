"""Broken and hostile input to the conversions: one clear error, nothing written, nothing run.

A test that is marked as a defect states what is wanted; the reason says what happens instead.
"""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from commands import command, complaint
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny import tiny_model

from mlx_simpo.convert import from_hf, from_peft, fuse, to_peft
from mlx_simpo.convert.verify import check, compare
from mlx_simpo.errors import SimPOError
from mlx_simpo.model.adapters import save_adapter
from mlx_simpo.model.files import load_safetensors, read_header

Spoil = Callable[[Path], Any]
Header = dict[str, Any]
SOURCE = {
    "to-peft": "mlx",
    "fuse": "mlx",
    "from-peft": "peft",
    "from-hf": "model",
    "alone": "model",
}
FILE = {
    "mlx": "adapters.safetensors",
    "peft": "adapter_model.safetensors",
    "model": "model.safetensors",
}
ADAPTER = "adapter_config.json"
TRACEBACK = "a Traceback, not a SimPOError: "
conversions = pytest.mark.parametrize("name", SOURCE)


def defect(value: Any, reason: str) -> Any:
    """A case that fails today; it is to be mended, and this mark taken away."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, reason=reason))


def convert(name: str, given: Path, output: Path, model: str | None, **options: Any) -> None:
    """Run a conversion of SOURCE; nothing may depend on the verification."""
    options = {"verify": False, **options}
    if name == "from-hf":
        from_hf(str(given), output, **options)
    elif name == "alone":
        fuse(output, model=str(given), **options)
    elif name == "fuse":
        fuse(output, adapter=given, model=model, **options)
    else:
        {"to-peft": to_peft, "from-peft": from_peft}[name](given, output, model=model, **options)


@pytest.fixture(scope="module")
def good(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of it and the same for PEFT, in folders of these names."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(model_folder, folder / "model")
    model = tiny_model()
    keys = ["self_attn.q_proj", "mlp.down_proj"]
    parameters = {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": keys}
    model.freeze()
    linear_to_lora_layers(model, 2, parameters)
    weights = tree_flatten(model.trainable_parameters())
    model.update(tree_unflatten([(n, mx.random.normal(p.shape) * 0.2) for n, p in weights]))
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    save_adapter(folder / "mlx", model, config | {"model": str(folder / "model")})
    to_peft(folder / "mlx", folder / "peft", verify=False)
    return folder


def content(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder; None for what is no ordinary file."""
    found = sorted(folder.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in found}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Fail what takes longer; not with a TimeoutError, which counts as an OSError."""

    def stop(*_: object) -> None:
        pytest.fail(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def refused(good: Path, tmp_path: Path) -> Callable[..., str]:
    """Spoil a copy of a good input and convert it: the message, if nothing was left behind."""

    def run(name: str, spoil: Spoil, seconds: float = 30, **options: Any) -> str:
        given = tmp_path / "in"
        shutil.copytree(good / SOURCE[name], given)
        spoil(given)
        before = content(tmp_path)
        model = options.pop("model", str(good / "model"))
        output = options.pop("output", tmp_path / "out")
        with limited(seconds), pytest.raises(SimPOError) as caught:
            convert(name, given, output, model, **options)
        assert content(tmp_path) == before
        assert len(str(caught.value)) > 20
        return str(caught.value)

    return run


def changed(file: str, **values: Any) -> Spoil:
    """Set entries of a JSON file."""

    def spoil(folder: Path) -> None:
        there = json.loads((folder / file).read_text("utf-8"))
        (folder / file).write_text(json.dumps(there | values))

    return spoil


@conversions
def test_controls_what_is_not_spoilt_is_converted(name: str, good: Path, tmp_path: Path) -> None:
    convert(name, good / SOURCE[name], tmp_path / "out", str(good / "model"), verify=True)
    assert any((tmp_path / "out").glob("*.safetensors"))


# --- safetensors -----------------------------------------------------------------------------


def parts(content: bytes) -> tuple[Header, bytes]:
    """(header, data) of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; ``length``: what it claims of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def first(header: Header, **changes: Any) -> Header:
    """The header with the entry of its first tensor changed."""
    name = next(n for n in header if n != "__metadata__")
    return header | {name: header[name] | changes}


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

    assert "no sound safetensors file" in refused(name, spoil)


def test_truncated_at_any_byte(good: Path, tmp_path: Path) -> None:
    whole = (good / "peft" / FILE["peft"]).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(SimPOError, match="no sound safetensors file"):
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


# --- the configuration of an adapter ---------------------------------------------------------

LONG = 10**400  # JSON's numbers have no limit; floats have
PATTERN_ERRORS = (
    "(",
    defect("a{99999999999999999999}", f"{TRACEBACK}re's OverflowError"),
    defect("(" * 2000 + ")" * 2000, f"{TRACEBACK}re's RecursionError"),
    defect("[[a]", f"{TRACEBACK}re's FutureWarning is let out, as a second line on stderr"),
)
PEFT = [
    *(({"r": rank}, "it must be 1 to") for rank in (0, -1, 2**40, 1e300, "8", True, None, [8])),
    *(
        ({"lora_alpha": alpha}, "it must be a number")
        for alpha in (float("inf"), float("nan"), "8", [1], True, None, {})
    ),
    ({"lora_alpha": 0}, "changes nothing"),
    defect(({"lora_alpha": LONG}, "lora_alpha"), f"{TRACEBACK}OverflowError of math.isfinite"),
    defect(
        ({"alpha_pattern": {"q_proj": LONG}}, "lora_alpha"),
        f"{TRACEBACK}OverflowError of math.isfinite",
    ),
    ({"alpha_pattern": {"q_proj": None}}, "it must be a number"),
    ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is ['q_proj']; it must be a dict"),
    ({"rank_pattern": {"q_proj": "2"}}, "it must be 1 to"),
    ({"rank_pattern": {"q_proj": 3}}, "do not belong to rank 3"),
    ({"rank_pattern": "q_proj"}, "rank_pattern is q_proj"),
    ({"target_modules": ["q_proj", 3]}, "target_modules is ['q_proj', 3]"),
    ({"target_modules": 3}, "target_modules is 3; it must be a str or list"),
    ({"target_modules": "all-linear"}, "layers that have no tensors"),
    ({"exclude_modules": [{}]}, "exclude_modules is [{}]"),
    ({"layers_to_transform": "0"}, "layers_to_transform is 0"),
    ({"target_parameters": "x"}, "target_parameters is x"),
    ({"use_rslora": 1}, "use_rslora is 1; it must be a bool"),
    ({"use_dora": "yes"}, "use_dora is yes"),
    ({"use_dora": True}, "too few tensors: magnitude_vector"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ({"revision": 3}, "revision is 3"),
    ({"peft_type": None}, "peft_type is None, only LORA"),
    ({"peft_type": ["LORA"]}, "only LORA is converted"),
    ({"peft_type": "IA3"}, "peft_type is IA3, only LORA is converted"),
    ({"bias": "all"}, "bias is all, only none is converted"),
    ({"bias": {"x": 1}}, "only none is converted"),
    *(
        ({"init_lora_weights": start}, "which changes the base model")
        for start in ("pissa", "PiSSA_niter_16", "olora", "corda", "loftq", "lora_ga")
    ),
    ({"modules_to_save": ["lm_head"]}, "whole layers are trained"),
    ({"lora_bias": True}, "biases are trained"),
    ({"trainable_token_indices": [1]}, "single tokens are trained"),
    ({"layer_replication": [[0, 1]]}, "layers are repeated"),
    ({"fan_in_fan_out": True}, "the weights are transposed"),
    ({"use_qalora": True}, "use_qalora is set: it is not known what that means"),
    ({"x" * 10_000: {"y": 1}}, "it is not known what that means"),
    (
        {"bias": "all", "lora_bias": True, "new": 1},
        "bias is all, only none is converted; lora_bias",
    ),
]


@pytest.mark.parametrize(("values", "message"), PEFT)
def test_peft_settings(values: dict, message: str, refused: Callable[..., str]) -> None:
    assert message in refused("from-peft", changed(ADAPTER, **values))


@pytest.mark.parametrize("pattern", PATTERN_ERRORS)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_patterns_that_are_none(key: str, pattern: str, refused: Callable[..., str]) -> None:
    values: dict[str, Any] = {key: {pattern: 2} if key == "rank_pattern" else pattern}
    values |= {"target_modules": ".*q_proj"} if key == "exclude_modules" else {}
    assert "the pattern" in refused("from-peft", changed(ADAPTER, **values))


@pytest.mark.parametrize(
    "pattern", [defect("(", "re.error is let out"), defect("(?P<index>x)", "re.error is let out")]
)
def test_layers_pattern_that_is_none(pattern: str, refused: Callable[..., str]) -> None:
    values = {"layers_to_transform": [0], "layers_pattern": pattern}
    assert "the pattern" in refused("from-peft", changed(ADAPTER, **values))


@pytest.mark.xfail(strict=True, reason="a pattern may take for ever (re backtracks)")
def test_a_pattern_that_takes_for_ever(refused: Callable[..., str]) -> None:
    refused("from-peft", changed(ADAPTER, target_modules=r"(.|\w)+X"), seconds=3)


@pytest.mark.parametrize(
    "values",
    [
        defect({"layers_to_transform": [0]}, "tensors that PEFT would leave out are converted"),
        defect({"target_modules": ["q_proj"]}, "tensors that PEFT would leave out are converted"),
        defect({"exclude_modules": ["q_proj"]}, "tensors that PEFT would leave out are converted"),
        defect({"target_parameters": ["mlp.up.weight"]}, "a parameter that no layer has is taken"),
    ],
)
def test_peft_settings_that_the_tensors_contradict(
    values: dict, refused: Callable[..., str]
) -> None:
    refused("from-peft", changed(ADAPTER, **values))


def nested(**values: Any) -> Spoil:
    """Set entries of lora_parameters."""

    def spoil(folder: Path) -> None:
        there = json.loads((folder / ADAPTER).read_text("utf-8"))
        changed(ADAPTER, lora_parameters=there["lora_parameters"] | values)(folder)

    return spoil


@pytest.mark.parametrize("name", ["to-peft", "fuse"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        *((nested(rank=r), "it must be 1 to") for r in (0, -1, 2**40, 1e300, "8", True, None)),
        (nested(rank=3), "incompatible tensors"),
        *(
            (nested(scale=s), "it must be a finite number")
            for s in (float("inf"), float("nan"), "8", [1], None)
        ),
        defect((nested(scale=LONG), "finite"), f"{TRACEBACK}OverflowError of math.isfinite"),
        defect((nested(scale=True), "finite"), "true is taken for 1"),
        (nested(dropout="x"), "does not fit"),
        (nested(dropout=5), "does not fit"),
        (nested(keys=[]), ""),
        (nested(keys=["nope"]), ""),
        (nested(keys="q_proj"), "keys must be a list of names"),
        (nested(keys=[1]), "keys must be a list of names"),
        (nested(keys=["self_attn"]), "does not fit"),
        (nested(keys=["model"]), "does not fit"),
        (changed(ADAPTER, num_layers="2"), "num_layers is 2"),
        (changed(ADAPTER, num_layers=True), "num_layers is True"),
        (changed(ADAPTER, lora_parameters=[]), "no lora_parameters"),
        (changed(ADAPTER, fine_tune_type="full"), "it must be lora"),
        (changed(ADAPTER, fine_tune_type=["lora"]), "it must be lora"),
        (changed(ADAPTER, fine_tune_type="dora"), "not a whole adapter of this model"),
        (changed(ADAPTER, peft_type="LORA"), "holds a PEFT adapter"),
    ],
)
def test_mlx_settings(name: str, spoil: Spoil, message: str, refused: Callable[..., str]) -> None:
    assert message in refused(name, spoil)


@pytest.mark.xfail(strict=True, reason=f"{TRACEBACK}OverflowError of round() in peft_write.whole")
def test_a_scale_that_overflows_with_its_rank(refused: Callable[..., str]) -> None:
    refused("to-peft", nested(scale=1.7e308))


@pytest.mark.xfail(strict=True, reason=f"{TRACEBACK}MLX's std::bad_cast, a RuntimeError")
@pytest.mark.parametrize("name", ["to-peft", "fuse"])
def test_a_whole_scale_of_more_than_63_bits(name: str, refused: Callable[..., str]) -> None:
    refused(name, nested(scale=2**64), verify=True)


@pytest.mark.parametrize("name", ["to-peft", "fuse", "from-peft"])
def test_a_scale_that_makes_no_numbers(name: str, refused: Callable[..., str]) -> None:
    spoil = changed(ADAPTER, lora_alpha=1e300) if name == "from-peft" else nested(scale=1e300)
    assert "conversion is not right" in refused(name, spoil, verify=True)


@pytest.mark.parametrize("name", ["to-peft", "fuse", "from-peft"])
@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"null", b"5", b"\xff\xfe", b"{", b"1" * 5000, b"[" * 10**6, None]
)
def test_adapter_configs_that_are_none(
    name: str, raw: bytes | None, refused: Callable[..., str]
) -> None:
    def spoil(folder: Path) -> None:
        (folder / ADAPTER).unlink()
        if raw is not None:
            (folder / ADAPTER).write_bytes(raw)

    assert ADAPTER in refused(name, spoil)


def swapped(folder: Path) -> None:
    """A under B's name and the other way round."""
    path = folder / FILE["peft" if (folder / FILE["peft"]).exists() else "mlx"]
    weights = mx.load(str(path))
    other = {"lora_A": "lora_B", "lora_B": "lora_A", "lora_a": "lora_b", "lora_b": "lora_a"}
    assert isinstance(weights, dict)
    made = {"".join(other.get(p, p) for p in re_parts(n)): mx.array(w) for n, w in weights.items()}
    mx.save_safetensors(str(path), made, {"format": "pt"})


def re_parts(name: str) -> list[str]:
    """A dotted name in parts, the dots among them."""
    return [part for piece in name.split(".") for part in (".", piece)][1:]


def retyped(kind: mx.Dtype) -> Spoil:
    def spoil(folder: Path) -> None:
        path = next(folder.glob("adapter*.safetensors"))
        weights = mx.load(str(path))
        assert isinstance(weights, dict)
        made = {name: (w * 3).astype(kind) for name, w in weights.items()}
        mx.save_safetensors(str(path), made, {"format": "pt"})

    return spoil


@pytest.mark.parametrize("name", ["to-peft", "fuse", "from-peft"])
def test_a_and_b_exchanged(name: str, refused: Callable[..., str]) -> None:
    refused(name, swapped)


@pytest.mark.parametrize(
    "name",
    [
        "from-peft",
        defect("to-peft", "without --verify an adapter of whole numbers is written"),
        defect("fuse", "an adapter of whole numbers is merged"),
    ],
)
def test_adapters_of_whole_numbers(name: str, refused: Callable[..., str]) -> None:
    assert "float" in refused(name, retyped(mx.int32))


@pytest.mark.parametrize(
    ("name", "file", "raw"),
    [
        defect(("to-peft", "summary.json", b"{"), f"{TRACEBACK}JSONDecodeError in write_record"),
        defect(("fuse", "summary.json", b"\xff"), f"{TRACEBACK}UnicodeDecodeError, write_record"),
        defect(("to-peft", "summary.json", b"[" * 10**5), f"{TRACEBACK}RecursionError"),
        defect(("fuse", "chat_template.jinja", b"\xff"), f"{TRACEBACK}UnicodeDecodeError"),
    ],
)
def test_files_beside_an_adapter(
    name: str, file: str, raw: bytes, refused: Callable[..., str]
) -> None:
    assert file in refused(name, lambda folder: (folder / file).write_bytes(raw))


# --- names and paths -------------------------------------------------------------------------

NAMES = ["../../x", "/etc/passwd", "~root/x", "~nosuchuser/x", "a\0b", "x" * 5000, "", "a/b/c", "."]


@pytest.mark.parametrize("base", [*NAMES, "a b", "\ud800", None, [1]])
@pytest.mark.parametrize("name", ["to-peft", "fuse", "from-peft"])
def test_bases_that_are_none(name: str, base: Any, refused: Callable[..., str]) -> None:
    key = "base_model_name_or_path" if name == "from-peft" else "model"
    refused(name, changed(ADAPTER, **{key: base}), model=None)


@pytest.mark.parametrize("name", ["to-peft", "fuse"])
@pytest.mark.parametrize("base", [*NAMES, 3, [1], {"a": 1}])
def test_recorded_bases_that_are_none(name: str, base: Any, refused: Callable[..., str]) -> None:
    record = {"base": {"model": base}}
    refused(name, changed(ADAPTER, mlx_simpo=record, model=None), model=None)


@pytest.mark.parametrize("name", ["to-peft", "fuse"])
@pytest.mark.parametrize("revision", [3, [1], {"a": 1}])
@pytest.mark.xfail(strict=True, reason=f"{TRACEBACK}TypeError of snapshot_download")
def test_recorded_revisions_that_are_none(
    name: str, revision: Any, refused: Callable[..., str]
) -> None:
    record = {"base": {"model": "a/b", "revision": revision}}
    refused(name, changed(ADAPTER, mlx_simpo=record), model=None)


@conversions
@pytest.mark.parametrize("output", ["in", "in/config", "../in", "file", "file/x/y"])
def test_outputs_that_cannot_be(
    name: str, output: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("x")

    def spoil(folder: Path) -> None:
        (folder / "config").mkdir()
        (folder / "config" / "x").touch()

    place = tmp_path / "in" / output if output == "../in" else tmp_path / output
    assert "output is" in refused(name, spoil, output=place)


@conversions
@pytest.mark.parametrize(
    "output",
    ["", "x" * 300, "~nosuchuser/x", defect("a\0b", f"{TRACEBACK}ValueError of os.mkdir")],
)
def test_outputs_that_are_no_names(name: str, output: str, refused: Callable[..., str]) -> None:
    refused(name, lambda folder: None, output=output)


@conversions
def test_an_output_inside_the_input_leaves_the_rest(name: str, good: Path, tmp_path: Path) -> None:
    source = shutil.copytree(good / SOURCE[name], tmp_path / "in")
    before = content(tmp_path)
    convert(name, source, source / "out", str(good / "model"), verify=True)
    assert any((source / "out").glob("*.safetensors"))
    shutil.rmtree(source / "out")
    assert content(tmp_path) == before


FULL = "[write] Unable to write 307 bytes to file."  # what MLX says when the disk is full


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError(FULL)])
@conversions
def test_a_full_disk_leaves_nothing(
    name: str,
    error: Exception,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if isinstance(error, RuntimeError) and name != "from-peft":
        reason = f"{TRACEBACK}RuntimeError of mx.save_safetensors"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))

    def full(file: str, *_: object) -> None:
        Path(file).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(mx, "save_safetensors", full)
    output = tmp_path / "in" / "new" / "out"
    assert "cannot be written" in refused(name, lambda folder: None, output=output)


@conversions
def test_ctrl_c_leaves_nothing(
    name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "save_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(name, good / SOURCE[name], tmp_path / "new" / "out", str(good / "model"))
    assert list(tmp_path.iterdir()) == []


# --- models ----------------------------------------------------------------------------------

models = pytest.mark.parametrize("name", ["from-hf", "alone"])
CONFIG = "config.json"


@models
@pytest.mark.parametrize(
    "values",
    [
        *(
            {"model_type": kind}
            for kind in ("../../os", "os.path", "", 17, None, "base", "__init__")
        ),
        *({"model_type": kind} for kind in ("x" * 5000, "llama\n", "cache", ["llama"], "evil")),
        *({"model_file": file} for file in ("../../evil.py", "/tmp/evil.py", 5, "evil.py")),
        {"architectures": 5},
        *({"hidden_size": size} for size in (10**30, 2**31 - 1, -1, 0, "32", 1e300, None, 48)),
        *({"num_hidden_layers": count} for count in (0, -1, 3, 1e9, "2")),
        *({"num_attention_heads": count} for count in (0, -1, 2**40)),
        *({"vocab_size": size} for size in (2**40, "512", 100)),
        {"num_key_value_heads": 0},
        {"rms_norm_eps": "x"},
        *({"rope_parameters": wrong} for wrong in ("x", 5, [1])),
        *({"rope_scaling": wrong} for wrong in ("x", {"type": "../x"}, {"type": "linear"})),
        *({"quantization": wrong} for wrong in ({}, [], "x", {"bits": 4})),
        *({"quantization_config": wrong} for wrong in ([1], "x", {"quant_method": "bitnet"})),
        defect({"quantization_config": {"quant_method": "awq"}}, "mlx-lm's UnboundLocalError"),
        {"layer_types": 5},
        {"torch_dtype": []},
        *(defect({"vocab_size": size}, f"{TRACEBACK}mlx-lm's AssertionError") for size in (0, -5)),
        defect({"rope_theta": "x"}, f"{TRACEBACK}TypeError of mx.rope, in the verification"),
        defect({"rope_theta": LONG}, f"{TRACEBACK}TypeError of mx.rope, in the verification"),
        defect({"rope_theta": None}, f"{TRACEBACK}ValueError of mx.rope, in the verification"),
        {"rope_theta": float("nan")},
    ],
    ids=lambda values: str(values)[:40],
)
def test_model_settings(name: str, values: dict, refused: Callable[..., str]) -> None:
    refused(name, changed(CONFIG, **values), verify=True)


@pytest.mark.xfail(strict=True, reason=f"{TRACEBACK}UnicodeEncodeError in folder.write_json")
def test_half_an_emoji_in_a_config(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "model", tmp_path / "in")
    changed(CONFIG, _name_or_path="\ud800")(tmp_path / "in")
    convert("alone", tmp_path / "in", tmp_path / "out", None)


JSON_FILES = (CONFIG, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@models
@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"5", b"\xff\xfe", b"{", b"[" * 10**6])
def test_model_files_that_are_no_json(
    name: str, file: str, raw: bytes, refused: Callable[..., str]
) -> None:
    refused(name, lambda folder: (folder / file).write_bytes(raw))


@models
@pytest.mark.parametrize("file", [CONFIG, "tokenizer*"])
def test_model_files_that_are_missing(name: str, file: str, refused: Callable[..., str]) -> None:
    refused(name, lambda folder: [path.unlink() for path in folder.glob(file)])


def tokenizer_model(**values: Any) -> Spoil:
    """Set entries of the model in tokenizer.json; vocab={…} adds to it."""

    def spoil(folder: Path) -> None:
        path = folder / "tokenizer.json"
        there = json.loads(path.read_text("utf-8"))
        vocab = there["model"]["vocab"] | values.get("vocab", {})
        there["model"] |= {**values, "vocab": vocab}
        path.write_text(json.dumps(there))

    return spoil


SETTINGS = "tokenizer_config.json"


@models
@pytest.mark.xfail(strict=True, reason=f"{TRACEBACK}TypeError of encode(), in sample_tokens")
def test_a_tokenizer_that_fails_on_text(name: str, refused: Callable[..., str]) -> None:
    refused(name, changed(SETTINGS, model_max_length={"a": 1}), verify=True)


@models
@pytest.mark.parametrize(
    "spoil",
    [
        changed(SETTINGS, tokenizer_class=5),
        changed(SETTINGS, auto_map="x"),
        changed(SETTINGS, eos_token=5),
        changed(SETTINGS, eos_token="\ud800"),
        changed(SETTINGS, added_tokens_decoder={"x": 5}),
        defect(tokenizer_model(merges=5), f"{TRACEBACK}plain Exception of tokenizers"),
        defect(tokenizer_model(vocab={"e": -4}), f"{TRACEBACK}plain Exception of tokenizers"),
        defect(changed(SETTINGS, tool_parser_type="../os"), f"{TRACEBACK}ModuleNotFoundError"),
        defect(changed(SETTINGS, chat_template_type="x"), f"{TRACEBACK}ModuleNotFoundError"),
        defect(changed(SETTINGS, tokenizer_class="PreTrainedModel"), f"{TRACEBACK}ImportError"),
    ],
)
def test_tokenizers(name: str, spoil: Spoil, refused: Callable[..., str]) -> None:
    refused(name, spoil)


def program(folder: Path, *arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``mlx-simpo`` in a process of its own, with 4 GB of memory where that can be had."""
    limit = "import resource as r; r.setrlimit(r.RLIMIT_AS, (4 << 30, 4 << 30)); "
    run = "import sys; from mlx_simpo.cli import run_command; sys.exit(run_command(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", limit * (sys.platform == "linux") + run, *arguments],
        cwd=folder,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")},
        input=answer,
        capture_output=True,
        text=True,
        timeout=60,
    )


@models
@pytest.mark.parametrize("number", [512, 2**31 - 1])
@pytest.mark.xfail(strict=True, reason="tokens beyond the vocabulary read foreign memory: SIGSEGV")
def test_tokens_that_the_model_has_not(name: str, number: int, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "model", tmp_path / "in")
    tokenizer_model(vocab={"e": number})(tmp_path / "in")
    action = ("convert", "from-hf", "in", "out")
    ran = program(tmp_path, *(action if name == "from-hf" else ("fuse", "out", "--model", "in")))
    assert ran.returncode == 2, ran.stderr[-500:]
    assert "vocabulary" in ran.stderr


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        defect((0.0, float("inf")), "the allowed difference grows with the logits, to inf"),
        defect((float("inf"), float("inf")), "numpy's RuntimeWarning is let out"),
        (float("nan"), 0.0),
        (0.0, float("nan")),
        (float("inf"), 0.0),
    ],
)
def test_logits_that_are_no_numbers_are_not_equal(found: float, expected: float) -> None:
    sides = [np.array([[[1.0, value]]], dtype=np.float32) for value in (found, expected)]
    with pytest.raises(SimPOError, match="conversion is not right"):
        check([compare("the two", *sides)])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit memory")
@pytest.mark.xfail(strict=True, reason="as many blocks are built as asked for: MemoryError")
def test_a_billion_blocks(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "model", tmp_path / "in")
    changed(CONFIG, num_hidden_layers=10**9)(tmp_path / "in")
    ran = program(tmp_path, "convert", "from-hf", "in", "out")
    assert ran.returncode == 2, ran.stderr[-500:]


# --- what takes for ever ---------------------------------------------------------------------


@pytest.mark.xfail(strict=True, reason="the product of a shape's sizes is taken whatever its size")
@conversions
def test_a_shape_of_a_million_sizes(name: str, refused: Callable[..., str]) -> None:
    def spoil(folder: Path) -> None:
        path = folder / FILE[SOURCE[name]]
        header, data = parts(path.read_bytes())
        path.write_bytes(file_of(first(header, shape=[9] * 1_000_000), data))

    refused(name, spoil, seconds=1)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("from-peft", FILE["peft"]),
        ("from-hf", CONFIG),
        ("from-hf", "LICENSE"),
        *(
            defect(case, "a pipe is opened, which waits for ever for a writer")
            for case in (
                ("from-hf", FILE["model"]),
                ("to-peft", FILE["mlx"]),
                ("to-peft", ADAPTER),
                ("from-peft", ADAPTER),
            )
        ),
    ],
)
def test_pipes(name: str, file: str, good: Path, tmp_path: Path) -> None:
    given = shutil.copytree(good / SOURCE[name], tmp_path / "in")
    (given / file).unlink(missing_ok=True)
    os.mkfifo(given / file)
    with limited(2):
        if file == "LICENSE":
            convert(name, given, tmp_path / "out", None)
            assert not (tmp_path / "out" / file).exists()
            return
        with pytest.raises(SimPOError):
            convert(name, given, tmp_path / "out", str(good / "model"))


# --- code that must not run ------------------------------------------------------------------


class Trap:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("from-peft", "adapter_model.bin"),
        ("from-peft", "adapter_model.pt"),
        ("from-hf", "pytorch_model.bin"),
        ("alone", "pytorch_model.bin"),
        ("alone", "model.pth"),
    ],
)
def test_pickles_are_never_loaded(
    name: str, file: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    ran = tmp_path / "it ran"

    def spoil(folder: Path) -> None:
        (folder / FILE[SOURCE[name]]).unlink()
        (folder / file).write_bytes(pickle.dumps({"x": Trap(ran)}))

    assert f"{file}, a pickle, which can run any code and is never loaded" in refused(name, spoil)
    assert not ran.exists()
    pickle.loads((tmp_path / "in" / file).read_bytes())
    assert ran.exists(), "the trap would not have worked"


@models
@pytest.mark.parametrize("beside", ["pytorch_model.bin", "training_args.bin", "optimizer.pt"])
def test_pickles_beside_the_weights_are_left_alone(
    name: str, beside: str, good: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(good / "model", tmp_path / "in")
    (source / beside).write_bytes(pickle.dumps(Trap(tmp_path / "it ran")))
    convert(name, source, tmp_path / "out", None, trust_remote_code=True)
    assert not (tmp_path / "it ran").exists()
    assert not (tmp_path / "out" / beside).exists()


CODE = """
from pathlib import Path
from mlx_lm.models.llama import Model, ModelArgs
from transformers import PreTrainedTokenizerFast as Evil
Path({!r}).touch()
"""
AUTO = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}


def with_code(file: str, ran: Path, **values: Any) -> Spoil:
    """Put code into the folder that creates a file, and name it in a JSON file."""

    def spoil(folder: Path) -> None:
        (folder / "evil.py").write_text(CODE.format(str(ran)))
        changed(file, **values)(folder)

    return spoil


@models
@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (CONFIG, {"model_file": "evil.py"}, "trust_remote_code"),
        (CONFIG, {"model_file": "../in/evil.py"}, "trust_remote_code"),
        (CONFIG, {"model_type": "evil", "auto_map": AUTO}, ""),
        (CONFIG, {"model_type": "evil", "auto_map": AUTO, "model_file": "evil.py"}, ""),
        (SETTINGS, TOKENIZER, "custom code"),
    ],
)
def test_code_is_refused(
    name: str, file: str, values: dict, message: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert message in refused(name, with_code(file, tmp_path / "it ran", **values))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.xfail(
    strict=True, reason="transformers asks on stdout, and a y on stdin runs the code"
)
@pytest.mark.parametrize("name", ["from-hf", "alone", "to-peft"])
def test_code_of_a_tokenizer_is_not_asked_for(name: str, good: Path, tmp_path: Path) -> None:
    source = shutil.copytree(good / "model", tmp_path / "in")
    with_code(SETTINGS, tmp_path / "it ran", **TOKENIZER)(source)
    adapter = str(good / "mlx")
    called = {
        "from-hf": ("convert", "from-hf", "in", "out"),
        "alone": ("fuse", "out", "--model", "in"),
        "to-peft": ("convert", "to-peft", adapter, "out", "--model", "in"),
    }
    ran = program(tmp_path, *called[name], answer="y\n" * 9)
    assert not (tmp_path / "it ran").exists()
    assert (ran.returncode, ran.stdout) == (2, "")


@models
def test_code_that_is_not_needed_is_not_run(name: str, good: Path, tmp_path: Path) -> None:
    """A llama is a llama, whatever else its config.json says."""
    source = shutil.copytree(good / "model", tmp_path / "in")
    with_code(CONFIG, tmp_path / "it ran", auto_map=AUTO)(source)
    convert(name, source, tmp_path / "out", None, verify=True)
    assert not (tmp_path / "it ran").exists()
    assert not list(tmp_path.glob("out/*.py"))


@models
def test_code_runs_with_trust_alone(name: str, good: Path, tmp_path: Path) -> None:
    source = shutil.copytree(good / "model", tmp_path / "in")
    with_code(CONFIG, tmp_path / "it ran", model_file="evil.py")(source)
    convert(name, source, tmp_path / "out", None, trust_remote_code=True)
    assert (tmp_path / "it ran").exists()


@models
@pytest.mark.xfail(strict=True, reason="auto_map is kept, its code is not copied: none can load it")
def test_no_code_is_named_that_is_not_there(name: str, good: Path, tmp_path: Path) -> None:
    source = shutil.copytree(good / "model", tmp_path / "in")
    changed(CONFIG, auto_map=AUTO)(source)
    convert(name, source, tmp_path / "out", None, **{"format": "mlx"} if name == "alone" else {})
    assert "auto_map" not in json.loads((tmp_path / "out" / CONFIG).read_text())


# --- on the command line ---------------------------------------------------------------------


def nothing(folder: Path) -> None:
    """Leave the input as it is."""


@pytest.mark.parametrize(
    ("name", "arguments", "spoil", "message"),
    [
        ("to-peft", (), nested(rank=0), "rank is 0; it must be 1 to 65536"),
        ("to-peft", ("--model", "./nope"), nothing, "there is no such folder"),
        (
            "to-peft",
            (),
            lambda f: (f / FILE["mlx"]).write_bytes(b"\n" * 99),
            "no sound safetensors",
        ),
        ("to-peft", ("--dtype", "int8"), nothing, "invalid choice: 'int8'"),
        ("from-peft", (), changed(ADAPTER, r="8\n9"), "rank 8 9 of"),
        ("from-peft", (), changed(ADAPTER, peft_type="A\r\n\u2028B"), "peft_type is A B, only"),
        ("from-peft", (), changed(ADAPTER, target_modules="("), "the pattern '('"),
        defect(
            ("from-peft", (), changed(ADAPTER, peft_type="\x1b[2J\x07"), "peft_type"),
            "control characters of the input reach the terminal",
        ),
        ("from-hf", ("--quantize", "7"), nothing, "quantize is 7"),
        ("from-hf", ("--group-size", "1"), nothing, "group_size is 1"),
        ("from-hf", (), changed(CONFIG, model_file="evil.py"), "trust"),
        ("from-hf", ("--revision", "x"), nothing, "is a local folder; leave it out"),
        ("fuse", (), nested(scale="x"), "scale is x; it must be a finite number"),
        ("fuse", ("--quantize",), nothing, "this base is not quantized"),
        ("fuse", ("--format", "gguf"), nothing, "invalid choice: 'gguf'"),
    ],
)
def test_one_line_and_status_2(
    name: str,
    arguments: tuple[str, ...],
    spoil: Spoil,
    message: str,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, output = shutil.copytree(good / SOURCE[name], tmp_path / "in"), tmp_path / "out"
    spoil(source)
    before = content(tmp_path)
    places = [output, "--adapter", source] if name == "fuse" else [name, source, output]
    ran = command(capsys, "fuse" if name == "fuse" else "convert", *places, *arguments)
    found = complaint(ran)
    assert message in found
    assert found.isprintable()
    assert content(tmp_path) == before


@conversions
@pytest.mark.parametrize("dtype", ["int8", "float64"])
@pytest.mark.xfail(strict=True, reason="an unknown dtype of the Python functions: KeyError")
def test_types_that_are_none(name: str, dtype: Any, refused: Callable[..., str]) -> None:
    assert "dtype" in refused(name, nothing, dtype=dtype)


@pytest.mark.xfail(strict=True, reason="nothing is packed, and config.json says that it is")
def test_packing_nothing_is_said(refused: Callable[..., str]) -> None:
    refused("from-hf", nothing, quantize=4, group_size=64)
