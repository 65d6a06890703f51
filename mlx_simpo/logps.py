"""Average log-probabilities of responses under a model.

`average_logps` is the reference: one forward pass of all rows, logits of every position in float32,
a plain log-softmax. `shared_logps` computes the same with less, and is tested against it.
"""

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .model.head import head_logits
from .model.prefix import cache_layers, run_continuations, run_prefix

BLOCK = 256
CHUNK_ELEMENTS = 2**24  # logits in memory at once, a few times over


@mx.custom_function
def logsumexp(logits: mx.array) -> mx.array:
    """log Σ exp over the last axis, [..., V] → [...], summed in two levels.

    MLX's own sums a row from left to right on the CPU: at V = 49152 it is off by up to 2e-4 and
    low by 8e-5 on average (mlx 0.32.4), which the average log-probability inherits.
    """
    block = math.gcd(logits.shape[-1], BLOCK)
    if block < BLOCK // 8:  # an odd size: padding copies all logits, so only where it must be
        block = BLOCK
        widths = [(0, 0)] * (logits.ndim - 1) + [(0, -logits.shape[-1] % BLOCK)]
        logits = mx.pad(logits, widths, constant_values=-mx.inf)
    blocks = logits.reshape(*logits.shape[:-1], -1, block)
    return mx.logsumexp(mx.logsumexp(blocks, axis=-1), axis=-1)


@logsumexp.vjp
def _softmax(logits: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    """Softmax in one pass; that of the two levels is 0/0 in a block of nothing but −inf."""
    return cotangent[..., None] * mx.exp(logits - output[..., None])


def average_logps(model: Any, tokens: mx.array, start: mx.array, end: mx.array) -> mx.array:
    """mean over t in [start, end) of log p(tokens[t] | tokens[:t]), per row.

    Args:
        model: an mlx-lm model: token ids [N, T] → logits [N, T, V].
        tokens: int32 [N, T]; start, end: int32 [N], 1 ≤ start < end ≤ T (see `PairBatch`).

    Returns:
        float32 [N], in nats a token.
    """
    logits = model(tokens[:, :-1]).astype(mx.float32)
    targets = tokens[:, 1:]
    logps = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    total: mx.array = logsumexp(logits)  # type: ignore[assignment]  (mlx types it as object)
    logps = logps - total
    # The logits at position t are for token t + 1.
    position = mx.arange(1, tokens.shape[1])
    scored = (position >= start[:, None]) & (position < end[:, None])
    return mx.where(scored, logps, 0.0).sum(axis=-1) / (end - start)


def shared_logps(
    model: Any,
    prefix: mx.array,
    groups: Sequence[tuple[mx.array, mx.array]],
    rows: mx.array,
    targets: mx.array,
    weights: mx.array,
) -> mx.array:
    """The same averages [2B] from a `SharedBatch`: each prompt runs once, and only the rows that
    predict a scored token become logits, a chunk at a time."""
    recorded = run_prefix(model, prefix, cache_layers(model))
    hidden = [run_continuations(model, tokens, recorded, owner) for tokens, owner in groups]
    flat = mx.concatenate([h.reshape(-1, h.shape[-1]) for h in hidden])
    return weights @ row_logps(model, flat[rows], targets)


def row_logps(model: Any, rows: mx.array, targets: mx.array) -> mx.array:
    """log p(targets) [N] of hidden rows [N, D], float32, at most CHUNK_ELEMENTS logits at a time.

    The head is frozen, so the gradient of a row's log-probability with respect to the row is known
    as soon as its logits are: it is formed with them, and the backward pass is a row scale.
    """

    def total(chunk: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        logits = head_logits(model, chunk).astype(mx.float32)
        picked = mx.take_along_axis(logits, tokens[:, None], axis=-1).squeeze(-1)
        logps = picked - logsumexp(logits)  # type: ignore[operator]  (mlx types it as object)
        return logps.sum(), logps

    slope = mx.value_and_grad(total)

    @mx.custom_function
    def chunk_logps(chunk: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        (_, logps), gradient = slope(chunk, tokens)
        return logps, gradient

    @chunk_logps.vjp
    def _(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, mx.array]:
        chunk, tokens = primals
        scaled = cotangents[0][:, None] * outputs[1]
        return scaled.astype(chunk.dtype), mx.zeros_like(tokens)

    vocabulary = head_logits(model, rows[:1]).shape[-1]
    size = max(64, CHUNK_ELEMENTS // vocabulary // 64 * 64)
    found: list[mx.array] = []
    for at in range(0, rows.shape[0], size):
        chunk = rows[at : at + size]
        if found:  # one chunk's logits after the other's, not all at once
            chunk = mx.depends([chunk], [found[-1]])[0]
        found.append(chunk_logps(chunk, targets[at : at + size])[0])  # type: ignore[index]
    return mx.concatenate(found)
