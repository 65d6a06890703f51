"""PEFT adapters as they are written. (What PEFT computes with them: tests/parity.)"""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import arrays
from helpers.mlx_folders import MIXTRAL
from helpers.tiny import tiny_model

from mlx_simpo import SimPOError
from mlx_simpo.convert.architectures import TABLE
from mlx_simpo.convert.lora_delta import LoRADelta
from mlx_simpo.convert.names import Target
from mlx_simpo.convert.peft.write import (
    Written,
    integer,
    joined,
    scale_settings,
    short_names,
    write_peft,
)


def delta(rank: int = 2, scale: float = 2.0) -> LoRADelta:
    return LoRADelta(mx.random.normal((rank, 5)), mx.random.normal((4, rank)), scale)


def written(*deltas: LoRADelta) -> list[Written]:
    return [Written(Target(f"layers.{n}.q"), d, False) for n, d in enumerate(deltas)]


@pytest.mark.parametrize(
    ("scale", "rslora", "expected"),
    [
        (2.0, True, {"r": 2, "lora_alpha": 4, "use_rslora": False}),
        (8 / math.sqrt(2), True, {"r": 2, "lora_alpha": 8, "use_rslora": True}),
        (8 / math.sqrt(2), False, {"r": 2, "lora_alpha": 2, "use_rslora": False}),
        (1.23, True, {"r": 2, "lora_alpha": 2, "use_rslora": False}),
    ],
)
def test_lora_alpha_is_an_integer_and_b_holds_the_rest(
    scale: float, rslora: bool, expected: dict
) -> None:
    source = delta(scale=scale)
    settings, (module,) = scale_settings(written(source), rslora=rslora)
    assert settings.items() >= expected.items()
    root = math.sqrt(2) if settings["use_rslora"] else 2
    actual = settings["lora_alpha"] / root * np.array(module.delta.b)
    np.testing.assert_allclose(actual, scale * np.array(source.b), rtol=1e-6)


def test_other_ranks_and_scales_are_patterns() -> None:
    settings, modules = scale_settings(
        written(delta(), delta(), delta(rank=3), delta(scale=5.0)), rslora=True
    )
    assert (settings["r"], settings["lora_alpha"]) == (2, 4)
    assert settings["rank_pattern"] == {r"layers\.2\.q": 3}
    assert settings["alpha_pattern"] == {r"layers\.2\.q": 6, r"layers\.3\.q": 10}
    assert [module.delta.scale for module in modules] == [2.0, 2.0, 2.0, 5.0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(4.0, 4), (4.0000000000000009, 4), (4.001, None), (0.0, None), (-4.0, None), (0.4, None)],
)
def test_integers_up_to_rounding(value: float, expected: int | None) -> None:
    assert integer(value) == expected


@pytest.mark.parametrize("same_a", [False, True])
def test_projections_that_share_a_parameter_are_joined(same_a: bool) -> None:
    """The joined delta is the projections' own, one behind the other."""
    gate, up = (
        LoRADelta(mx.random.normal((2, 3, 5)), mx.random.normal((2, 4, 3)), scale)
        for scale in (2.0, 2.0 if same_a else 4.0)
    )
    if same_a:
        up = LoRADelta(gate.a, up.b, up.scale)
    whole = joined(Target("experts", "gate_up_proj", (0, 2)), {0: gate, 1: up}, 4)
    assert whole.rank == (3 if same_a else 6)
    expected = mx.concatenate([d.scale * d.b @ d.a for d in (gate, up)], axis=1)
    np.testing.assert_allclose(
        np.array(whole.scale * whole.b @ whole.a), np.array(expected), rtol=1e-4, atol=1e-5
    )


def test_short_names_are_used_where_they_match_no_other_module() -> None:
    modules = ["layers.0.q", "layers.1.q"]
    assert short_names(modules, {*modules, "layers.0.k"}) == ["q"]
    assert short_names(modules[:1], {*modules}) == ["layers.0.q"]


def test_experts_run_slowest_in_a_and_fastest_in_b(tmp_path: Path) -> None:
    model = tiny_model("mixtral", **MIXTRAL)
    path = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
    experts = LoRADelta(mx.random.normal((4, 2, 48)), mx.random.normal((4, 32, 2)), 2.0)
    write_peft(tmp_path, {path: experts}, model, TABLE["mixtral"], base="x", revision=None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["model.layers.0.mlp.experts.down_proj"]
    assert config["target_modules"] == []
    tensors = arrays(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    a, b = np.array(experts.a), np.array(experts.b)
    np.testing.assert_array_equal(tensors[name.format("A")], np.concatenate(list(a)))
    np.testing.assert_array_equal(
        tensors[name.format("B")], np.stack(list(b), axis=-1).reshape(32, 8)
    )


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("granitemoe", "granitemoe has never had single experts; omit it"),
        ("phimoe", "PEFT does not join single experts of phimoe; omit it"),
    ],
)
def test_single_experts_that_peft_does_not_support_are_rejected(
    model_type: str, message: str, tmp_path: Path
) -> None:
    model = tiny_model("mixtral", **MIXTRAL)
    path = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
    experts = LoRADelta(mx.zeros((4, 2, 48)), mx.zeros((4, 32, 2)), 2.0)
    options = {"base": "x", "revision": None, "separate_experts": True}
    with pytest.raises(SimPOError, match=f"--separate-experts: {message}"):
        write_peft(tmp_path, {path: experts}, model, TABLE[model_type], **options)
    assert list(tmp_path.iterdir()) == []
