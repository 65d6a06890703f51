"""Hidden states and targets → log-probabilities, one chunk of logits at a time.

What a chunk costs depends on who needs a gradient: nobody (evaluation), the hidden states alone
(the head is frozen, as in most LoRA runs), or the head's weights too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..kernels.choice import BUILT_IN, Implementation
from ..kernels.launch import MOST_ROWS
from .head import Head, is_head_frozen, weights_outside_layers

# Logits of one chunk: 64 MiB in float32, of which six or seven are in memory at once on a CPU,
# because MLX allocates ahead of the device (docs/kernel.md).
MAX_CHUNK_LOGITS = 2**24
# With fewer rows, the head's matrix products are too thin to be fast: 64 take 0 to 10 % more time
# than 256 (benchmarks/head.py).
MIN_CHUNK_ROWS = 64
# The backward pass of one layer takes about twice what the head does with a chunk of this many
# times positions × width logits (SmolLM2-135M, of which a layer holds 50 numbers per position and
# unit of width at its peak, and the head 7 chunks).
CHUNK_BESIDE_ONE_LAYER = 4

# (x [C, …], targets [C]) → (log p(targets) [C], ∂ log p/∂x [C, …]).
LogpsAndGradient = Callable[[mx.array, mx.array], tuple[mx.array, Any]]
# (hidden [C, D], targets [C]) → log p(targets) [C].
ChunkLogps = Callable[[mx.array, mx.array], mx.array]


def token_logps(
    model: Any,
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    *,
    training: bool,
    implementation: Implementation = BUILT_IN,
    chunk_logits: int = MAX_CHUNK_LOGITS,
) -> mx.array:
    """Return log p(targets) of hidden states, from a chunk of the logits at a time.

    Args:
        model: the model that made the hidden states, and the weights of its head.
        head: of `head.resolve_head`.
        hidden: [N, D], the trunk's output.
        targets: int32 [N], 0 ≤ target < V.
        training: whether gradients will be asked for. A frozen head then takes two matrix products
            per chunk, a head that trains four (it runs again in the backward pass); evaluation
            takes one.
        chunk_logits: logits of a chunk, at most; MIN_CHUNK_ROWS rows are always one.

    Returns:
        float32 [N], in nats.
    """
    response_logps = partial(
        implementation.response_logps, scale=head.scale, softcap=head.softcap, gradient=training
    )
    if not training:
        chunk_logps = forward_logps(model, head, response_logps)
    elif is_head_frozen(model):
        chunk_logps = frozen_head_logps(model, head, response_logps)
    else:
        chunk_logps = trained_head_logps(model, head, response_logps)
    vocab_size = head.raw_logits(model, hidden[:1]).shape[-1]  # never evaluated
    size = chunk_rows(hidden.shape[0], vocab_size, chunk_logits)
    logps: list[mx.array] = []
    for start in range(0, hidden.shape[0], size):
        chunk = hidden[start : start + size]
        if logps:
            # Chunks do not depend on each other: unless told to wait, all might run at once, and
            # all logits would be in memory together.
            chunk = mx.depends([chunk], [logps[-1]])[0]
        logps.append(chunk_logps(chunk, targets[start : start + size]))
    return mx.concatenate(logps)


def chunk_rows(count: int, vocab_size: int, chunk_logits: int) -> int:
    """Return how many of ``count`` rows to compute at a time, so that all chunks but the last are
    of that size and the last one is not much smaller."""
    most = min(MOST_ROWS, max(MIN_CHUNK_ROWS, chunk_logits // vocab_size))
    return -(-count // -(-count // most))


def chunk_logits_beside_trunk(num_positions: int, width: int, saving_layers: int) -> int:
    """Return how many logits a chunk may have, if the head is not to decide the peak of memory.

    Args:
        num_positions: tokens that the trunk processes. width: of its hidden states.
        saving_layers: layers whose activations are in memory until the backward pass; 0 or 1 with
            gradient checkpointing and in evaluation. One of them saves about 30 numbers per
            position and unit of width, so that the head's 7 chunks are at most a quarter of that.
    """
    return num_positions * width * max(CHUNK_BESIDE_ONE_LAYER, saving_layers)


def forward_logps(model: Any, head: Head, response_logps: LogpsAndGradient) -> ChunkLogps:
    """Return a function for a chunk's log-probabilities without a gradient: one matrix product."""
    return lambda hidden, targets: response_logps(
        head.shifted_raw_logits(model, hidden, targets), targets
    )[0]


def frozen_head_logps(model: Any, head: Head, response_logps: LogpsAndGradient) -> ChunkLogps:
    """Return a function for a chunk's log-probabilities with a gradient to the hidden states alone:
    two matrix products.

    ∂ log p/∂hidden does not depend on what the loss makes of log p, so it is computed while the
    chunk's logits are at hand, and the backward pass only scales it.
    """

    def logps_and_gradient(hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        raw_logits = head.shifted_raw_logits(model, hidden, targets)
        logps, d_raw_logits = response_logps(raw_logits, targets)
        # Of the unshifted product: log p does not depend on the shift, so that has no gradient.
        _, (d_hidden,) = mx.vjp(partial(head.raw_logits, model), [hidden], [d_raw_logits])
        return logps, d_hidden

    return differentiable(logps_and_gradient)


def trained_head_logps(model: Any, head: Head, response_logps: LogpsAndGradient) -> ChunkLogps:
    """Return a function for a chunk's log-probabilities with gradients to the hidden states and to
    all that trains outside the layers: four matrix products.

    The weights' gradients need the loss's, which is not known yet, so a chunk's logits are computed
    again in the backward pass instead of kept.
    """
    trained = weights_outside_layers(model)
    logps_of_logits = differentiable(response_logps)

    @mx.checkpoint
    def chunk_logps(weights: dict, hidden: mx.array, targets: mx.array) -> mx.array:
        # The weights are inputs: mx.checkpoint gives no gradient to arrays that it captures.
        model.update(tree_unflatten(list(weights.items())))
        logps = logps_of_logits(head.raw_logits(model, hidden), targets)
        model.update(tree_unflatten(list(trained.items())))
        return logps

    return partial(chunk_logps, trained)


def differentiable(logps_and_gradient: LogpsAndGradient) -> ChunkLogps:
    """Return a function for the log-probabilities alone, with that gradient for autodiff."""
    run = mx.custom_function(logps_and_gradient)

    @run.vjp
    def backward(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, mx.array]:
        x, targets = primals
        # Row i of x makes log p of row i and no other, so the chain rule is a scale per row.
        d_x = cotangents[0][:, None] * outputs[1]
        return d_x.astype(x.dtype), mx.zeros_like(targets)

    return lambda x, targets: run(x, targets)[0]  # type: ignore[index]
