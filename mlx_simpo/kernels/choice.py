"""Which implementation computes log-probabilities here, and the check that the kernel is right."""

from functools import cache
from typing import Literal, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..errors import SimPOError
from .built_in import IGNORE_INDEX, mlx_response_logps
from .launch import backend, kernel_response_logps

Name = Literal["auto", "kernel", "mlx"]

# The largest absolute difference between kernel and MLX operations. Both compute in float32;
# bfloat16 has 8 bits of precision, so one rounding of an entry of the gradient is up to 4e-3.
TOLERANCES = {mx.float32: 2e-5, mx.bfloat16: 1e-2}


class ResponseLogps(Protocol):
    """Log-probabilities of target tokens from rows of logits, and their gradient.

    Args:
        raw_logits: [C, V] float32, float16 or bfloat16, the head's matrix product before scale and
            softcap: logits are softcap · tanh(scale · raw_logits / softcap), or
            scale · raw_logits where softcap is 0.
        targets: int32 [C], token ids. A row whose target is IGNORE_INDEX has log-probability 0 and
            gradient 0; any other number outside [0, V) gives NaN.
        gradient: whether the gradient is computed.

    Returns:
        log p(targets), float32 [C], in nats; and ∂ log p/∂raw_logits [C, V] in the dtype of
        raw_logits, or None. The gradient is not multiplied by a loss's cotangent, which may be
        small enough to cost half precision its digits.
    """

    def __call__(
        self,
        raw_logits: mx.array,
        targets: mx.array,
        *,
        scale: float,
        softcap: float,
        gradient: bool,
    ) -> tuple[mx.array, mx.array | None]: ...


class Implementation(NamedTuple):
    """An implementation of `ResponseLogps`; ``note`` tells users which one runs and why."""

    name: str
    note: str
    response_logps: ResponseLogps


BUILT_IN = Implementation("mlx", "MLX's own operations", mlx_response_logps)


def choose_implementation(name: Name = "auto") -> Implementation:
    """Return the implementation of that name; auto: the kernel on a GPU, MLX operations on a CPU.

    A kernel is checked before it is returned. Nothing falls back: a kernel that fails is an error.

    Raises:
        SimPOError: ``kernel`` was requested but MLX runs on the CPU, or the kernel does not compile
            or disagrees with MLX operations.
    """
    gpu = backend()
    if name == "mlx":
        return BUILT_IN._replace(note="MLX's own operations, as logps.impl=mlx asks")
    if gpu is None and name == "kernel":
        raise SimPOError(
            "logps.impl is kernel, but MLX runs on the CPU here and the kernel needs a GPU (Metal "
            "or CUDA); leave it out, or set logps.impl=mlx"
        )
    if gpu is None:
        return BUILT_IN._replace(note="MLX's own operations (mlx-simpo's kernel needs a GPU)")
    check_kernel(gpu)
    note = f"the {gpu} kernel, which agrees with MLX's own operations"
    return Implementation("kernel", note, kernel_response_logps)


@cache
def check_kernel(gpu: str) -> None:
    """Compare the kernel with MLX operations on a small input; once per process.

    Args:
        gpu: "Metal" or "CUDA", for the message.

    Raises:
        SimPOError: the kernel does not compile or run, or its results differ.
    """
    for dtype, tolerance in TOLERANCES.items():
        for scale, softcap in ((1.0, 0.0), (0.5, 5.0)):
            raw_logits, targets = _sample(dtype)
            settings = {"scale": scale, "softcap": softcap, "gradient": True}
            try:
                actual = kernel_response_logps(raw_logits, targets, **settings)
                mx.eval(actual)  # compiles and runs it, so that both kinds of failure end here
            except (RuntimeError, ValueError) as error:
                raise SimPOError(_failure(gpu, f"does not run: {error}")) from error
            expected = mlx_response_logps(raw_logits, targets, **settings)
            for one, two in zip(actual, expected, strict=True):
                difference = _largest_difference(one, two)
                if not difference <= tolerance:
                    what = f"is off by {difference:.3g} ({dtype}, softcap {softcap})"
                    raise SimPOError(_failure(gpu, what))


def _sample(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Return raw logits [6, 1027] and targets of every kind: tokens, ignored and invalid."""
    # 1027 is odd, so that rows are not aligned and the last read of a row goes past its end.
    raw_logits = 4 * mx.random.normal((6, 1027), key=mx.random.key(0))
    return raw_logits.astype(dtype), mx.array([0, 1026, 513, IGNORE_INDEX, -1, 1027], mx.int32)


def _largest_difference(one: mx.array | None, two: mx.array | None) -> float:
    """Return the largest absolute difference; infinity if only one of the two has a NaN."""
    first, second = (np.array(a.astype(mx.float32)) for a in (one, two))  # type: ignore[union-attr]
    if (np.isnan(first) != np.isnan(second)).any():
        return float("inf")
    return float(np.nanmax(np.abs(first - second)))


def _failure(gpu: str, what: str) -> str:
    return (
        f"the {gpu} kernel for log-probabilities {what}. Please report this together with the "
        "output of `mlx-simpo doctor`; logps.impl=mlx trains without the kernel"
    )
