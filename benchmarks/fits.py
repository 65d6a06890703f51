"""Which models fit into how much memory: computed, not measured.

    python benchmarks/fits.py          # the table of README.md
    python benchmarks/fits.py --check  # the formula beside what benchmarks/memory.py measured

Bytes of training, by what holds them:

- base weights in 4 bits with groups of 64: 4.5 bits a weight, embedding and head included;
- LoRA of rank 16 on all linear layers, float32: weight, gradient and AdamW's two moments, 16 bytes;
- activations of TOKENS positions, with gradient checkpointing: the input of each layer in bfloat16,
  and one layer's whole: 8 D + 5 F numbers (norms, projections, attention, MLP) in bfloat16 and the
  inputs of its LoRA layers in float32, 6 D + F; LAYER_COPIES times, for gradients and temporaries;
- or the head's chunk, HEAD_BYTES per logit, if that is more: they are not in memory together.

LAYER_COPIES is fitted to the peaks that were measured on a Linux CPU in float32
(results/memory.json) such that none is above the formula; HEAD_BYTES is what `token_logps` says of
it. macOS lets the GPU use about two thirds of up to 36 GB and three quarters of more (MLX's
max_recommended_working_set_size says how much); MARGIN of that is left free.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from mlx_simpo.engine.token_logps import (
    MAX_CHUNK_LOGITS,
    MIN_CHUNK_ROWS,
    chunk_logits_beside_trunk,
)

TOKENS = 2048
RANK = 16
MEMORY = (8, 16, 24, 32, 64)
LAYER_COPIES = 2.8
HEAD_BYTES = 28
MARGIN = 0.15
RESULTS = Path(__file__).parent / "results" / "memory.json"


class Shape(NamedTuple):
    """A model's sizes, from its config.json."""

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool


SHAPES = (
    Shape("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151_936, True),
    Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128_256, True),
    Shape("Qwen3-1.7B", 28, 2048, 6144, 16, 8, 128, 151_936, True),
    Shape("Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128, 128_256, True),
    Shape("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, 151_936, True),
    Shape("Mistral-7B", 32, 4096, 14_336, 32, 8, 128, 32_768, False),
    Shape("Llama-3.1-8B", 32, 4096, 14_336, 32, 8, 128, 128_256, False),
    Shape("Qwen3-8B", 36, 4096, 12_288, 32, 8, 128, 151_936, False),
    Shape("Gemma-2-9B", 42, 3584, 14_336, 16, 8, 256, 256_000, True),
    Shape("Qwen3-14B", 40, 5120, 17_408, 40, 8, 128, 151_936, False),
    Shape("Mistral-Small-24B", 40, 5120, 32_768, 32, 8, 128, 131_072, False),
    Shape("Qwen3-32B", 64, 5120, 25_600, 64, 8, 128, 151_936, False),
    Shape("Llama-3.3-70B", 80, 8192, 28_672, 64, 8, 128, 128_256, False),
)


def linears(shape: Shape) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's linear layers."""
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    d, f = shape.hidden, shape.mlp
    return [(d, queries), (d, keys), (d, keys), (queries, d), (d, f), (d, f), (f, d)]


def gigabytes(
    shape: Shape, tokens: int = TOKENS, weight_bytes: float = 4.5 / 8, activation_bytes: int = 2
) -> float:
    """Peak memory of a training step with gradient checkpointing, in GB."""
    layer, d, f = linears(shape), shape.hidden, shape.mlp
    weights = shape.layers * sum(i * o for i, o in layer)
    weights += shape.vocabulary * d * (1 if shape.tied else 2)
    lora = shape.layers * sum(RANK * (i + o) for i, o in layer)
    one_layer = activation_bytes * (8 * d + 5 * f)
    if activation_bytes < 4:
        one_layer += 4 * (6 * d + f)
    saved = tokens * activation_bytes * shape.layers * d
    chunk = min(MAX_CHUNK_LOGITS, chunk_logits_beside_trunk(tokens, d, saving_layers=1))
    head = HEAD_BYTES * max(chunk, MIN_CHUNK_ROWS * shape.vocabulary)
    at_once = max(tokens * LAYER_COPIES * one_layer, head)
    return (weights * weight_bytes + 16 * lora + saved + at_once) / 1e9


def usable(memory: int) -> float:
    """GB that a training may take of ``memory`` GB."""
    return (1 - MARGIN) * memory * (2 / 3 if memory <= 36 else 3 / 4)


def check() -> None:
    """Print the formula's peaks beside the measured ones: the first 4 layers of SmolLM2-135M."""
    smollm2 = Shape("SmolLM2-135M", 4, 576, 1536, 9, 3, 64, 49_152, True)
    measured = json.loads(RESULTS.read_text())["lengths"]["mlx_simpo"]
    for length, result in measured.items():
        positions = int(length) * 3 // 2  # half of each sequence is the prompt, which runs once
        computed = gigabytes(smollm2, positions, weight_bytes=4, activation_bytes=4)
        print(f"{length} tokens: computed {computed:.2f} GB, measured {result['peak_gb']:.2f} GB")


def main() -> None:
    """Print the table as Markdown."""
    if "--check" in sys.argv:
        check()
        return
    print("| memory of the Mac | models in 4 bits that fit, with GB of training |\n|---|---|")
    for smaller, memory in zip((0, *MEMORY), MEMORY, strict=False):
        fits = [
            f"{shape.name} ({gigabytes(shape):.1f})"
            for shape in SHAPES
            if usable(smaller) < gigabytes(shape) <= usable(memory)
        ]
        if fits:
            print(f"| {memory} GB | {', '.join(fits)} |")


if __name__ == "__main__":
    main()
