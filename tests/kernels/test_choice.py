"""Which implementation runs, and that the check before first use notices a kernel that is wrong."""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.devices import on_cpu, on_gpu

from mlx_simpo.errors import SimPOError
from mlx_simpo.kernels import choice, launch
from mlx_simpo.kernels.built_in import mlx_response_logps

Outputs = tuple[mx.array, mx.array | None]


def test_on_a_cpu_mlx_operations_run() -> None:
    with on_cpu():
        implementation = choice.choose_implementation()
        assert implementation.name == "mlx"
        assert implementation.response_logps is mlx_response_logps
        assert implementation.note == "MLX's own operations (mlx-simpo's kernel needs a GPU)"
        with pytest.raises(SimPOError, match=r"logps\.impl is kernel, but MLX runs on the CPU"):
            choice.choose_implementation("kernel")


@pytest.mark.parametrize("device", [on_cpu, on_gpu])
def test_mlx_operations_run_wherever_they_are_asked_for(device: Any) -> None:
    with device():
        implementation = choice.choose_implementation("mlx")
    assert implementation.name == "mlx"
    assert implementation.response_logps is mlx_response_logps
    assert implementation.note == "MLX's own operations, as logps.impl=mlx asks"


@pytest.mark.parametrize("name", ["auto", "kernel"])
def test_on_a_gpu_the_kernel_runs_once_it_is_checked(
    name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(choice, "check_kernel", checked.append)
    monkeypatch.setattr(choice, "backend", lambda: "CUDA")
    implementation = choice.choose_implementation(name)
    assert implementation.name == "kernel"
    assert implementation.response_logps is launch.kernel_response_logps
    assert implementation.note == "the CUDA kernel, which agrees with MLX's own operations"
    assert checked == ["CUDA"]


def test_the_kernel_passes_its_check() -> None:
    """Once: it costs launches."""
    with on_gpu():
        assert choice.choose_implementation().name == "kernel"
        choice.choose_implementation()
        assert choice.check_kernel.cache_info().misses == 1


# --- wrong kernels ---------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Takes the place of the kernel, and checks what does."""
    choice.check_kernel.cache_clear()

    def check(kernel: Any) -> None:
        monkeypatch.setattr(choice, "kernel_response_logps", kernel)
        choice.check_kernel("Metal")

    yield check
    choice.check_kernel.cache_clear()


def off_by(where: Callable[[mx.array], Any], error: float = 1e-3) -> Any:
    """Return a kernel whose log p is off in the rows of raw logits of which ``where`` is true."""

    def kernel(raw_logits: mx.array, targets: mx.array, **settings: Any) -> Outputs:
        logps, gradient = mlx_response_logps(raw_logits, targets, **settings)
        return logps + error * mx.array(where(raw_logits)), gradient

    return kernel


def with_settings(**others: Any) -> Any:
    """Return a kernel that ignores some of its settings."""

    def kernel(raw_logits: mx.array, targets: mx.array, **settings: Any) -> Outputs:
        outputs = mlx_response_logps(raw_logits, targets, **{**settings, **others})
        return outputs[0], outputs[1] if settings["gradient"] else None

    return kernel


def in_gradient(change: Callable[[mx.array, mx.array], mx.array]) -> Any:
    """Return a kernel with another gradient: ``change`` of gradient and targets."""

    def kernel(raw_logits: mx.array, targets: mx.array, **settings: Any) -> Outputs:
        logps, gradient = mlx_response_logps(raw_logits, targets, **settings)
        if gradient is None:
            return logps, None
        return logps, change(gradient, targets[:, None]).astype(raw_logits.dtype)

    return kernel


def without_gradient(raw_logits: mx.array, targets: mx.array, **settings: Any) -> Outputs:
    logps, gradient = mlx_response_logps(raw_logits, targets, **settings)
    return logps if settings["gradient"] else logps + 1e-3, gradient


def number_for_nan(raw_logits: mx.array, targets: mx.array, **settings: Any) -> Outputs:
    logps, gradient = mlx_response_logps(raw_logits, targets, **settings)
    return mx.where(mx.isnan(logps), 0.0, logps), gradient


WRONG_KERNELS = {
    **{f"in {dtype}": off_by(lambda x, d=dtype: x.dtype == d) for dtype in launch.DTYPES},
    **{
        f"for {size} tokens": off_by(lambda x, size=size: x.shape[1] == size)
        for size in (3, 1030, 8201)
    },
    "far below 0": off_by(lambda x: (x.max(axis=1) < -100) & (x.max(axis=1) > -1000), np.inf),
    "farther below 0": off_by(lambda x: x.max(axis=1) < -1000, np.inf),
    "far above 0": off_by(lambda x: x.min(axis=1) > 1000, 1e-4),
    "by little": off_by(lambda x: 1.0, 3e-5),
    "where tokens are masked": off_by(lambda x: mx.isinf(x).any(axis=1)),
    "without a gradient": without_gradient,
    "another scale": with_settings(scale=1.0),
    "no softcap": with_settings(softcap=0.0),
    "another softcap": with_settings(softcap=5.1),
    "number for NaN": number_for_nan,
    "NaN for a number": off_by(lambda x: x.shape[0] == 11, np.nan),
    "gradient in bfloat16": in_gradient(
        lambda gradient, _: gradient * (1.03 if gradient.dtype == mx.bfloat16 else 1)
    ),
    "gradient of ignored rows": in_gradient(lambda gradient, y: gradient + 1e-3 * (y == -100)),
    "number for NaN in the gradient": in_gradient(
        lambda gradient, y: mx.where(y == -1, 0.0, gradient)
    ),
    "every negative target ignored": in_gradient(
        lambda gradient, y: mx.where(y == -101, 0.0, gradient)
    ),
    "target beyond the vocabulary": in_gradient(
        lambda gradient, y: mx.where(y == gradient.shape[1], 0.0, gradient)
    ),
    "last token's gradient": in_gradient(lambda gradient, _: gradient.at[:, -1].add(1e-2)),
}


@pytest.mark.parametrize("kernel", WRONG_KERNELS.values(), ids=WRONG_KERNELS)
def test_a_wrong_kernel_is_an_error(kernel: Any, checked: Callable[[Any], None]) -> None:
    with pytest.raises(
        SimPOError,
        match=r"the Metal kernel for log-probabilities is off by \S+ \(mlx\.core\.\S+, vocabulary "
        r"\d+, softcap \S+\)\. Please report .*logps\.impl=mlx trains without the kernel",
    ):
        checked(kernel)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_kernel_that_does_not_run_is_an_error(
    error: type[Exception], checked: Callable[[Any], None]
) -> None:
    def kernel(*_: object, **__: object) -> Outputs:
        raise error("no such function")

    with pytest.raises(SimPOError, match=r"the Metal kernel .* does not run: no such function"):
        checked(kernel)


def test_rounding_is_no_error(checked: Callable[[Any], None]) -> None:
    """Of float32, and of a gradient that is stored in half precision."""
    checked(off_by(lambda x: 1.0, 1e-5))
    choice.check_kernel.cache_clear()
    checked(in_gradient(lambda gradient, _: gradient * (1 + mx.finfo(gradient.dtype).eps / 2)))
