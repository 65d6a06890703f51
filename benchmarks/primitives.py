"""What one micro-batch asks of the device and of Python: primitives, kernels, time to build a graph.

    git worktree add /tmp/before cc35bd5
    python benchmarks/primitives.py --model FOLDER --data train.jsonl --before /tmp/before

Builds, without computing them, the graphs of loss and gradients of some micro-batches of real pairs,
with the code of two versions, each in a process of its own, and counts their primitives
(launches.py: which of them launch a kernel on a Metal GPU). As a CPU builds them, and as a GPU would:
with the plan of a GPU, and primitives of other names in the place of those that MLX has on GPUs only
(RMSNorm, RoPE and attention with their gradients), with attention in blocks and in MLX's own. The
head runs in MLX's operations everywhere (a GPU has a kernel for it; it is a hundredth of a graph).
What is written: benchmarks/results/primitives.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from launches import Graph
from provenance import git, provenance, write_result
from shapes import SHAPES, tokenized

# Unary operations that no model uses here, and what each stands for.
STAND_INS = {
    "ArcSin": "RMSNorm",
    "ArcCos": "RMSNormVJP",
    "ArcSinh": "RoPE",
    "ArcTanh": "ScaledDotProductAttention",
    "ArcTan": "ScaledDotProductAttentionVJP",
    "Sinh": "Copy",  # the other two gradients of the same primitive
}
VARIANTS = ("cpu", "gpu, blocks", "gpu, mx.fast")
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def stand_in(
    forward: Callable[..., mx.array], backward: Callable[..., tuple[mx.array, ...]]
) -> Callable[..., mx.array]:
    """Return a function of one primitive, with a gradient of one primitive. It is never computed."""
    function = mx.custom_function(forward)
    function.vjp(lambda primals, cotangent, output: backward(*_tuple(primals), cotangent))
    return function  # type: ignore[return-value]


def _tuple(primals: Any) -> tuple:
    return primals if isinstance(primals, tuple | list) else (primals,)


_rms_norm = stand_in(mx.arcsin, lambda x, d: mx.arccos(d))
_rope = stand_in(mx.arcsinh, lambda x, d: mx.arcsinh(d))
_attention = stand_in(
    lambda q, k, v: mx.arctanh(mx.depends([q], [k, v])[0]),
    lambda q, k, v, d: (
        mx.arctan(mx.depends([d], [q, k, v])[0]),
        mx.sinh(mx.depends([k], [d])[0]),
        mx.sinh(mx.depends([v], [d])[0]),
    ),
)


def attention(queries: mx.array, keys: mx.array, values: mx.array, *_: Any, **__: Any) -> mx.array:
    """What stands for MLX's attention, in the place of `mlx_simpo.engine.attention.attention`."""
    return _attention(queries, keys, values)


@contextmanager
def as_on_a_gpu(with_attention: bool) -> Iterator[None]:
    """Let mlx_simpo, which is imported within, plan for a GPU and build its graphs."""
    from mlx_simpo import device

    device.is_gpu = lambda: True
    fast = mx.fast.rms_norm, mx.fast.rope
    mx.fast.rms_norm = lambda x, *args, **kwargs: _rms_norm(x)
    mx.fast.rope = lambda x, *args, **kwargs: _rope(x)
    if with_attention:
        import mlx_simpo.engine.attention

        mlx_simpo.engine.attention.attention = attention
    yield
    mx.fast.rms_norm, mx.fast.rope = fast


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Count and time the first micro-batch of each batch, in the version on this process's path."""
    import mlx.nn as nn
    from adapter_base import add_lora
    from mlx.utils import tree_flatten
    from mlx_lm import load

    from libraries.ours import encoded
    from mlx_simpo.config.simpo_config import ObjectiveConfig, TrainConfig
    from mlx_simpo.engine.choice import shared_prefix_engine
    from mlx_simpo.training.step import GradientFunction, collate_step

    model: Any = load(options.model)[0]
    model.set_dtype(DTYPES[options.dtype])
    add_lora(model, {"rank": 16, "scale": 2.0, "seed": 0})
    model.train()
    engine = shared_prefix_engine(model)
    run = GradientFunction(model, asdict(ObjectiveConfig()), engine, compiled=False)
    results = []
    for batch in json.loads(sys.stdin.read()):
        step = collate_step([encoded(pair) for pair in batch], engine, TrainConfig(batch_size=4))
        result: Counter[str] = Counter(pairs=len(batch), positions=step.positions)
        names: Counter[str] = Counter()
        for micro_batch, chosen_tokens in zip(step.micro_batches, step.chosen_tokens, strict=True):
            arrays = (micro_batch.arrays, chosen_tokens, *step.totals)
            seconds = []
            for _ in range(options.repeats):
                started = time.process_time()
                metrics, gradients = run(*arrays)
                seconds.append(time.process_time() - started)
            outputs = [*metrics.values(), *(g for _, g in tree_flatten(gradients))]
            graph = Graph(outputs, STAND_INS if options.variant != "cpu" else None)
            prefix_tokens, groups = micro_batch.arrays[:2]
            result["micro_batches"] += 1
            result["passes"] += len(groups) + (prefix_tokens.size > 0)
            result["primitives"] += len(graph.primitives)
            result["launching"] += graph.launching().total()
            result["kernels"] += graph.kernels()
            result["seconds"] += statistics.median(seconds)  # type: ignore[assignment]
            names += graph.launching()
        results.append({**result, "names": dict(names.most_common())})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.variant == "cpu":
        print(json.dumps(measured(options)))
    else:
        with as_on_a_gpu(options.variant == "gpu, mx.fast"):
            print(json.dumps(measured(options)))

if __name__ == "__main__":
    main()
