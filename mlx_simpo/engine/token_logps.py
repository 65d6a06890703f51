"""Average log-probabilities of responses under a model.

`average_logps` is the reference: one forward pass of all rows, logits of every position in float32,
a plain log-softmax. `shared_prefix_logps` computes the same with less, and is tested against it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..kernels.choice import BUILT_IN, Implementation
from ..kernels.launch import MOST_ROWS
from .head import Head, is_head_frozen, outside_blocks, resolve_head

CHUNK_ELEMENTS = 2**24  # logits in memory at once, a few times over


def token_logps(
    model: Any,
    rows: mx.array,
    targets: mx.array,
    *,
    training: bool,
    implementation: Implementation = BUILT_IN,
) -> mx.array:
    """log p(targets) of hidden rows, at most CHUNK_ELEMENTS logits at a time.

    Args:
        rows: [N, D], the trunk's output. targets: int32 [N], 0 ≤ target < V.
        training: with gradients. A frozen head then takes two matrix products a chunk, a head that
            trains four (it runs again in the backward pass); without, it is one.

    Returns:
        float32 [N], in nats.
    """
    head, response_logps = resolve_head(model), implementation.response_logps
    settings = {"scale": head.scale, "softcap": head.softcap}
    if not training:
        chunk_logps = forward_logps(head, partial(response_logps, **settings, gradient=False))
    elif is_head_frozen(model):
        chunk_logps = frozen_head_logps(head, partial(response_logps, **settings, gradient=True))
    else:
        with_gradient = partial(response_logps, **settings, gradient=True)
        chunk_logps = trained_head_logps(model, head, with_gradient)
    vocabulary = head.product(rows[:1]).shape[-1]
    size = min(MOST_ROWS, max(64, CHUNK_ELEMENTS // vocabulary // 64 * 64))
    found: list[mx.array] = []
    for at in range(0, rows.shape[0], size):
        chunk = rows[at : at + size]
        if found:  # one chunk's logits after the other's, not all at once
            chunk = mx.depends([chunk], [found[-1]])[0]
        found.append(chunk_logps(chunk, targets[at : at + size]))
    return mx.concatenate(found)


ChunkLogps = Callable[[mx.array, mx.array], mx.array]
OfProducts = Callable[[mx.array, mx.array], tuple[mx.array, Any]]


def forward_logps(head: Head, response_logps: OfProducts) -> ChunkLogps:
    """log p(targets) [N] of rows [N, D], without a gradient."""
    return lambda rows, targets: response_logps(head.centred(rows, targets), targets)[0]


def frozen_head_logps(head: Head, response_logps: OfProducts) -> ChunkLogps:
    """The same with a gradient to the rows alone, at the price of one more product.

    ∂ log p/∂row does not depend on what is made of log p, so it is formed while the row's logits
    are at hand; the backward pass scales it.
    """

    def both(rows: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        logps, slope = response_logps(head.centred(rows, targets), targets)
        _, (gradient,) = mx.vjp(head.product, [rows], [slope])
        return logps, gradient

    return differentiable(both)


def trained_head_logps(model: Any, head: Head, response_logps: OfProducts) -> ChunkLogps:
    """The same with gradients to the rows and to whatever trains outside the blocks.

    Those of the weights need the loss's slope, so a chunk's logits are made again for them.
    """
    trained = outside_blocks(model)
    token_logps = differentiable(response_logps)

    @mx.checkpoint
    def chunk_logps(weights: dict, rows: mx.array, targets: mx.array) -> mx.array:
        model.update(tree_unflatten(list(weights.items())))  # inputs, or no gradient reaches them
        logps = token_logps(head.product(rows), targets)
        model.update(tree_unflatten(list(trained.items())))
        return logps

    return partial(chunk_logps, trained)


def differentiable(both: OfProducts) -> ChunkLogps:
    """Of a function (x [C, …], targets [C]) → (log p [C], ∂ log p/∂x), the log p alone, with that
    gradient for autodiff."""
    made = mx.custom_function(both)

    @made.vjp
    def _(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, mx.array]:
        x, targets = primals
        scaled = cotangents[0][:, None] * outputs[1]
        return scaled.astype(x.dtype), mx.zeros_like(targets)

    return lambda x, targets: made(x, targets)[0]  # type: ignore[index]
