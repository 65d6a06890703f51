"""Attention with a gradient that makes the scores a block of rows at a time.

While it differentiates, MLX makes all scores [heads, T, S] at once, the masked half included, and
keeps several arrays of their size (mlx 0.32.4: its fused kernels serve inference). Here a block of
query rows meets the keys that it may see and no more. Of a short sequence the probabilities are
kept for the backward pass; those of a long one are made again, so that memory grows with its
length and not with its square.

The backward pass (Dao et al., FlashAttention, 2022, appendix B.2), with P = softmax(scale · QKᵀ),
O = PV, dP = dO Vᵀ and δ the row sums of P ∘ dP: dV = Pᵀ dO, dS = P ∘ (dP − δ), dQ = scale · dS K,
dK = scale · dSᵀ Q. (The row sums of dO ∘ O are the same δ for less, but not to the last bit: the
gradient of a softmax over one key would not be 0.)
"""

from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

# Scores made at once: what a CPU's cache holds; on GPUs, what is worth a few launches.
BLOCK_CPU, BLOCK_GPU = 2**19, 2**24
ROWS = 64  # of a block at least: below, its products are too thin
KEPT = 2**23  # scores of one call that are kept for its backward pass


class Block(NamedTuple):
    """Query rows [start, stop), and how many keys the last of them sees."""

    start: int
    stop: int
    keys: int


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """What mx.fast.scaled_dot_product_attention computes.

    Args:
        queries: [n, H, T, D], of the last T of S positions. keys: [n, K, S, D], values:
            [n, K, S, E], K a divisor of H. mask: "causal", None, or booleans [T, S], True
            where a query sees a key.

    Returns:
        [n, H, T, E].
    """
    blocks = blocks_of(queries.shape, keys.shape[2], causal=isinstance(mask, str))
    scores = sum(b.keys * (b.stop - b.start) for b in blocks) * queries.shape[0] * queries.shape[1]

    @mx.custom_function
    def run(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        out, weights = _forward(queries, keys, values, blocks, scale, mask)
        return (out, *(weights if scores <= KEPT else ()))

    @run.vjp
    def _(given: tuple, slopes: tuple, made: tuple) -> tuple[mx.array, ...]:
        queries, keys, values = given
        return _backward(queries, keys, values, slopes[0], made[1:], blocks, scale, mask)

    return run(queries, keys, values)[0]  # type: ignore[index]


def _forward(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    blocks: list[Block],
    scale: float,
    mask: mx.array | str | None,
) -> tuple[mx.array, list[mx.array]]:
    """The output, and each block's probabilities."""
    found: list[mx.array] = []
    kept = []
    for block in blocks:
        rows = _rows(queries, block, keys.shape[1], found[-1:])
        weights = _probabilities(rows, queries.shape[2], keys, block, scale, mask)
        out = weights @ values[:, :, : block.keys]
        found.append(out.reshape(*queries.shape[:2], -1, values.shape[3]))
        kept.append(weights)
    return _joined(found), kept


def _backward(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    slope: mx.array,
    kept: tuple[mx.array, ...],
    blocks: list[Block],
    scale: float,
    mask: mx.array | str | None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of queries, keys and values from ``slope``, that of the output."""
    of_queries, before = [], []
    of_keys, of_values = (mx.zeros(a.shape, mx.float32) for a in (keys, values))
    for number, block in enumerate(blocks):
        rows, slopes = (_rows(array, block, keys.shape[1], before) for array in (queries, slope))
        if kept:
            weights = kept[number]
        else:
            weights = _probabilities(rows, queries.shape[2], keys, block, scale, mask)
        seen_keys, seen_values = keys[:, :, : block.keys], values[:, :, : block.keys]
        of_weights = slopes @ seen_values.swapaxes(-1, -2)
        delta = (weights * of_weights).sum(axis=-1, keepdims=True)
        of_scores = weights * (of_weights - delta)
        of_rows = of_scores @ seen_keys * scale
        of_queries.append(of_rows.reshape(*queries.shape[:2], -1, queries.shape[3]))
        places = (slice(None), slice(None), slice(block.keys))
        of_keys = of_keys.at[places].add(of_scores.swapaxes(-1, -2) @ (rows * scale))
        of_values = of_values.at[places].add(weights.swapaxes(-1, -2) @ slopes)
        before = [of_queries[-1], of_keys, of_values]
    return _joined(of_queries), of_keys.astype(keys.dtype), of_values.astype(values.dtype)


def _rows(array: mx.array, block: Block, groups: int, after: list[mx.array]) -> mx.array:
    """A block's rows of [n, H, T, …] as [n, K, H/K · rows, …], heads that share keys together; not
    made before ``after``, or all blocks would be at once."""
    rows = array[:, :, block.start : block.stop].reshape(len(array), groups, -1, array.shape[3])
    return mx.depends([rows], after)[0] if after else rows


def _probabilities(
    rows: mx.array,
    queries: int,
    keys: mx.array,
    block: Block,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """softmax(scale · QKᵀ) [n, K, H/K · rows, keys] of a block's rows among ``queries``."""
    scores = rows * scale @ keys[:, :, : block.keys].swapaxes(-1, -2)
    hidden = unseen(mask, block, queries, keys.shape[2], scores.dtype)
    if hidden is not None:
        by_head = scores.reshape(*scores.shape[:2], -1, block.stop - block.start, block.keys)
        scores = (by_head + hidden).reshape(scores.shape)
    return mx.softmax(scores, axis=-1, precise=True)


def blocks_of(queries: tuple[int, ...], keys: int, *, causal: bool) -> list[Block]:
    """The rows of queries [n, H, T, D] in blocks of like size."""
    n, heads, count = queries[:3]
    most = BLOCK_GPU if mx.default_device() == mx.Device(mx.gpu) else BLOCK_CPU
    size = max(ROWS, most // (n * heads * keys))
    parts = -(-count // size)
    edges = [count * part // parts for part in range(parts + 1)]
    return [
        Block(start, stop, keys - count + stop if causal else keys)
        for start, stop in pairwise(edges)
    ]


def unseen(
    mask: mx.array | str | None, block: Block, queries: int, keys: int, dtype: mx.Dtype
) -> mx.array | None:
    """0 where a block's rows see a key and −inf elsewhere, [rows, keys]; None if they see all."""
    if mask is None:
        return None
    if isinstance(mask, str):
        first = keys - queries + block.start
        place = mx.arange(first, first + block.stop - block.start)
        seen = place[:, None] >= mx.arange(block.keys)
    else:
        seen = mask[block.start : block.stop]
    return mx.where(seen, mx.array(0, dtype), mx.array(-mx.inf, dtype))


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
