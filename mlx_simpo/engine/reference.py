"""The reference: one forward pass of all sequences, logits of every position in float32, a plain
log-softmax. Every other way to the same numbers is tested against it.
"""

import math
from typing import Any

import mlx.core as mx

from ..kernels.built_in import BLOCK


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
        tokens: int32 [N, T]; start, end: int32 [N], 1 ≤ start < end ≤ T (see `StackedBatch`).

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
