"""Configurations of adapters that are broken or mean harm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.hostile import ADAPTER, FILE, LONG, Spoil, changed, nested

PATTERN_ERRORS = (
    "(",
    "a{99999999999999999999}",
    "(" * 2000 + ")" * 2000,
)
PEFT = [
    *(({"r": rank}, "it must be 1 to") for rank in (0, -1, 2**40, 1e300, "8", True, None, [8])),
    *(
        ({"lora_alpha": alpha}, "it must be a finite number")
        for alpha in (float("inf"), float("nan"), "8", [1], True, None, {})
    ),
    ({"lora_alpha": 0}, "changes nothing"),
    ({"lora_alpha": LONG}, "lora_alpha"),
    ({"alpha_pattern": {"q_proj": LONG}}, "lora_alpha"),
    ({"alpha_pattern": {"q_proj": None}}, "it must be a finite number"),
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


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}"])
def test_layers_pattern_that_is_none(pattern: str, refused: Callable[..., str]) -> None:
    values = {"layers_to_transform": [0], "layers_pattern": pattern}
    assert "the pattern" in refused("from-peft", changed(ADAPTER, **values))


@pytest.mark.parametrize("pattern", [r"(.|\w)+X", ".*" * 30 + "X", "a" * 5000])
def test_a_pattern_that_takes_for_ever(pattern: str, refused: Callable[..., str]) -> None:
    found = refused("from-peft", changed(ADAPTER, target_modules=pattern), seconds=3)
    assert "list the modules by name" in found


@pytest.mark.parametrize(
    "values",
    [
        {"layers_to_transform": [0]},
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["q_proj"]},
        {"target_parameters": ["mlp.up.weight"]},
    ],
)
def test_peft_settings_that_the_tensors_contradict(
    values: dict, refused: Callable[..., str]
) -> None:
    refused("from-peft", changed(ADAPTER, **values))


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
        (nested(scale=LONG), "finite"),
        (nested(scale=True), "finite"),
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
        (changed(ADAPTER, fine_tune_type="dora"), "not a complete adapter of this model"),
        (changed(ADAPTER, peft_type="LORA"), "holds a PEFT adapter"),
    ],
)
def test_mlx_settings(name: str, spoil: Spoil, message: str, refused: Callable[..., str]) -> None:
    assert message in refused(name, spoil)


def test_a_scale_that_overflows_with_its_rank(refused: Callable[..., str]) -> None:
    refused("to-peft", nested(scale=1.7e308))


@pytest.mark.parametrize("name", ["to-peft", "fuse"])
def test_a_whole_scale_of_more_than_63_bits(name: str, refused: Callable[..., str]) -> None:
    refused(name, nested(scale=2**64), verify=True)


@pytest.mark.parametrize("name", ["to-peft", "fuse", "from-peft"])
def test_a_scale_that_makes_no_numbers(name: str, refused: Callable[..., str]) -> None:
    spoil = changed(ADAPTER, lora_alpha=1e300) if name == "from-peft" else nested(scale=1e300)
    assert "of at most 1e+06" in refused(name, spoil, verify=True)


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
        "to-peft",
        "fuse",
    ],
)
def test_adapters_of_whole_numbers(name: str, refused: Callable[..., str]) -> None:
    assert "float" in refused(name, retyped(mx.int32))


@pytest.mark.parametrize(
    ("name", "file", "raw"),
    [
        ("to-peft", "summary.json", b"{"),
        ("fuse", "summary.json", b"\xff"),
        ("to-peft", "summary.json", b"[" * 10**5),
        ("fuse", "chat_template.jinja", b"\xff"),
    ],
)
def test_files_beside_an_adapter(
    name: str, file: str, raw: bytes, refused: Callable[..., str]
) -> None:
    assert file in refused(name, lambda folder: (folder / file).write_bytes(raw))
