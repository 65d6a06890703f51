"""What a micro-batch asks of the device and of Python: primitives, kernels, seconds for its graph.

    git worktree add /tmp/before cc35bd5
    python benchmarks/primitives.py --model FOLDER --data train.jsonl --before /tmp/before

Builds, without computing them, the graphs of loss and gradients of some steps of 4 real pairs, with
the code of two versions, each in a process of its own, and counts their primitives (launches.py:
which of them launch a kernel on a Metal GPU). As a CPU builds them; and as a GPU would: with the
plan of a GPU, and with primitives of other names in the place of those that MLX has on GPUs only
(RMSNorm, RoPE and attention, with their gradients), with attention in blocks and in MLX's own. The
head runs in MLX's operations everywhere (a GPU has a kernel for it; it is a hundredth of a graph).
What is written: benchmarks/results/primitives.json.
"""

# First, before anything imports MLX: on a Linux CPU it loads a fast BLAS in place of MLX's own.
import mlx_simpo  # noqa: F401

# isort: split
import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from flops import needed_flops
from launches import Graph
from provenance import git, provenance, write_result

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
RANK = 16
# What a small kernel costs: 3 200 of them, one after the other, took 7.7 to 8.8 ms on an M3 Ultra
# (ml-explore/mlx issue 4521); others report 5 µs.
START_MICROSECONDS = (2, 5)
# 10^12 float32 operations/s, 10^9 bytes/s. Apple's own figures: the bandwidths, and the operations
# of M1, M2 and M1 Max; the others are estimates from their cores of 128 lanes at the clocks that
# are reported (1.6 to 1.9 GHz), without M5's matrix units for half precision.
CHIPS = {
    "M1": (2.6, 68),
    "M2": (3.6, 100),
    "M3": (4.1, 100),
    "M4": (4.6, 120),
    "M5": (4.9, 153),
    "M1 Max": (10.4, 400),
    "M4 Max": (18.4, 546),
}


def stand_in(
    forward: Callable[..., mx.array], backward: Callable[..., Any]
) -> Callable[..., mx.array]:
    """Return a function of one primitive with a gradient of one primitive, never computed.

    Args:
        backward: (primals, gradient of the output) → gradients.
    """
    function = mx.custom_function(forward)
    function.vjp(lambda primals, cotangent, output: backward(primals, cotangent))
    return function  # type: ignore[return-value]


_rms_norm = stand_in(mx.arcsin, lambda x, d: mx.arccos(d))
_rope = stand_in(mx.arcsinh, lambda x, d: mx.arcsinh(d))
_attention = stand_in(
    lambda q, k, v: mx.arctanh(mx.depends([q], [k, v])[0]),
    lambda qkv, d: (
        mx.arctan(mx.depends([d], list(qkv))[0]),
        *(mx.sinh(mx.depends([array], [d])[0]) for array in qkv[1:]),
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


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Count and time the graphs of each batch's step, in the version on this process's path."""
    from adapter_base import add_lora
    from libraries.ours import encoded
    from mlx.utils import tree_flatten
    from mlx_lm import load

    from mlx_simpo.config.simpo_config import ObjectiveConfig, TrainConfig
    from mlx_simpo.engine.choice import shared_prefix_engine
    from mlx_simpo.training.step import GradientFunction, collate_step

    model: Any = load(options.model)[0]
    model.set_dtype(DTYPES[options.dtype])
    add_lora(model, {"rank": RANK, "scale": 2.0, "seed": 0})
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
                run(*arrays)
                seconds.append(time.process_time() - started)
            metrics, gradients = run(*arrays)
            outputs = [*metrics.values(), *(g for _, g in tree_flatten(gradients))]
            graph = Graph(outputs, STAND_INS if options.variant != "cpu" else None)
            prefix_tokens, groups = micro_batch.arrays[:2]
            result["micro_batches"] += 1
            result["passes"] += len(groups) + (prefix_tokens.size > 0)
            result["primitives"] += len(graph.primitives)
            result["launching"] += graph.launching().total()
            result["kernels"] += graph.kernels()
            result["seconds"] += min(seconds)  # type: ignore[assignment]
            names += graph.launching()
        results.append({**result, "names": dict(names.most_common())})
    return results


def in_version(tree: Path, options: argparse.Namespace, batches: list) -> dict[str, Any]:
    """Measure all variants with the code of one working tree: sums per pair."""
    here = Path(__file__).parent
    results = {}
    for dtype in DTYPES:
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--model", options.model, "--variant", variant]
            done = subprocess.run(
                [*command, "--dtype", dtype, "--repeats", str(options.repeats)],
                input=json.dumps(batches),
                capture_output=True,
                text=True,
                check=True,
                cwd=tree,
                env={**os.environ, "PYTHONPATH": f"{tree}:{here}"},
            )
            total: Counter[str] = Counter()
            for result in json.loads(done.stdout.splitlines()[-1]):
                total.update({k: v for k, v in result.items() if k != "names"})
            pairs = total.pop("pairs")
            results[f"{variant}, {dtype}"] = {k: v / pairs for k, v in total.items()}
            print(tree.name, variant, dtype, results[f"{variant}, {dtype}"], file=sys.stderr)
    return results


def lower_bounds(
    per_pair: dict[str, float], config: dict[str, Any], flops: float, itemsize: int
) -> dict[str, dict[str, Any]]:
    """Compute, from published figures of chips, the least seconds per pair that each resource
    costs: starting kernels, reading weights, multiplying. None of it is measured.

    Weights: the trunk's once per pass forward and once backward, the head's twice per micro-batch.
    Activations come on top.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    attention = 2 * (config["num_attention_heads"] + config["num_key_value_heads"]) * width
    trunk = layers * hidden * (attention + 3 * config["intermediate_size"])
    head = hidden * config["vocab_size"]
    read = 2 * itemsize * (per_pair["passes"] * trunk + per_pair["micro_batches"] * head)
    return {
        chip: {
            "start_s": [per_pair["kernels"] * us * 1e-6 for us in START_MICROSECONDS],
            "weights_s": read / (gigabytes * 1e9),
            "products_s": flops / (teraflops * 1e12),
        }
        for chip, (teraflops, gigabytes) in CHIPS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a float32 llama")
    parser.add_argument("--data", help="pairs, .jsonl")
    parser.add_argument("--before", type=Path, help="a working tree of the older version")
    parser.add_argument("--batches", type=int, default=8, help="of 4 pairs of natural lengths")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variant", choices=VARIANTS, help="(of the processes of this script)")
    parser.add_argument("--dtype", choices=DTYPES)
    options = parser.parse_args()
    if options.variant is not None:
        is_cpu = options.variant == "cpu"
        with nullcontext() if is_cpu else as_on_a_gpu(options.variant == "gpu, mx.fast"):
            print(json.dumps(measured(options)))
        return
    from shapes import SHAPES, tokenized

    origin = provenance(
        f"python benchmarks/primitives.py --model … --data {Path(options.data).name} "
        f"--before … --batches {options.batches}"
    )
    batches = SHAPES["natural"](tokenized(options.model, options.data), options.batches)
    config = json.loads((Path(options.model) / "config.json").read_text())
    flops = sum(needed_flops(batch, config, RANK) for batch in batches) / sum(map(len, batches))
    versions = {
        "before": in_version(options.before.resolve(), options, batches),
        "after": in_version(Path(__file__).parents[1], options, batches),
    }
    record = {
        "provenance": origin,
        "before_commit": git("-C", str(options.before.resolve()), "rev-parse", "--short", "HEAD"),
        "pairs": sum(map(len, batches)),
        "per_pair": versions,
        "computed_not_measured": {
            "chips": CHIPS,
            "start_microseconds": START_MICROSECONDS,
            "bounds": {
                version: {
                    variant: lower_bounds(figures, config, flops, 4 if "32" in variant else 2)
                    for variant, figures in variants.items()
                    if "gpu" in variant
                }
                for version, variants in versions.items()
            },
        },
    }
    print(write_result("primitives", record))


if __name__ == "__main__":
    main()
