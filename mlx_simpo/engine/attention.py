"""Attention with a gradient that computes the scores one tile of query rows at a time.

Where MLX has no fused gradient (`fused_attention` asks it), it computes all scores [heads, T, S] at
once while it differentiates, the masked half included, and keeps several arrays of their size. Here
a tile of query rows meets only the keys that it may see. The probabilities of a short sequence are
saved for the backward pass; those of a long one are recomputed, so that memory grows with its
length and not with its square.

The backward pass (Dao et al., FlashAttention, 2022, appendix B.2), with P = softmax(scale · QKᵀ),
O = PV, dP = dO Vᵀ and δ the row sums of P ∘ dP: dV = Pᵀ dO, dS = P ∘ (dP − δ), dQ = scale · dS K,
dK = scale · dSᵀ Q. (The row sums of dO ∘ O are the same δ for less work, but not to the last bit:
the gradient of a softmax over one key would not be 0.)

A GPU takes some microseconds to start an operation, however small. So scale and mask are part of a
matrix product (mx.addmm), the layers of a pass share the mask's arrays (`CausalMask`), and what
only several tiles need is not done for one.
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


class CausalMask(str):
    """The mask "causal", with the arrays that the layers of one pass share.

    biases: those of `_bias` that layers have made of it so far.
    """

    def __new__(cls) -> "CausalMask":
        mask = super().__new__(cls, "causal")
        mask.biases = {}
        return mask

    biases: dict[tuple, mx.array]


class _Problem(NamedTuple):
    """What attention is computed of, beside its arrays.

    groups: query heads per key head. shares_biases: whether masks may stay in memory for the whole
    pass.
    """

    tiles: list[Tile]
    groups: int
    scale: float
    mask: mx.array | str | None
    shares_biases: bool


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
        mask: "causal" (or a `CausalMask`), None, or booleans [T, S], True where a query sees a key.
        tile_scores: scores computed at once.

    Returns:
        [n, H, T, E], computed in the dtype that the three arrays have in common.
    """
    causal = isinstance(mask, str)
    tiles = split_into_tiles(queries.shape, keys.shape[2], tile_scores, causal=causal)
    rows_times_keys = sum((tile.stop - tile.start) * tile.num_keys for tile in tiles)
    saves_probabilities = queries.shape[0] * queries.shape[1] * rows_times_keys <= MAX_SAVED_SCORES
    groups = queries.shape[1] // keys.shape[1]
    problem = _Problem(tiles, groups, scale, mask, saves_probabilities)

    @mx.custom_function
    def forward(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        out, probabilities = _forward(queries, keys, values, problem)
        # The backward pass gets primals, cotangents and outputs only: what it reuses is an output.
        return (out, *(probabilities if saves_probabilities else ()))

    @forward.vjp
    def backward(
        primals: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, ...]:
        queries, keys, values = primals
        return _backward(queries, keys, values, cotangents[0], outputs[1:], problem)

    dtype = mx.result_type(queries, keys, values)
    return forward(*(array.astype(dtype) for array in (queries, keys, values)))[0]  # type: ignore[index]


def _forward(
    queries: mx.array, keys: mx.array, values: mx.array, problem: _Problem
) -> tuple[mx.array, list[mx.array]]:
    """Return the output [n, H, T, E], and each tile's probabilities [n, K, H/K · rows, keys]."""
    outputs: list[mx.array] = []
    probabilities = []
    for tile in problem.tiles:
        q = _tile_rows(queries, tile, keys.shape[1], after=outputs[-1:])
        p = _probabilities(q, keys, tile, problem)
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
    problem: _Problem,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of queries, keys and values, in their shapes and dtype."""
    d_queries: list[mx.array] = []
    d_keys = d_values = None
    previous: list[mx.array] = []
    # The last tile first: it sees all keys, so its gradients are what the others are added to.
    for i, tile in reversed(list(enumerate(problem.tiles))):
        q, d_o = (_tile_rows(a, tile, keys.shape[1], after=previous) for a in (queries, d_out))
        p = saved_probabilities[i] if saved_probabilities else None
        p = _probabilities(q, keys, tile, problem) if p is None else p
        k, v = keys[:, :, : tile.num_keys], values[:, :, : tile.num_keys]
        d_p = d_o @ v.swapaxes(-1, -2)
        delta = (p * d_p).sum(axis=-1, keepdims=True)
        d_s = p * (d_p - delta)
        d_q = mx.addmm(_zero(d_s.dtype), d_s, k, alpha=problem.scale)
        d_queries.append(d_q.reshape(*queries.shape[:2], -1, queries.shape[3]))
        d_k = mx.addmm(_zero(d_s.dtype), d_s.swapaxes(-1, -2), q, alpha=problem.scale)
        d_keys = _add_to_first(d_keys, d_k, problem)
        d_values = _add_to_first(d_values, p.swapaxes(-1, -2) @ d_o, problem)
        previous = [d_queries[-1], d_keys, d_values]
    assert d_keys is not None
    assert d_values is not None
    d_queries = d_queries[::-1]
    d_keys, d_values = (a.astype(keys.dtype) for a in (d_keys, d_values))
    return _concatenate_rows(d_queries), d_keys, d_values


def _add_to_first(total: mx.array | None, part: mx.array, problem: _Problem) -> mx.array:
    """Return ``total`` with ``part`` added to as many of its first rows; None: ``part`` is all."""
    if total is None:
        # Half precision would round a sum over several tiles at each of them.
        return part if len(problem.tiles) == 1 else part.astype(mx.float32)
    return total.at[:, :, : part.shape[2]].add(part)


def _tile_rows(array: mx.array, tile: Tile, kv_heads: int, after: list[mx.array]) -> mx.array:
    """Return a tile's rows of [n, H, T, …] as [n, K, H/K · rows, …], heads that share keys joined.

    after: arrays to wait for. Tiles do not depend on each other, so MLX might schedule all of them
    at once, and all their scores would be in memory together.
    """
    rows = array[:, :, tile.start : tile.stop].reshape(len(array), kv_heads, -1, array.shape[3])
    return mx.depends([rows], after)[0] if after else rows


def _probabilities(q: mx.array, keys: mx.array, tile: Tile, problem: _Problem) -> mx.array:
    """Return softmax(scale · QKᵀ) [n, K, H/K · rows, keys] of a tile's rows ``q``."""
    k = keys[:, :, : tile.num_keys].swapaxes(-1, -2)
    dtype = q.dtype
    mask = problem.mask
    if isinstance(mask, CausalMask) and problem.shares_biases:
        key = (tile, problem.groups, dtype)
        if key not in mask.biases:
            mask.biases[key] = _bias(problem, tile, dtype)
        bias = mask.biases[key]
    else:
        bias = _bias(problem, tile, dtype)
    return mx.softmax(mx.addmm(bias, q, k, alpha=problem.scale), axis=-1, precise=True)


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


def _bias(problem: _Problem, tile: Tile, dtype: mx.Dtype) -> mx.array:
    """Return what a tile's mask adds to its scores: 0 where its rows see a key, −inf elsewhere,
    [H/K · rows, keys], or the scalar 0 if they see all.

    Under a causal mask, the tile's last row is at the position of the last key that it sees.
    """
    mask = problem.mask
    if mask is None:
        return _zero(dtype)
    if isinstance(mask, str):
        position = mx.arange(tile.num_keys - tile.stop + tile.start, tile.num_keys)
        visible = position[:, None] >= mx.arange(tile.num_keys)
    else:
        visible = mask[tile.start : tile.stop]
    bias = mx.where(visible, _zero(dtype), mx.array(-mx.inf, dtype))
    return mx.broadcast_to(bias, (problem.groups, *bias.shape)).reshape(-1, tile.num_keys)


def _zero(dtype: mx.Dtype) -> mx.array:
    return mx.array(0, dtype)


def _concatenate_rows(tiles: list[mx.array]) -> mx.array:
    """Join [n, H, rows, …] along the rows."""
    return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)
