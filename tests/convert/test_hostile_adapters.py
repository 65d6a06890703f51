"""Adapter configurations that are broken or malicious: one error that says what is wrong."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.hostile import (
    ADAPTER_CONFIG,
    HUGE_INTEGER,
    WEIGHTS,
    Corrupt,
    Reject,
    assert_mentions,
    set_json,
    set_lora_parameters,
)

INFINITY, NAN = float("inf"), float("nan")
BAD_RANKS = (0, -1, 2**40, 1e300, "8", True, None)
BAD_SCALES = (INFINITY, NAN, "8", [1], True, None, HUGE_INTEGER, 2**64, 1e300)
MAX_RANK, MAX_SCALE = "65536", "1e+06"

# Settings of a PEFT adapter → parts of the message: the setting, its value, the rule.
PEFT_SETTINGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *(({"r": r}, ("rank", f" {str(r)[:40]} ", MAX_RANK)) for r in (*BAD_RANKS, [8])),
    *(
        ({"lora_alpha": alpha}, ("lora_alpha", f" {str(alpha)[:40]} ", "finite", MAX_SCALE))
        for alpha in (*BAD_SCALES, {})
    ),
    ({"lora_alpha": 0}, ("scale is 0", "nothing")),
    ({"alpha_pattern": {"q_proj": HUGE_INTEGER}}, ("lora_alpha", "10000", "q_proj", MAX_SCALE)),
    ({"alpha_pattern": {"q_proj": None}}, ("lora_alpha", "None", "q_proj", "finite")),
    ({"alpha_pattern": ["q_proj"]}, ("alpha_pattern", "['q_proj']", "dict")),
    ({"rank_pattern": {"q_proj": "2"}}, ("rank 2 ", "q_proj", MAX_RANK)),
    ({"rank_pattern": {"q_proj": 3}}, ("q_proj", "(2, 32)", "(32, 2)", "rank 3")),
    ({"rank_pattern": "q_proj"}, ("rank_pattern", "q_proj", "dict")),
    ({"target_modules": ["q_proj", 3]}, ("target_modules", "['q_proj', 3]", "list")),
    ({"target_modules": 3}, ("target_modules", "3", "str", "list")),
    ({"target_modules": "all-linear"}, (" 10 ", "model.layers.0.mlp.gate_proj", "incomplete")),
    ({"exclude_modules": [{}]}, ("exclude_modules", "[{}]", "list")),
    ({"layers_to_transform": "0"}, ("layers_to_transform", "0", "int", "list")),
    ({"target_parameters": "x"}, ("target_parameters", " x", "list")),
    ({"use_rslora": 1}, ("use_rslora", "1", "bool")),
    ({"use_dora": "yes"}, ("use_dora", "yes", "bool")),
    ({"use_dora": True}, ("q_proj", "tensors", "magnitude_vector")),
    ({"base_model_name_or_path": 3}, ("base_model_name_or_path", "3", "str")),
    ({"base_model_name_or_path": [1]}, ("base_model_name_or_path", "[1]", "str")),
    ({"revision": 3}, ("revision", "3", "str")),
    ({"peft_type": None}, ("peft_type", "None", "LORA")),
    ({"peft_type": ["LORA"]}, ("peft_type", "['LORA']", "only")),
    ({"peft_type": "IA3"}, ("peft_type", "IA3", "LORA")),
    ({"bias": "all"}, ("bias", " all", "none")),
    ({"bias": {"x": 1}}, ("bias", "{'x': 1}", "none")),
    *(
        ({"init_lora_weights": method}, ("init_lora_weights", method, "base model"))
        for method in ("pissa", "PiSSA_niter_16", "olora", "corda", "loftq", "lora_ga")
    ),
    ({"modules_to_save": ["lm_head"]}, ("modules_to_save", "layers")),
    ({"lora_bias": True}, ("lora_bias", "biases")),
    ({"trainable_token_indices": [1]}, ("trainable_token_indices", "tokens")),
    ({"layer_replication": [[0, 1]]}, ("layer_replication", "repeat")),
    ({"fan_in_fan_out": True}, ("fan_in_fan_out", "transposed")),
    ({"use_qalora": True}, ("use_qalora", "known")),
    ({"x" * 10_000: {"y": 1}}, ("x" * 60 + " ", "known")),
    # All such settings in one message.
    ({"bias": "all", "lora_bias": True, "new": 1}, ("bias", " all", "lora_bias", "new ")),
    # Settings that contradict the tensors beside them.
    ({"layers_to_transform": [0]}, (" 2 modules", "model.layers.1.mlp.down_proj", "PEFT")),
    ({"target_modules": ["q_proj"]}, (" 2 modules", "model.layers.0.mlp.down_proj", "PEFT")),
    ({"exclude_modules": ["q_proj"]}, (" 2 modules", "layers.0.self_attn.q_proj", "PEFT")),
    ({"target_parameters": ["mlp.up.weight"]}, ("mlp.up.weight", "no tensors", "incomplete")),
]


@pytest.mark.parametrize(("values", "parts"), PEFT_SETTINGS)
def test_peft_settings(values: dict[str, Any], parts: tuple[str, ...], reject: Reject) -> None:
    assert_mentions(reject("from-peft", set_json(ADAPTER_CONFIG, **values)), *parts)


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [
        *(("target_modules", p) for p in ("(", "a{99999999999999999999}", "(" * 2000 + ")" * 2000)),
        ("exclude_modules", "("),
        ("rank_pattern", "("),
        ("alpha_pattern", "a{99999999999999999999}"),
        ("layers_pattern", "("),
    ],
)
def test_invalid_patterns(setting: str, pattern: str, reject: Reject) -> None:
    values: dict[str, Any] = {setting: {pattern: 2} if "_pattern" in setting else pattern}
    if setting == "layers_pattern":
        values = {"layers_to_transform": [0], setting: pattern}
    elif setting == "exclude_modules":
        values["target_modules"] = ".*q_proj"
    message = reject("from-peft", set_json(ADAPTER_CONFIG, **values))
    assert_mentions(message, ADAPTER_CONFIG, "pattern", pattern[:50])


@pytest.mark.parametrize("pattern", [r"(.|\w)+X", ".*" * 30 + "X", "a" * 5000])
def test_patterns_that_could_take_for_ever(pattern: str, reject: Reject) -> None:
    corrupt = set_json(ADAPTER_CONFIG, target_modules=pattern)
    message = reject("from-peft", corrupt, seconds=3)
    assert_mentions(message, "pattern", repr(pattern[:50])[:-1], "list the modules by name")


# Damage to an mlx-lm adapter's configuration → parts of the message. "does not fit" is what mlx-lm
# itself has against it; what follows there are mlx-lm's words.
MLX_SETTINGS: list[tuple[Corrupt, tuple[str, ...]]] = [
    *((set_lora_parameters(rank=r), ("rank", f" {r};", MAX_RANK)) for r in BAD_RANKS),
    (set_lora_parameters(rank=3), ("not fit", "lora_b", "(2, 32)")),
    *(
        (set_lora_parameters(scale=s), ("scale", f" {str(s)[:40]};", "finite", MAX_SCALE))
        for s in (*BAD_SCALES, 1.7e308)
    ),
    (set_lora_parameters(dropout="x"), ("not fit", "'str'")),
    (set_lora_parameters(dropout=5), ("not fit", "dropout", "5")),
    (set_lora_parameters(keys=[]), ("not fit", "incompatible", "self_attn.q_proj.lora_b")),
    (set_lora_parameters(keys=["nope"]), ("not fit", "incompatible", "self_attn.q_proj.lora_b")),
    (set_lora_parameters(keys="q_proj"), ("keys", "list of names", "q_proj")),
    (set_lora_parameters(keys=[1]), ("keys", "list of names", "[1]")),
    (set_lora_parameters(keys=["self_attn"]), ("not fit", "Attention")),
    (set_lora_parameters(keys=["model"]), ("not fit", "LlamaModel")),
    (set_json(ADAPTER_CONFIG, num_layers="2"), ("num_layers", " 2;", "whole number")),
    (set_json(ADAPTER_CONFIG, num_layers=True), ("num_layers", "True", "whole number")),
    (set_json(ADAPTER_CONFIG, lora_parameters=[]), ("lora_parameters", "adapter")),
    (set_json(ADAPTER_CONFIG, fine_tune_type="full"), ("fine_tune_type", "full", "lora", "dora")),
    (set_json(ADAPTER_CONFIG, fine_tune_type=["lora"]), ("fine_tune_type", "['lora']", "dora")),
    (set_json(ADAPTER_CONFIG, fine_tune_type="dora"), ("4 missing", "mlp.down_proj.m")),
    (set_json(ADAPTER_CONFIG, peft_type="LORA"), ("PEFT adapter", "convert from-peft")),
]


@pytest.mark.parametrize(("corrupt", "parts"), MLX_SETTINGS)
def test_mlx_settings(corrupt: Corrupt, parts: tuple[str, ...], reject: Reject) -> None:
    assert_mentions(reject("to-peft", corrupt), *parts)


def test_fuse_checks_the_same_settings(reject: Reject) -> None:
    """fuse reads an adapter as to-peft does: our own checks, then mlx-lm's, then completeness."""
    for corrupt, parts in (
        (set_lora_parameters(rank=0), ("rank", " 0;", MAX_RANK)),
        (set_lora_parameters(keys=["nope"]), ("not fit", "self_attn.q_proj.lora_b")),
        (set_json(ADAPTER_CONFIG, fine_tune_type="dora"), ("4 missing", "mlp.down_proj.m")),
    ):
        assert_mentions(reject("fuse", corrupt), *parts)


def config_bytes(raw: bytes | None) -> Corrupt:
    """Return a function that replaces an adapter's configuration; None removes it."""

    def corrupt(folder: Path) -> None:
        (folder / ADAPTER_CONFIG).unlink()
        if raw is not None:
            (folder / ADAPTER_CONFIG).write_bytes(raw)

    return corrupt


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "object"),
        (b"null", "object"),
        (b"5", "object"),
        (b"\xff\xfe", "utf-8"),
        (b"1" * 5000, "5000 digits"),
        (b"[" * 10**6, "recursion"),
        (None, "no such file"),
    ],
)
def test_configurations_that_are_not_json_objects(
    raw: bytes | None, reason: str, reject: Reject
) -> None:
    message = reject("to-peft", config_bytes(raw))
    assert_mentions(message, f"source/{ADAPTER_CONFIG}", reason)


@pytest.mark.parametrize("conversion", ["fuse", "from-peft"])
def test_every_conversion_reads_configurations_alike(conversion: str, reject: Reject) -> None:
    for raw, reason in (
        (b"{", "Expecting property name"),
        (b"[]", "object"),
        (None, "no such file"),
    ):
        message = reject(conversion, config_bytes(raw))
        assert_mentions(message, f"source/{ADAPTER_CONFIG}", reason)


def exchange_a_and_b(folder: Path) -> None:
    """Save each A under B's name and the other way round."""
    path = next(folder.glob("adapter*.safetensors"))
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    other = {"lora_A": "lora_B", "lora_B": "lora_A", "lora_a": "lora_b", "lora_b": "lora_a"}
    exchanged = {
        ".".join(other.get(part, part) for part in name.split(".")): mx.array(weight)
        for name, weight in weights.items()
    }
    mx.save_safetensors(str(path), exchanged, {"format": "pt"})


def save_as_integers(folder: Path) -> None:
    """Save an adapter's weights as whole numbers."""
    path = next(folder.glob("adapter*.safetensors"))
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    integers = {name: (weight * 3).astype(mx.int32) for name, weight in weights.items()}
    mx.save_safetensors(str(path), integers, {"format": "pt"})


@pytest.mark.parametrize(
    ("conversion", "parts"),
    [("to-peft", ("lora_b", "(32, 2)")), ("from-peft", ("down_proj", "(32, 2)", "(2, 48)"))],
)
def test_a_and_b_exchanged(conversion: str, parts: tuple[str, ...], reject: Reject) -> None:
    assert_mentions(reject(conversion, exchange_a_and_b), *parts)


@pytest.mark.parametrize(
    ("conversion", "parts"),
    [
        ("to-peft", (WEIGHTS["mlx"], "8 not floating-point", "down_proj.lora_a")),
        ("from-peft", ("down_proj", "int32", "float")),
    ],
)
def test_adapters_of_whole_numbers(conversion: str, parts: tuple[str, ...], reject: Reject) -> None:
    assert_mentions(reject(conversion, save_as_integers), *parts)


@pytest.mark.parametrize(
    ("conversion", "file", "raw", "reason"),
    [
        ("to-peft", "summary.json", b"{", "Expecting property name"),
        ("fuse", "summary.json", b"\xff", "utf-8"),
        ("to-peft", "summary.json", b"[" * 10**5, "recursion"),
        ("fuse", "chat_template.jinja", b"\xff", "utf-8"),
    ],
)
def test_bad_files_beside_an_adapter(
    conversion: str, file: str, raw: bytes, reason: str, reject: Reject
) -> None:
    message = reject(conversion, lambda folder: (folder / file).write_bytes(raw))
    assert_mentions(message, f"source/{file}", reason)
