"""The comparison of engines notices an engine that is wrong."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from helpers.devices import on_stand_in_gpu
from helpers.doctor import tiny_example

from mlx_simpo.doctor import equality as module
from mlx_simpo.doctor.equality import TOLERANCES, equality, tolerances
from mlx_simpo.engine.choice import Engine, shared_prefix_engine
from mlx_simpo.engine.figures import default_figures
from mlx_simpo.kernels.choice import BUILT_IN


def compared(**changes: Any) -> list[dict[str, Any]]:
    return [*equality(tiny_example(**changes), BUILT_IN, default_figures())]


def test_each_attention_agrees_with_and_without_checkpointing() -> None:
    checks = compared()
    ways = [(check["attention"], check["checkpointing"]) for check in checks]
    assert ways == [("blocks", False), ("blocks", True), ("mlx", False), ("mlx", True)]
    for check in checks:
        assert check["passed"]
        assert check["problem"] is None
        assert check["error"] < 1e-5
        assert check["gradient_error"] < 1e-4


def planted(change: Callable[[mx.array, bool], mx.array]) -> Callable[..., Engine]:
    """Return a function in the place of `shared_prefix_engine` whose log-probabilities differ."""

    def build(*arguments: Any) -> Engine:
        engine = shared_prefix_engine(*arguments)

        def logps(model: Any, arrays: tuple, training: bool) -> mx.array:
            return change(engine.logps(model, arrays, training=training), training)

        return engine._replace(logps=logps)

    return build


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda logps, training: logps + (0 if training else 1e-3), "error"),
        (lambda logps, training: logps + (1e-3 if training else 0), "error"),
        # The value is right, and the gradient is not.
        (lambda logps, training: mx.stop_gradient(0.01 * logps) + 0.99 * logps, "gradient_error"),
    ],
)
def test_a_planted_difference_fails(
    change: Any, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "shared_prefix_engine", planted(change))
    tolerance = {"error": "tolerance", "gradient_error": "gradient_tolerance"}[wrong]
    for check in compared():
        assert not check["passed"]
        assert check[wrong] > check[tolerance]


def test_what_is_not_a_number_fails_and_is_null_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    change = planted(lambda logps, training: logps * mx.nan)
    monkeypatch.setattr(module, "shared_prefix_engine", change)
    assert {(check["error"], check["passed"]) for check in compared()} == {(None, False)}


def test_an_engine_that_fails_is_reported_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any, implementation: Any, attention: str, figures: Any) -> Engine:
        if attention == "mlx":
            raise RuntimeError("no such kernel")
        return shared_prefix_engine(model, implementation, "blocks", figures)

    monkeypatch.setattr(module, "shared_prefix_engine", fail)
    blocks, _, mlx, _ = compared()
    assert blocks["passed"]
    assert not mlx["passed"]
    assert mlx["problem"] == "RuntimeError: no such kernel"


def test_float32_on_a_gpu_may_be_rounded_in_matrix_products() -> None:
    assert tolerances("bfloat16") == TOLERANCES["bfloat16"]
    with on_stand_in_gpu():
        assert tolerances("float32") > TOLERANCES["float32"]
        assert tolerances("bfloat16") == TOLERANCES["bfloat16"]
