"""The gated delta rule in matrix products, a chunk of tokens at a time.

For each head, keys kₜ, queries qₜ, values vₜ, a decay gₜ and a rate βₜ move a state S and read it:

    Sₜ = gₜ Sₜ₋₁ + uₜ kₜᵀ   where   uₜ = βₜ (vₜ − gₜ Sₜ₋₁ kₜ),        yₜ = Sₜ qₜ

One token after the other, these are T small steps that read and write the whole state, and all T
states are kept for the gradient. But within a chunk that begins with the state S, the u are the
solution of a triangular system. With d_ti the product of the decays of tokens i + 1 … t, and
A_ti = βₜ d_ti kₜᵀkᵢ for i < t:

    U = (I + A)⁻¹ Diag(β) (V − K₁ Sᵀ)    K₁: rows (decay from the chunk's start to t) kₜ
    Y = Q₁ Sᵀ + P U                      Q₁: as K₁;  P_ti = d_ti qₜᵀkᵢ for i ≤ t
    S ← (decay of the chunk) S + UᵀK₂    K₂: rows (decay from i to the chunk's end) kᵢ

Only S passes from chunk to chunk; everything else is computed for all chunks at once. This is the
WY representation of Yang, Wang, Zhang, Shen and Kim, "Parallelizing linear transformers with the
delta rule over sequence length" (2024), with the gates of Yang, Kautz and Hatamizadeh, "Gated delta
networks" (2024), and with a gate for each entry of the keys as in Kimi Linear (2025).

Decays are multiplied and never divided by, nor is a logarithm taken: a decay may be 0 or underflow.
"""

from typing import NamedTuple

import mlx.core as mx

# Tokens. Measured on a CPU: 32 take 0.85 to 1.05 times as long, 128 take 1.3 to 2.3 times; and the
# fewer the chunks, the fewer matrix products wait for one another.
CHUNK = 64

# Below, a leading "…" stands for [B, chunks, key heads, value heads per key head], where the fourth
# is 1 for what value heads share; C is the number of tokens in a chunk.


class _Products(NamedTuple):
    """What the gates make of keys and queries.

    keys_keys: d_ti kₜᵀkᵢ for i < t, otherwise 0, […, C, C]. queries_keys: d_ti qₜᵀkᵢ for i ≤ t.
    from_start, to_end: decays from the chunk's start to t, and from t to its end, […, C, 1] or
    […, C, Dk].
    """

    keys_keys: mx.array
    queries_keys: mx.array
    from_start: mx.array
    to_end: mx.array


def chunked_delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute the gated delta rule of T tokens; the gradient's memory grows linearly with T.

    Args:
        q, k: [B, T, Hk, Dk]; keys of length 1 or less, as the models normalize them.
        v: [B, T, Hv, Dv], where Hk divides Hv.
        g: decays in [0, 1], [B, T, Hv] or [B, T, Hv, Dk].
        beta: [B, T, Hv], in [0, 2].
        state: before the first token, [B, Hv, Dv, Dk].

    Returns:
        Outputs [B, T, Hv, Dv] in q's dtype, and the state after the last token in float32, which
        all is computed in, whatever the dtypes.
    """
    # Computed again in the backward pass: to save what it needs would take 25 % more memory in a
    # model of 8 layers of size 512, and 4 % less time.
    return mx.checkpoint(_delta_rule)(q, k, v, g, beta, state)


def _delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    tokens, key_heads = k.shape[1:3]
    size = min(CHUNK, 1 << (tokens - 1).bit_length())
    queries, keys = (_chunks(a, key_heads, 1, size) for a in (q, k))
    values, rates = (_chunks(a, key_heads, v.shape[2] // key_heads, size) for a in (v, beta))
    # What fills the last chunk up leaves the state as it is: k = 0, and a decay of 1.
    gates = _chunks(g, key_heads, v.shape[2] // key_heads, size, padding=1)
    products = (_with_vector_gates if g.ndim == 4 else _with_scalar_gates)(queries, keys, gates)
    solution: mx.array = inverse(products.keys_keys * rates[..., None])  # type: ignore[assignment]
    steps = (
        values,
        keys * products.from_start,
        keys * products.to_end,
        solution * rates[..., None, :],
        products.from_start[..., -1:, :],
    )
    before: list[mx.array] = []
    updates: list[mx.array] = []
    current = state.astype(mx.float32).reshape(len(v), *values.shape[2:4], *state.shape[2:])
    for value, key_in, key_out, solve, decay in zip(*map(_split, steps), strict=True):
        before.append(current)
        updates.append(solve @ (value - key_in @ current.swapaxes(-1, -2)))
        current = current * decay + updates[-1].swapaxes(-1, -2) @ key_out
    out = (queries * products.from_start) @ mx.stack(before, axis=1).swapaxes(-1, -2)
    out = out + products.queries_keys @ mx.stack(updates, axis=1)
    out = out.transpose(0, 1, 4, 2, 3, 5).reshape(len(v), -1, *v.shape[2:])
    return out[:, :tokens].astype(q.dtype), current.reshape(state.shape)


def _chunks(array: mx.array, key_heads: int, group: int, size: int, padding: float = 0) -> mx.array:
    """Return [B, T, key_heads · group, …] as float32 [B, chunks, key_heads, group, size, …]."""
    array = array.astype(mx.float32)
    missing = -array.shape[1] % size
    if missing:
        widths = [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)]
        array = mx.pad(array, widths, constant_values=padding)
    array = array.reshape(len(array), -1, size, key_heads, group, *array.shape[3:])
    # A copy, because every matrix product would make its own of a transposed array.
    return mx.contiguous(array.transpose(0, 1, 3, 4, 2, *range(5, array.ndim)))


@mx.custom_function
def _split(array: mx.array) -> tuple[mx.array, ...]:
    """Return the chunks of [B, chunks, …]."""
    return tuple(array[:, index] for index in range(array.shape[1]))


@_split.vjp
def _split_vjp(
    array: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> mx.array:
    """Return the gradient. MLX's own would be an array as large as the whole for each chunk, even
    that of mx.split (0.32.4) for more than ten."""
    return mx.stack(list(cotangents), axis=1)


def _with_scalar_gates(queries: mx.array, keys: mx.array, gates: mx.array) -> _Products:
    """Return the products under a gate per head, […, C]."""
    between, from_start, to_end = decays(gates)  # type: ignore[misc]  (mlx types them as objects)
    columns = keys.swapaxes(-1, -2)
    return _Products(
        between * ((keys @ columns) * _lower(gates.shape[-1], -1)),
        between * (queries @ columns),
        from_start[..., None],
        to_end[..., None],
    )


@mx.custom_function
def decays(gates: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return the products of a chunk's gates g […, C].

    Returns:
        d_ti = g_{i+1} ⋯ gₜ for i ≤ t, otherwise 0, […, C, C]; the products up to t and those behind
        t, […, C].
    """
    size = gates.shape[-1]
    below = _lower(size, -1)  # a product and a sum: mx.where takes ten times as long on a CPU
    between = mx.cumprod(gates[..., None] * below + (1 - below), axis=-2) * _lower(size)
    return between, between[..., 0] * gates[..., :1], between[..., -1, :]


@decays.vjp
def _decays_vjp(
    gates: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> mx.array:
    """Return the gradient: d_si = d_st gₜ d_(t−1)i for i < t ≤ s, so that gₜ's is the sum over s
    and i of d_st d_(t−1)i times the cotangent of d_si. No quotient, hence right where gₜ = 0."""
    (between, from_start, _), (d_between, d_from_start, d_to_end) = outputs, cotangents
    size = gates.shape[-1]
    is_last = (mx.arange(size) == size - 1)[:, None]
    # The chunk's start as a column of its own, before token 0.
    d_all = mx.concatenate(
        [d_from_start[..., None], d_between + is_last * d_to_end[..., None, :]], axis=-1
    )
    start = mx.concatenate([mx.ones_like(gates[..., :1]), from_start[..., :-1]], axis=-1)
    earlier = mx.concatenate([mx.zeros_like(between[..., :1, :]), between[..., :-1, :]], axis=-2)
    earlier = mx.concatenate([start[..., None], earlier], axis=-1)
    return (earlier * (between.swapaxes(-1, -2) @ d_all)).sum(axis=-1)


def _with_vector_gates(queries: mx.array, keys: mx.array, gates: mx.array) -> _Products:
    """Return the products under a gate for each entry of the keys, […, C, Dk].

    d_ti has Dk entries here, too many to store. But for i and t in neighbouring blocks it is the
    decay from i to the border times that from the border to t: the products of two blocks are one
    matrix product. Blocks are joined in pairs, from single tokens to the whole chunk.
    """
    scores = mx.broadcast_to((queries * keys).sum(axis=-1), gates.shape[:-1])[..., None, None]
    both = mx.stack([mx.zeros_like(scores), scores])  # of keys with keys, of queries with keys
    rows, columns = mx.stack([keys, queries])[..., None, :], keys[..., None, :]
    from_start = gates[..., None, :]
    to_end = mx.ones_like(from_start)
    while from_start.shape[-3] > 1:
        (_, later), (earlier, _) = _pairs(rows), _pairs(columns)
        (start_1, start_2), (end_1, end_2) = _pairs(from_start), _pairs(to_end)
        across = (later * start_2) @ (earlier * end_1).swapaxes(-1, -2)
        first, second = _pairs(both)
        both = _block_triangle(first, across, second)
        from_start = mx.concatenate([start_1, start_1[..., -1:, :] * start_2], axis=-2)
        to_end = mx.concatenate([end_1 * start_2[..., -1:, :], end_2], axis=-2)
        rows, columns = (_join_pairs(a) for a in (rows, columns))
    keys_keys, queries_keys = both.squeeze(-3)
    return _Products(keys_keys, queries_keys, from_start.squeeze(-3), to_end.squeeze(-3))


@mx.custom_function
def inverse(lower: mx.array) -> mx.array:
    """Return (I + L)⁻¹ of strictly lower triangular L […, C, C], where C is a power of two.

    Blocks on the diagonal are joined in pairs: [[A, 0], [M, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹MA⁻¹, B⁻¹]].
    (The product of I + (−L)^(2ⁱ) over i is fewer operations, but the powers of L grow: a token that
    is repeated 64 times makes entries of 1 and powers of 1e17, and nothing is left of the result.)
    """
    size = lower.shape[-1]
    blocks = mx.ones((*lower.shape[:-1], 1, 1), lower.dtype)
    while (half := blocks.shape[-1]) < size:
        count = size // (2 * half)
        square = lower.reshape(*lower.shape[:-2], count, 2 * half, count, 2 * half)
        diagonal = mx.moveaxis(mx.diagonal(square, axis1=-4, axis2=-2), -1, -3)
        first, second = _pairs(blocks)
        across = second @ diagonal[..., half:, :half] @ first
        blocks = _block_triangle(first, -across, second)
    return blocks.squeeze(-3)


@inverse.vjp
def _inverse_vjp(lower: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    """Return the gradient of X = (I + L)⁻¹: −XᵀdX Xᵀ. Only its strictly lower part means anything,
    as only that part of L can change."""
    transposed = output.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed)


def _lower(size: int, diagonal: int = 0) -> mx.array:
    """Return ones on and below that diagonal, zeros above it, [size, size]."""
    return mx.tril(mx.ones((size, size)), diagonal)


def _pairs(blocks: mx.array) -> list[mx.array]:
    """Return the blocks at even and at odd places of […, 2n, rows, columns]."""
    paired = blocks.reshape(*blocks.shape[:-3], -1, 2, *blocks.shape[-2:])
    return [half.squeeze(-3) for half in mx.split(paired, 2, axis=-3)]


def _join_pairs(blocks: mx.array) -> mx.array:
    """Return […, 2n, rows, columns] as […, n, 2 · rows, columns]."""
    *leading, count, rows, columns = blocks.shape
    return blocks.reshape(*leading, count // 2, 2 * rows, columns)


def _block_triangle(first: mx.array, across: mx.array, second: mx.array) -> mx.array:
    """Return [[first, 0], [across, second]] of square blocks."""
    top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
    return mx.concatenate([top, mx.concatenate([across, second], axis=-1)], axis=-2)
