"""Attention with a gradient that computes the scores one tile of query rows at a time.

While it differentiates, MLX computes all scores [heads, T, S] at once, the masked half included,
and keeps several arrays of their size (mlx 0.32.4: its fused kernels serve inference). Here a tile
of query rows meets only the keys that it may see. The probabilities of a short sequence are saved
for the backward pass; those of a long one are recomputed, so that memory grows with its length and
not with its square.

The backward pass (Dao et al., FlashAttention, 2022, appendix B.2), with P = softmax(scale · QKᵀ),
O = PV, dP = dO Vᵀ and δ the row sums of P ∘ dP: dV = Pᵀ dO, dS = P ∘ (dP − δ), dQ = scale · dS K,
dK = scale · dSᵀ Q. (The row sums of dO ∘ O are the same δ for less work, but not to the last bit:
the gradient of a softmax over one key would not be 0.)
"""

from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

from .figures import CPU

MIN_TILE_ROWS = 64  # with fewer rows, a tile's matrix products are too thin to be fast
# Scores of one call that are saved for its backward pass: 32 MiB in float32, per layer.
MAX_SAVED_SCORES = 2**23


class Tile(NamedTuple):
    """Query rows [start, stop) and the number of keys that the last of them sees."""

    start: int
    stop: int
    num_keys: int


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None,
    tile_scores: int = CPU.tile_scores,
) -> mx.array:
    """Compute mx.fast.scaled_dot_product_attention, with a gradient that needs less memory.

    Args:
        queries: [n, H, T, D], of the last T of S positions.
        keys, values: [n, K, S, D] and [n, K, S, E], where K divides H.
        mask: "causal", None, or booleans [T, S], True where a query sees a key.
        tile_scores: scores computed at once.

    Returns:
        [n, H, T, E].
    """
    causal = isinstance(mask, str)
    tiles = split_into_tiles(queries.shape, keys.shape[2], tile_scores, causal=causal)
    rows_times_keys = sum((tile.stop - tile.start) * tile.num_keys for tile in tiles)
    saves_probabilities = queries.shape[0] * queries.shape[1] * rows_times_keys <= MAX_SAVED_SCORES

    @mx.custom_function
    def forward(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        out, probabilities = _forward(queries, keys, values, tiles, scale, mask)
        # The backward pass gets primals, cotangents and outputs only: what it reuses is an output.
        return (out, *(probabilities if saves_probabilities else ()))

    @forward.vjp
    def backward(
        primals: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, ...]:
        queries, keys, values = primals
        d_out, saved_probabilities = cotangents[0], outputs[1:]
        return _backward(queries, keys, values, d_out, saved_probabilities, tiles, scale, mask)

    return forward(queries, keys, values)[0]  # type: ignore[index]


def _forward(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    tiles: list[Tile],
    scale: float,
    mask: mx.array | str | None,
) -> tuple[mx.array, list[mx.array]]:
    """Return the output [n, H, T, E], and each tile's probabilities [n, K, H/K · rows, keys]."""
    outputs: list[mx.array] = []
    probabilities = []
    for tile in tiles:
        q = _tile_rows(queries, tile, keys.shape[1], after=outputs[-1:])
        p = _probabilities(q, queries.shape[2], keys, tile, scale, mask)
        out = p @ values[:, :, : tile.num_keys]
        outputs.append(out.reshape(*queries.shape[:2], -1, values.shape[3]))
        probabilities.append(p)
    return _concatenate_rows(outputs), probabilities


def _backward(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    d_out: mx.array,
    saved_probabilities: tuple[mx.array, ...],
    tiles: list[Tile],
    scale: float,
    mask: mx.array | str | None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of queries, keys and values, in their shapes and dtypes."""
    d_queries: list[mx.array] = []
    # In float32: they are sums over all tiles, which half precision would round at each.
    d_keys, d_values = (mx.zeros(a.shape, mx.float32) for a in (keys, values))
    previous: list[mx.array] = []
    for i, tile in enumerate(tiles):
        q, d_o = (_tile_rows(a, tile, keys.shape[1], after=previous) for a in (queries, d_out))
        if saved_probabilities:
            p = saved_probabilities[i]
        else:
            p = _probabilities(q, queries.shape[2], keys, tile, scale, mask)
        k, v = keys[:, :, : tile.num_keys], values[:, :, : tile.num_keys]
        d_p = d_o @ v.swapaxes(-1, -2)
        delta = (p * d_p).sum(axis=-1, keepdims=True)
        d_s = p * (d_p - delta)
        d_q = d_s @ k * scale
        d_queries.append(d_q.reshape(*queries.shape[:2], -1, queries.shape[3]))
        seen = (slice(None), slice(None), slice(tile.num_keys))
        d_keys = d_keys.at[seen].add(d_s.swapaxes(-1, -2) @ (q * scale))
        d_values = d_values.at[seen].add(p.swapaxes(-1, -2) @ d_o)
        previous = [d_queries[-1], d_keys, d_values]
    return _concatenate_rows(d_queries), d_keys.astype(keys.dtype), d_values.astype(values.dtype)


def _tile_rows(array: mx.array, tile: Tile, kv_heads: int, after: list[mx.array]) -> mx.array:
    """Return a tile's rows of [n, H, T, …] as [n, K, H/K · rows, …], heads that share keys joined.

    after: arrays to wait for. Tiles do not depend on each other, so MLX might schedule all of them
    at once, and all their scores would be in memory together.
    """
    rows = array[:, :, tile.start : tile.stop].reshape(len(array), kv_heads, -1, array.shape[3])
    return mx.depends([rows], after)[0] if after else rows


def _probabilities(
    q: mx.array,
    num_queries: int,
    keys: mx.array,
    tile: Tile,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """Return softmax(scale · QKᵀ) [n, K, H/K · rows, keys] of a tile's rows ``q``."""
    scores = q * scale @ keys[:, :, : tile.num_keys].swapaxes(-1, -2)
    bias = mask_bias(mask, tile, num_queries, keys.shape[2], scores.dtype)
    if bias is not None:
        by_head = scores.reshape(*scores.shape[:2], -1, tile.stop - tile.start, tile.num_keys)
        scores = (by_head + bias).reshape(scores.shape)
    return mx.softmax(scores, axis=-1, precise=True)


def split_into_tiles(
    queries_shape: tuple[int, ...], num_keys: int, tile_scores: int, *, causal: bool
) -> list[Tile]:
    """Divide the T rows of queries [n, H, T, D] into tiles of about equal size."""
    n, heads, num_queries = queries_shape[:3]
    rows = max(MIN_TILE_ROWS, tile_scores // (n * heads * num_keys))
    count = -(-num_queries // rows)
    edges = [num_queries * i // count for i in range(count + 1)]
    return [
        Tile(start, stop, num_keys - num_queries + stop if causal else num_keys)
        for start, stop in pairwise(edges)
    ]


def mask_bias(
    mask: mx.array | str | None, tile: Tile, num_queries: int, num_keys: int, dtype: mx.Dtype
) -> mx.array | None:
    """Return 0 where a tile's rows see a key, −inf elsewhere, [rows, keys]; None if they see all.

    Queries are the last of the positions, so query i is at position num_keys − num_queries + i.
    """
    if mask is None:
        return None
    if isinstance(mask, str):
        first = num_keys - num_queries + tile.start
        position = mx.arange(first, first + tile.stop - tile.start)
        visible = position[:, None] >= mx.arange(tile.num_keys)
    else:
        visible = mask[tile.start : tile.stop]
    return mx.where(visible, mx.array(0, dtype), mx.array(-mx.inf, dtype))


def _concatenate_rows(tiles: list[mx.array]) -> mx.array:
    """Join [n, H, rows, …] along the rows."""
    return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)
