"""What `mlx-simpo doctor` finds: the machine, which implementation runs and why, whether it is
right and how fast it is."""

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from .device import is_gpu, total_memory_bytes
from .errors import SimPOError
from .kernels.built_in import IGNORED
from .kernels.choice import Implementation, choose

PACKAGES = ("mlx-simpo", "mlx", "mlx-lm")
# Vocabularies to check: tiny, odd, beyond a threadgroup's reads, SmolLM2's, Qwen's.
SIZES = (2, 33, 1027, 49152, 151936)
SOFTCAPS = (0.0, 30.0)
REPEATS = 5


def examine() -> dict[str, Any]:
    """The machine, the implementation, its checks and its timings, for JSON; "problem" says why
    there are none, if the kernel is meant to run here and cannot, or is wrong."""
    try:
        implementation = choose()
    except SimPOError as error:
        return {"machine": machine(), "problem": str(error)}
    return {
        "machine": machine(),
        "implementation": implementation.name,
        "why": implementation.note,
        "checks": checks(implementation),
        "timings": timings(implementation),
    }


def machine() -> dict[str, str]:
    """Chip, memory, system and versions, in words."""
    device = mx.device_info()
    found = {
        "chip": str(device.get("device_name", platform.processor() or "unknown")),
        "memory": f"{total_memory_bytes() / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        "processor": platform.machine(),
        "MLX's device": str(mx.default_device()),
        "Python": platform.python_version(),
    }
    return found | {name: version(name) for name in PACKAGES}


# --- is it right? ----------------------------------------------------------------------------


def checks(implementation: Implementation) -> list[dict[str, Any]]:
    """Log-probabilities and gradients against float64, beside what plain operations make of the
    same logits; right: no further off than those, but for rounding."""
    dtypes = (mx.float32, mx.bfloat16, mx.float16)
    return [check(implementation, d, v, s) for d in dtypes for v in SIZES for s in SOFTCAPS]


def check(
    implementation: Implementation, dtype: mx.Dtype, size: int, softcap: float
) -> dict[str, Any]:
    """One line of `checks`: errors are the largest, of nats and of the gradient's entries."""
    products = (4 * mx.random.normal((5, size), key=mx.random.key(size))).astype(dtype)
    tokens = [0, size - 1, size // 2, IGNORED, size]
    targets = mx.array(tokens, mx.int32)
    found = implementation.response_logps(
        products, targets, scale=0.5, softcap=softcap, gradient=True
    )
    logps, slope = (np.array(a.astype(mx.float32), np.float64) for a in found)  # type: ignore
    right = logps[3] == 0 and not slope[3].any() and np.isnan(logps[4]) and np.isnan(slope[4]).all()
    exact = truth(np.array(products.astype(mx.float32), np.float64), tokens, softcap)
    plain = by_plain_operations(products, targets, softcap)
    errors = [largest(f[:3] - e) for f, e in zip((logps, slope), exact, strict=True)]
    limits = [largest(p - e) for p, e in zip(plain, exact, strict=True)]
    rounding = {mx.float32: 2e-6, mx.bfloat16: 4e-3, mx.float16: 5e-4}[dtype]
    near = [
        error <= limit + 1e-6 + share * rounding
        for error, limit, share in zip(errors, limits, (1, largest(exact[1])), strict=True)
    ]
    return {
        "dtype": str(dtype).removeprefix("mlx.core."),
        "vocabulary": size,
        "softcap": softcap,
        "error": errors[0],
        "gradient_error": errors[1],
        "plain_error": limits[0],
        "plain_gradient_error": limits[1],
        "right": bool(right and all(near)),
    }


def truth(products: np.ndarray, targets: list[int], softcap: float) -> tuple[np.ndarray, ...]:
    """log p [3] and its gradient [3, V] of the first three rows, in float64, at scale 0.5."""
    logits = 0.5 * products[:3]
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    greatest = logits.max(axis=-1, keepdims=True)
    logps = logits - greatest - np.log(np.exp(logits - greatest).sum(axis=-1, keepdims=True))
    slope = -np.exp(logps)
    slope[range(3), targets[:3]] += 1
    slope *= 0.5 * (1 - (logits / softcap) ** 2 if softcap else 1)
    return logps[range(3), targets[:3]], slope


def by_plain_operations(
    products: mx.array, targets: mx.array, softcap: float
) -> tuple[np.ndarray, ...]:
    """The same in the products' own dtype, by autodiff."""

    def logps(products: mx.array) -> mx.array:
        logits = 0.5 * products
        logits = softcap * mx.tanh(logits / softcap) if softcap else logits
        picked = mx.take_along_axis(logits, targets[:3, None], axis=-1).squeeze(-1)
        return picked - mx.logsumexp(logits, axis=-1)

    rows = products[:3]
    slope = mx.grad(lambda rows: logps(rows).astype(mx.float32).sum())(rows)
    return tuple(np.array(a.astype(mx.float32), np.float64) for a in (logps(rows), slope))


def largest(values: np.ndarray) -> float:
    """The largest magnitude."""
    return float(np.abs(values).max())


# --- how fast is it? -------------------------------------------------------------------------


def timings(implementation: Implementation) -> list[dict[str, Any]]:
    """Value and gradient of one chunk of logits, three ways, with the bytes that each must move at
    least (once read for the value, once for the gradient, once written) by its seconds."""
    dtype, shape = (mx.bfloat16, (512, 128_256)) if is_gpu() else (mx.float32, (128, 49_152))
    products = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    targets = mx.arange(shape[0], dtype=mx.int32)
    mx.eval(products, targets)

    def ours() -> tuple[mx.array, mx.array | None]:
        return implementation.response_logps(
            products, targets, scale=1.0, softcap=0.0, gradient=True
        )

    def fused(products: mx.array) -> mx.array:
        return mx.fast.cross_entropy(products, targets).sum()

    def plain(products: mx.array) -> mx.array:
        logits = products.astype(mx.float32)
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
        return (mx.logsumexp(logits, axis=-1) - picked).sum()

    ways: dict[str, Callable[[], Any]] = {
        f"mlx_simpo ({implementation.name})": ours,
        "mx.fast.cross_entropy": lambda: mx.value_and_grad(fused)(products),
        "plain operations": lambda: mx.value_and_grad(plain)(products),
    }
    moved = 3 * products.nbytes
    return [
        {
            "way": name,
            "rows": shape[0],
            "vocabulary": shape[1],
            "dtype": str(dtype).removeprefix("mlx.core."),
            "milliseconds": 1000 * (seconds := median_seconds(run)),
            "gb_per_second": moved / seconds / 1e9,
        }
        for name, run in ways.items()
    ]


def median_seconds(run: Callable[[], Any]) -> float:
    """Of REPEATS runs after one that is not counted."""
    taken = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        mx.eval(run())
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


# --- in words --------------------------------------------------------------------------------


def as_text(found: dict[str, Any]) -> str:
    """A block to read, and to paste into an issue."""
    lines = [f"{name}: {value}" for name, value in found["machine"].items()]
    if "problem" in found:
        return "\n".join([*lines, found["problem"]]) + "\n"
    lines.append(f"log-probabilities: {found['why']}")
    wrong = [c for c in found["checks"] if not c["right"]]
    worst = max(c["error"] for c in found["checks"] if c["dtype"] == "float32")
    count = len(found["checks"])
    lines.append(
        f"checks: {count - len(wrong)} of {count} right; float32 within {worst:.1e} nats of float64"
    )
    lines += [
        f"  WRONG: {c['dtype']}, vocabulary {c['vocabulary']}, softcap {c['softcap']}: off by "
        f"{c['error']:.2e} (plain {c['plain_error']:.2e}), gradient {c['gradient_error']:.2e} "
        f"(plain {c['plain_gradient_error']:.2e})"
        for c in wrong
    ]
    first = found["timings"][0]
    shape = f"{first['rows']} rows × {first['vocabulary']}, {first['dtype']}"
    lines.append(f"value and gradient of {shape}:")
    lines += [
        f"  {t['milliseconds']:8.2f} ms {t['gb_per_second']:7.1f} GB/s  {t['way']}"
        for t in found["timings"]
    ]
    return "\n".join(lines) + "\n"
