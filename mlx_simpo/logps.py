"""Average log-probabilities of responses under a model.

`average_logps` is the reference: one forward pass of all rows, logits of every position in float32,
a plain log-softmax. `shared_logps` computes the same with less, and is tested against it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from .model.head import head_is_frozen, head_logits, outside_blocks
from .model.prefix import run_continuations, run_prefix

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


@partial(mx.compile, shapeless=True)
def _exponentials(logits: mx.array, greatest: mx.array) -> mx.array:
    """In one pass over the logits."""
    return mx.exp(logits - greatest)


@mx.custom_function
def token_logps(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """log softmax(logits)[target] of each row, and what its gradient is made of.

    Args:
        logits: float32 [N, V]. targets: int32 [N].

    Returns:
        log p(target) [N]; exp(z − max z) [N, V], once for value and gradient; its row sums [N].
    """
    greatest = logits.max(axis=-1, keepdims=True)
    exponentials = _exponentials(logits, greatest)
    # Short sums are more exact than one long one; what is left of an odd size is one as well.
    rows, size = logits.shape
    whole = size - size % BLOCK
    blocks = exponentials[:, :whole].reshape(rows, BLOCK, whole // BLOCK)
    sums = blocks.sum(axis=1).sum(axis=1) + exponentials[:, whole:].sum(axis=1)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)
    return (picked - greatest).squeeze(-1) - mx.log(sums), exponentials, sums


@token_logps.vjp
def _one_hot_minus_softmax(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple:
    targets, (_, exponentials, sums) = primals[1], outputs
    slope = cotangents[0]
    gradient = exponentials * (-slope / sums)[:, None]
    gradient = gradient.at[mx.arange(targets.size), targets].add(slope)
    return gradient, mx.zeros_like(targets)


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
    places: mx.array,
    lengths: mx.array,
    *,
    training: bool,
) -> mx.array:
    """The same averages [2B] from a `SharedBatch`: each prompt runs once, and only the rows that
    predict a scored token become logits, a chunk at a time.

    training: whether gradients will be asked for; see `row_logps`.
    """
    recorded = run_prefix(model, prefix)
    hidden = [run_continuations(model, tokens, recorded, owner) for tokens, owner in groups]
    flat = mx.concatenate([h.reshape(-1, h.shape[-1]) for h in hidden])
    logps = row_logps(model, flat[rows], targets, training=training)
    scored = mx.arange(places.shape[1]) < lengths[:, None]
    return mx.where(scored, logps[places], 0.0).sum(axis=-1) / lengths


def row_logps(model: Any, rows: mx.array, targets: mx.array, *, training: bool) -> mx.array:
    """log p(targets) of hidden rows, at most CHUNK_ELEMENTS logits at a time.

    Args:
        rows: [N, D], the trunk's output. targets: int32 [N], 0 ≤ target < V.
        training: with gradients. A frozen head then takes two matrix products a chunk, a head that
            trains four (it runs again in the backward pass); without, it is one.

    Returns:
        float32 [N], in nats.
    """
    if not training:
        chunk_logps = partial(forward_logps, model)
    elif head_is_frozen(model):
        chunk_logps = frozen_head_logps(model)
    else:
        chunk_logps = trained_head_logps(model)
    vocabulary = head_logits(model, rows[:1]).shape[-1]
    size = max(64, CHUNK_ELEMENTS // vocabulary // 64 * 64)
    found: list[mx.array] = []
    for at in range(0, rows.shape[0], size):
        chunk = rows[at : at + size]
        if found:  # one chunk's logits after the other's, not all at once
            chunk = mx.depends([chunk], [found[-1]])[0]
        found.append(chunk_logps(chunk, targets[at : at + size]))
    return mx.concatenate(found)


def forward_logps(model: Any, rows: mx.array, targets: mx.array) -> mx.array:
    """log p(targets) [N] of rows [N, D] in plain operations."""
    return token_logps(head_logits(model, rows).astype(mx.float32), targets)[0]  # type: ignore


def frozen_head_logps(model: Any) -> Callable[[mx.array, mx.array], mx.array]:
    """`forward_logps` with a gradient to the rows alone, at the price of one more product.

    ∂ log p/∂row does not depend on what is made of log p, so it is formed while the row's logits
    are at hand; the backward pass scales it.
    """

    def total(rows: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        logps = forward_logps(model, rows, targets)
        return logps.sum(), logps

    slope = mx.value_and_grad(total)

    @mx.custom_function
    def chunk_logps(rows: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        (_, logps), gradient = slope(rows, targets)
        return logps, gradient

    @chunk_logps.vjp
    def _(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, mx.array]:
        rows, targets = primals
        scaled = cotangents[0][:, None] * outputs[1]
        return scaled.astype(rows.dtype), mx.zeros_like(targets)

    return lambda rows, targets: chunk_logps(rows, targets)[0]  # type: ignore[index]


def trained_head_logps(model: Any) -> Callable[[mx.array, mx.array], mx.array]:
    """`forward_logps` with gradients to the rows and to whatever trains outside the blocks.

    Those of the weights need the loss's slope, so a chunk's logits are made again for them.
    """
    trained = outside_blocks(model)

    @mx.checkpoint
    def chunk_logps(weights: dict, rows: mx.array, targets: mx.array) -> mx.array:
        model.update(tree_unflatten(list(weights.items())))  # inputs, or no gradient reaches them
        logps = forward_logps(model, rows, targets)
        model.update(tree_unflatten(list(trained.items())))
        return logps

    return partial(chunk_logps, trained)
