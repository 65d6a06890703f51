"""MLX's operations beside ours: which shapes, and what is told of them."""

from typing import Any

import mlx.core as mx
import pytest
from helpers.devices import on_cpu
from helpers.doctor import tiny_example

from mlx_simpo.doctor import operations as module
from mlx_simpo.doctor.examples import random_examples
from mlx_simpo.doctor.operations import checks_of_model, common_checks, delta_heads, delta_shape
from mlx_simpo.engine.agreement import Agreement


def test_a_model_is_checked_in_its_own_shapes() -> None:
    checks = [*checks_of_model(tiny_example().model)]
    assert [check["name"] for check in checks] == [
        "attention (training), head size 8 in float32",
        "attention (evaluation), head size 8 in float32",
    ]
    for check in checks:
        assert check["passed"]
        assert check["value_error"] < 1e-5
    assert checks[0]["gradient_error"] > 0
    assert checks[1]["gradient_error"] is None


def test_a_hybrid_has_its_delta_rule_checked() -> None:
    _, hybrid = random_examples()
    *_, last = checks_of_model(hybrid.model)
    assert last["name"] == "delta rule, 1/2 heads of size 128 in float32"
    assert last["passed"]
    assert 0 < last["gradient_error"] < 1e-4


def test_what_is_not_a_number_is_null_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(shape: Any) -> Agreement:
        return Agreement("MLX's", "float32", 0.0, float("nan"), 1e-3, where="the gradient of keys")

    monkeypatch.setattr(module, "check_fused_attention", check)
    training, _ = checks_of_model(tiny_example().model)
    assert training["gradient_error"] is None
    assert not training["passed"]
    assert training["where"] == "the gradient of keys"


def test_a_gpu_is_checked_in_the_shapes_of_common_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks themselves, which a stand-in could not run in another way than a CPU."""
    agreement = Agreement("MLX's", "float32", 0.0, 0.0, 1e-3)
    for name in ("check_fused_attention", "check_forward_attention", "check_fused_delta_rule"):
        monkeypatch.setattr(module, name, lambda shape: agreement)
    for name in ("has_fused_gradient", "has_fused_delta_gradient"):
        monkeypatch.setattr(module, name, lambda shape: True)
    monkeypatch.setattr(module, "is_gpu", lambda: True)
    names = {check["name"] for check in common_checks()}
    assert len(names) == 3 * (2 * 5 + 4)
    for name in (
        "attention (training), head size 80 in bfloat16",
        "attention (evaluation), head size 256 in float16",
        "delta rule, 16/32 heads of size 128 in float32",
    ):
        assert name in names


def test_the_hybrid_gets_heads_for_which_the_gradient_is_fused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with on_cpu():
        assert delta_heads() == (1, 2)
    monkeypatch.setattr(module, "is_gpu", lambda: True)
    fused = delta_shape(4, 8, mx.float32)
    monkeypatch.setattr(module, "has_fused_delta_gradient", lambda shape: shape == fused)
    assert delta_heads() == (4, 8)
    monkeypatch.setattr(module, "has_fused_delta_gradient", lambda shape: False)
    assert delta_heads() == (1, 2)
