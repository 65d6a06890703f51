"""Which implementation computes log-probabilities here, and the check that the kernel is right."""

from functools import cache
from itertools import product
from typing import Literal, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..errors import SimPOError
from .built_in import IGNORE_INDEX, mlx_response_logps
from .launch import DTYPES, backend, kernel_response_logps

Name = Literal["auto", "kernel", "mlx"]

# What the check before first use covers: rows, vocabulary and softcap. The vocabularies are less
# than one read of 16 bytes; no multiple of a read; more than a threadgroup reads at once (the
# slowest).
CASES = ((11, 3, 5.0), (11, 1030, 0.0), (11, 1030, 5.0), (3, 8201, 0.0))
SCALE = 0.5
# How far rows are from 0: a row's max must start at −∞, and be subtracted before the logarithm is.
OFFSETS = (0, -1e4, -200, 1e4)
# The largest absolute difference between kernel and MLX operations, which both compute in float32;
# beside one rounding of what is stored.
TOLERANCE = 2e-5


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
    """Compare the kernel with MLX operations on small inputs of every kind; once per process.

    Takes 16 launches of eleven rows at most, and compiles the kernel four times: for each dtype,
    and without a gradient.

    Args:
        gpu: "Metal" or "CUDA", for the message.

    Raises:
        SimPOError: the kernel does not compile or run, or its results differ.
    """
    kinds = [(dtype, True) for dtype in DTYPES] + [(mx.float32, False)]
    for (dtype, gradient), (rows, size, softcap) in product(kinds, CASES):
        raw_logits, targets = _sample(dtype, rows, size)
        settings = {"scale": SCALE, "softcap": softcap, "gradient": gradient}
        try:
            actual = kernel_response_logps(raw_logits, targets, **settings)
            mx.eval(actual)  # compiles and runs it, so that both kinds of failure end here
        except (RuntimeError, ValueError) as error:
            raise SimPOError(_failure(gpu, f"does not run: {error}")) from error
        expected = mlx_response_logps(raw_logits, targets, **settings)
        for one, two in zip(actual, expected, strict=True):
            if one is not None and two is not None:
                difference = _largest_difference(one, two)
                if not difference <= TOLERANCE:
                    where = f"{dtype}, vocabulary {size}, softcap {softcap}"
                    raise SimPOError(_failure(gpu, f"is off by {difference:.3g} ({where})"))


def _sample(dtype: mx.Dtype, rows: int, size: int) -> tuple[mx.array, mx.array]:
    """Return raw logits [rows, size] and targets; in eleven rows of every kind."""
    raw_logits = 4 * mx.random.normal((11, size), key=mx.random.key(size))
    raw_logits[: len(OFFSETS)] += mx.array(OFFSETS)[:, None]
    raw_logits[4, 1:] = -mx.inf  # a masked vocabulary
    raw_logits[5, -1] = mx.nan  # must not look like a number
    tokens, no_tokens = (
        [0, size - 1, size // 2, 1, 0, 0, 1],
        [IGNORE_INDEX, IGNORE_INDEX - 1, -1, size],
    )
    targets = mx.array(tokens + no_tokens, mx.int32)
    return raw_logits[:rows].astype(dtype), targets[:rows]


def _largest_difference(one: mx.array, two: mx.array) -> float:
    """Return the largest absolute difference, less a rounding of what is stored; infinity if only
    one of the two has a NaN."""
    first, second = (np.array(a.astype(mx.float32)) for a in (one, two))
    if (np.isnan(first) != np.isnan(second)).any():
        return float("inf")
    rounding = mx.finfo(one.dtype).eps * np.abs(second)
    return float(np.nanmax(np.abs(first - second) - rounding))


def _failure(gpu: str, what: str) -> str:
    return (
        f"the {gpu} kernel for log-probabilities {what}. Please report this together with the "
        "output of `mlx-simpo doctor`; logps.impl=mlx trains without the kernel"
    )
