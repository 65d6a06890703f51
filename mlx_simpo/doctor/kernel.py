"""Whether log-probabilities and their gradient are right here, and how fast they are."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..device import is_gpu
from ..engine.agreement import dtype_name
from ..kernels.built_in import IGNORE_INDEX
from ..kernels.choice import Implementation

# Vocabularies to check: tiny, odd, more than a threadgroup reads at once, SmolLM2's, Qwen's.
SIZES = (2, 33, 1027, 49152, 151936)
SOFTCAPS = (0.0, 30.0)
SCALE = 0.5  # of the logits in every check; not 1, so that a forgotten scale shows
# Relative error allowed on top of that of plain operations: one rounding of a stored value in half
# precision (2⁻⁸ and 2⁻¹¹), some sixteen in float32, which sums in another order.
ROUNDING = {mx.float32: 2e-6, mx.bfloat16: 4e-3, mx.float16: 5e-4}
# dtype and (rows, vocabulary) of the logits that are timed: one chunk of a typical model's head.
TIMED_ON_GPU = (mx.bfloat16, (512, 128_256))
TIMED_ON_CPU = (mx.float32, (128, 49_152))
REPEATS = 5


# --- is it right? ----------------------------------------------------------------------------


def checks(implementation: Implementation) -> list[dict[str, Any]]:
    """Check an implementation for every dtype, vocabulary and softcap; see `check`."""
    dtypes = (mx.float32, mx.bfloat16, mx.float16)
    return [check(implementation, d, v, s) for d in dtypes for v in SIZES for s in SOFTCAPS]


def check(
    implementation: Implementation, dtype: mx.Dtype, size: int, softcap: float
) -> dict[str, Any]:
    """Compare log-probabilities and gradients of five rows with float64.

    Returns:
        The largest absolute errors: of log p in nats ("error") and of the gradient's entries
        ("gradient_error"), and those of plain MLX operations on the same logits ("plain_…").
        "passed": ignored and invalid targets give 0 and NaN, and neither error exceeds that of the
        plain operations by more than rounding.
    """
    raw_logits = (4 * mx.random.normal((5, size), key=mx.random.key(size))).astype(dtype)
    tokens = [0, size - 1, size // 2, IGNORE_INDEX, size]  # three tokens, ignored, invalid
    targets = mx.array(tokens, mx.int32)
    outputs = implementation.response_logps(
        raw_logits, targets, scale=SCALE, softcap=softcap, gradient=True
    )
    logps, gradient = (np.array(a.astype(mx.float32), np.float64) for a in outputs)  # type: ignore
    is_zero = logps[3] == 0 and not gradient[3].any()
    is_nan = np.isnan(logps[4]) and np.isnan(gradient[4]).all()
    exact = in_float64(np.array(raw_logits.astype(mx.float32), np.float64), tokens, softcap)
    plain = in_plain_operations(raw_logits, targets, softcap)
    errors = [largest(a[:3] - e) for a, e in zip((logps, gradient), exact, strict=True)]
    plain_errors = [largest(p - e) for p, e in zip(plain, exact, strict=True)]
    # Plain operations may happen to be exact, so some rounding is allowed on top: of one nat, and
    # of the gradient's largest entry.
    limits = [
        plain_error + 1e-6 + magnitude * ROUNDING[dtype]
        for plain_error, magnitude in zip(plain_errors, (1, largest(exact[1])), strict=True)
    ]
    is_close = all(error <= limit for error, limit in zip(errors, limits, strict=True))
    return {
        "dtype": dtype_name(dtype),
        "vocabulary": size,
        "softcap": softcap,
        "error": errors[0],
        "gradient_error": errors[1],
        "plain_error": plain_errors[0],
        "plain_gradient_error": plain_errors[1],
        "passed": bool(is_zero and is_nan and is_close),
    }


def in_float64(
    raw_logits: np.ndarray, targets: list[int], softcap: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return log p [3] and its gradient [3, V] for the first three rows, from the definition."""
    logits = SCALE * raw_logits[:3]
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    row_max = logits.max(axis=-1, keepdims=True)
    logps = logits - row_max - np.log(np.exp(logits - row_max).sum(axis=-1, keepdims=True))
    gradient = -np.exp(logps)
    gradient[range(3), targets[:3]] += 1
    gradient *= SCALE * (1 - (logits / softcap) ** 2 if softcap else 1)
    return logps[range(3), targets[:3]], gradient


def in_plain_operations(
    raw_logits: mx.array, targets: mx.array, softcap: float
) -> tuple[np.ndarray, ...]:
    """Return log p [3] and its gradient [3, V] by logsumexp and autodiff, in raw_logits' dtype."""

    def logps(raw_logits: mx.array) -> mx.array:
        logits = SCALE * raw_logits
        logits = softcap * mx.tanh(logits / softcap) if softcap else logits
        target_logits = mx.take_along_axis(logits, targets[:3, None], axis=-1).squeeze(-1)
        return target_logits - mx.logsumexp(logits, axis=-1)

    rows = raw_logits[:3]
    gradient = mx.grad(lambda rows: logps(rows).astype(mx.float32).sum())(rows)
    return tuple(np.array(a.astype(mx.float32), np.float64) for a in (logps(rows), gradient))


def largest(values: np.ndarray) -> float:
    """Return the largest magnitude."""
    return float(np.abs(values).max())


# --- how fast is it? -------------------------------------------------------------------------


def timings(implementation: Implementation) -> list[dict[str, Any]]:
    """Time value and gradient of one chunk of logits by three methods.

    "gb_per_second" divides the bytes that each method must move at least by its time: the logits
    are read for the value and again for the gradient, and the gradient is written.
    """

    dtype, shape = TIMED_ON_GPU if is_gpu() else TIMED_ON_CPU
    raw_logits = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    targets = mx.arange(shape[0], dtype=mx.int32)
    mx.eval(raw_logits, targets)

    def ours() -> tuple[mx.array, mx.array | None]:
        return implementation.response_logps(
            raw_logits, targets, scale=1.0, softcap=0.0, gradient=True
        )

    def fused(raw_logits: mx.array) -> mx.array:
        return mx.fast.cross_entropy(raw_logits, targets).sum()

    def plain(raw_logits: mx.array) -> mx.array:
        logits = raw_logits.astype(mx.float32)
        target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
        return (mx.logsumexp(logits, axis=-1) - target_logits).sum()

    methods: dict[str, Callable[[], Any]] = {
        f"mlx_simpo ({implementation.name})": ours,
        "mx.fast.cross_entropy": lambda: mx.value_and_grad(fused)(raw_logits),
        "plain operations": lambda: mx.value_and_grad(plain)(raw_logits),
    }
    bytes_moved = 3 * raw_logits.nbytes
    return [
        {
            "method": name,
            "rows": shape[0],
            "vocabulary": shape[1],
            "dtype": dtype_name(dtype),
            "milliseconds": 1000 * (seconds := median_seconds(run)),
            "gb_per_second": bytes_moved / seconds / 1e9,
        }
        for name, run in methods.items()
    ]


def median_seconds(run: Callable[[], Any]) -> float:
    """Return the median time of REPEATS runs, after one run that compiles and is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        mx.eval(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
