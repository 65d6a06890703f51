"""The checks of log-probabilities notice what is wrong, in every dtype."""

from typing import Any

import mlx.core as mx
import pytest

from mlx_simpo.doctor import kernel
from mlx_simpo.kernels.choice import BUILT_IN


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SIZES", (2, 1027))


def test_mlx_operations_pass() -> None:
    results = kernel.checks(BUILT_IN)
    assert len(results) == 12
    assert all(result["passed"] for result in results)


def shifted_logps(*arrays: Any, **settings: Any) -> tuple:
    logps, gradient = BUILT_IN.response_logps(*arrays, **settings)
    return logps + 1e-3, gradient


def scaled_gradient(*arrays: Any, **settings: Any) -> tuple:
    logps, gradient = BUILT_IN.response_logps(*arrays, **settings)
    assert gradient is not None
    return logps, 1.05 * gradient


def wrapped_targets(raw_logits: mx.array, targets: mx.array, **settings: Any) -> tuple:
    return BUILT_IN.response_logps(raw_logits, targets % raw_logits.shape[1], **settings)


@pytest.mark.parametrize("wrong", [shifted_logps, scaled_gradient, wrapped_targets])
def test_a_wrong_implementation_fails(wrong: Any) -> None:
    results = kernel.checks(BUILT_IN._replace(response_logps=wrong))
    failed = {(r["dtype"], r["vocabulary"]) for r in results if not r["passed"]}
    assert ("float32", 1027) in failed


def test_times_are_of_three_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "TIMED_ON_CPU", (mx.float32, (4, 1027)))
    monkeypatch.setattr(kernel, "TIMED_ON_GPU", (mx.float32, (4, 1027)))
    timings = kernel.timings(BUILT_IN)
    assert [t["method"] for t in timings] == [
        "mlx_simpo (mlx)",
        "mx.fast.cross_entropy",
        "plain operations",
    ]
    assert all(t["milliseconds"] > 0 and t["gb_per_second"] > 0 for t in timings)
