"""The head alone: memory and precision of log-probabilities and their gradient to hidden states.

    python benchmarks/head.py

Three ways from hidden states [N, D] to Σ log p and its gradient: ours (`token_logps`), all logits
in float32 at once (what most libraries do), and mx.fast.cross_entropy on all logits. Memory is what
MLX's allocator reports beyond the inputs; on a CPU here, so mx.fast.cross_entropy is not fused, and
the figures are of the arrays that a GPU would need as well. Ours is the highest of several runs,
because it depends on how far MLX runs ahead of the device (docs/kernel.md). Precision: bfloat16
hidden states and weights against float64, with logits shifted by the target's before they are
rounded, and without.
"""

# First, before anything imports MLX: on a Linux CPU it loads a fast BLAS in place of MLX's own.
from mlx_simpo.engine.head import Head
from mlx_simpo.engine.token_logps import frozen_head_logps, token_logps
from mlx_simpo.kernels.built_in import mlx_response_logps

# isort: split
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from provenance import provenance, write_result

WIDTH = 576
SHAPES = [(2048, v) for v in (32_000, 49_152, 151_936, 262_144)]
SHAPES += [(n, 49_152) for n in (512, 1024, 4096, 8192)]
RUNS = 3  # of ours
LARGEST = 2**29  # logits that the other ways may compute at once on this machine
HEAD = Head(scale=1.0, softcap=0.0, is_projection=True)


class Trunk(nn.Module):
    """What a head is searched by: a trunk, which is never run."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(4, width)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.embed_tokens(tokens)


class Headed(nn.Module):
    """A head and nothing else, in the shape of an mlx-lm model."""

    def __init__(self, lm_head: nn.Linear) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.model = Trunk(WIDTH)
        self.layers: list = []
        self.freeze()


class RoundedLinear(nn.Linear):
    """A linear layer that a head does not take for one: its logits are rounded as they are."""


def ours(model: Headed, hidden: mx.array, targets: mx.array) -> mx.array:
    return token_logps(model, HEAD, hidden, targets, training=True).sum()


def whole(model: Headed, hidden: mx.array, targets: mx.array) -> mx.array:
    logits = model.lm_head(hidden).astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
    return (picked - mx.logsumexp(logits, axis=-1)).sum()


def fused(model: Headed, hidden: mx.array, targets: mx.array) -> mx.array:
    return -mx.fast.cross_entropy(model.lm_head(hidden), targets).sum()


def peak(way: Callable[..., mx.array], rows: int, size: int) -> float:
    """GB beyond the inputs."""
    model = Headed(nn.Linear(WIDTH, size, bias=False))
    hidden, targets = mx.random.normal((rows, WIDTH)), mx.arange(rows, dtype=mx.int32)
    mx.eval(model.lm_head.weight, model.model.embed_tokens.weight, hidden, targets)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(lambda hidden: way(model, hidden, targets))(hidden))
    return (mx.get_peak_memory() - before) / 1e9


def precision(shifted: bool, size: int = 151_936, width: int = 896, rows: int = 256) -> dict:
    """Root mean square errors in bfloat16: of log p, in nats; of its gradient, relative."""
    rng = np.random.default_rng(0)
    # As of a trained model: logits some units apart, the target's well above.
    weight = mx.array(rng.normal(size=(size, width)) / width**0.5, mx.float32).astype(mx.bfloat16)
    targets = mx.array(rng.integers(0, size, rows), mx.int32)
    noise = mx.array(3 * rng.normal(size=(rows, width)), mx.float32)
    hidden = (noise + 18 * weight[targets].astype(mx.float32)).astype(mx.bfloat16)
    lm_head = (nn.Linear if shifted else RoundedLinear)(width, size, bias=False)
    lm_head.weight = weight
    response_logps = partial(mlx_response_logps, scale=1.0, softcap=0.0, gradient=True)
    logps = frozen_head_logps(Headed(lm_head), HEAD, response_logps)
    gradient = mx.grad(lambda hidden: logps(hidden, targets).sum())(hidden)
    value = np.array(logps(hidden, targets), np.float64)
    wide = [np.array(a.astype(mx.float32), np.float64) for a in (hidden, weight)]
    logits = wide[0] @ wide[1].T
    each = np.arange(rows)
    logits -= logits.max(axis=-1, keepdims=True)
    log_total = np.log(np.exp(logits).sum(axis=-1))
    exact = logits[each, np.array(targets)] - log_total
    probabilities = np.exp(logits - log_total[:, None])
    exact_gradient = wide[1][np.array(targets)] - probabilities @ wide[1]
    error = np.array(gradient.astype(mx.float32), np.float64) - exact_gradient
    rms: Any = lambda a: float(np.sqrt((a**2).mean()))  # noqa: E731
    return {
        "logps_rms": rms(value - exact),
        "gradient_relative_rms": rms(error) / rms(exact_gradient),
    }


def main() -> None:
    origin = provenance("python benchmarks/head.py")
    memory = []
    for rows, size in SHAPES:
        line: dict[str, Any] = {"rows": rows, "vocabulary": size}
        line["ours"] = max(peak(ours, rows, size) for _ in range(RUNS))
        for way in (whole, fused):
            # None where the logits would be too many for this machine.
            line[way.__name__] = peak(way, rows, size) if rows * size <= LARGEST else None
        print(line, flush=True)
        memory.append(line)
    errors = {name: precision(name == "centred") for name in ("centred", "as it is")}
    print(errors)
    result = {"provenance": origin, "width": WIDTH, "memory": memory, "bfloat16": errors}
    print(write_result("head", result))


if __name__ == "__main__":
    main()
