"""The head by itself: memory and precision of log-probabilities and their gradient to the rows.

    python benchmarks/head.py

Three ways from hidden rows [N, D] to Σ log p and its gradient: ours (`logps.token_logps`), all logits
in float32 at once (what most libraries do), and mx.fast.cross_entropy on all logits. Memory is what
MLX's allocator says beyond the inputs; on a CPU here, so mx.fast.cross_entropy is its unfused self,
and the figures are of the arrays that a GPU would need as well. Precision: bfloat16 rows and
weights against float64, with the target's product taken off before rounding and without.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from provenance import provenance, write_result

from mlx_simpo.engine.head import Head
from mlx_simpo.engine.token_logps import frozen_head_logps, token_logps
from mlx_simpo.kernels.built_in import mlx_response_logps

WIDTH = 576
SHAPES = [(2048, v) for v in (32_000, 49_152, 151_936, 262_144)]
SHAPES += [(n, 49_152) for n in (512, 1024, 4096, 8192)]
LARGEST = 2**29  # logits that the other ways may make at once on this machine


class Headed(nn.Module):
    """A head and nothing else, in the shape of an mlx-lm model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, size, bias=False)
        self.model = SimpleNamespace(embed_tokens=nn.Embedding(4, WIDTH))
        self.layers: list = []

    def __call__(self, rows: mx.array) -> mx.array:
        return self.lm_head(self.model(rows))


def ours(model: Headed, rows: mx.array, targets: mx.array) -> mx.array:
    return token_logps(model, rows, targets, training=True).sum()


def whole(model: Headed, rows: mx.array, targets: mx.array) -> mx.array:
    logits = model.lm_head(rows).astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
    return (picked - mx.logsumexp(logits, axis=-1)).sum()


def fused(model: Headed, rows: mx.array, targets: mx.array) -> mx.array:
    return -mx.fast.cross_entropy(model.lm_head(rows), targets).sum()


def peak(way: Callable[..., mx.array], rows: int, size: int) -> float | None:
    """GB beyond the inputs; None where the logits would be too many for this machine."""
    if way is not ours and rows * size > LARGEST:
        return None
    model = Headed(size)
    model.freeze()
    hidden, targets = mx.random.normal((rows, WIDTH)), mx.arange(rows, dtype=mx.int32)
    mx.eval(model.lm_head.weight, model.model.embed_tokens.weight, hidden, targets)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(lambda hidden: way(model, hidden, targets))(hidden))
    return (mx.get_peak_memory() - before) / 1e9


def precision(centred: bool, size: int = 151_936, width: int = 896, rows: int = 256) -> dict:
    """Root mean square errors in bfloat16: of log p, in nats; of its gradient, relative."""
    rng = np.random.default_rng(0)
    # Weights and rows as of a trained model: logits some units apart, the target's well above.
    weight = mx.array(rng.normal(size=(size, width)) / width**0.5, mx.float32).astype(mx.bfloat16)
    targets = mx.array(rng.integers(0, size, rows), mx.int32)
    noise = mx.array(3 * rng.normal(size=(rows, width)), mx.float32)
    hidden = (noise + 18 * weight[targets].astype(mx.float32)).astype(mx.bfloat16)
    product = lambda rows: rows @ weight.T  # noqa: E731
    head = Head(product, 1.0, 0.0, weight if centred else None)
    logps = frozen_head_logps(
        head, partial(mlx_response_logps, scale=1.0, softcap=0.0, gradient=True)
    )
    found = mx.value_and_grad(lambda rows: logps(rows, targets).sum())(hidden)[1]
    value = np.array(logps(hidden, targets), np.float64)
    wide = [np.array(a.astype(mx.float32), np.float64) for a in (hidden, weight)]
    logits = wide[0] @ wide[1].T
    each = np.arange(rows)
    logits -= logits.max(axis=-1, keepdims=True)
    log_total = np.log(np.exp(logits).sum(axis=-1))
    exact = logits[each, np.array(targets)] - log_total
    share = np.exp(logits - log_total[:, None])
    slope = wide[1][np.array(targets)] - share @ wide[1]
    off = np.array(found.astype(mx.float32), np.float64) - slope
    rms: Any = lambda a: float(np.sqrt((a**2).mean()))  # noqa: E731
    return {"logps_rms": rms(value - exact), "gradient_relative_rms": rms(off) / rms(slope)}


def main() -> None:
    made_by = provenance("python benchmarks/head.py")
    memory = []
    for rows, size in SHAPES:
        line: dict[str, Any] = {"rows": rows, "vocabulary": size}
        line |= {way.__name__: peak(way, rows, size) for way in (ours, whole, fused)}
        print(line, flush=True)
        memory.append(line)
    errors = {name: precision(name == "centred") for name in ("centred", "as it is")}
    print(errors)
    result = {"provenance": made_by, "width": WIDTH, "memory": memory, "bfloat16": errors}
    print(write_result("head", result))


if __name__ == "__main__":
    main()
