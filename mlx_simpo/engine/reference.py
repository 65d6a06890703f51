"""The reference engine's computation: one forward pass of all sequences, the logits of every
position in float32, a plain log-softmax. Every faster way to the same numbers is tested against it.
"""

from typing import Any

import mlx.core as mx

from ..kernels.two_level import reduce_in_two_levels


@mx.custom_function
def logsumexp(logits: mx.array) -> mx.array:
    """Return log Σ exp over the last axis, [..., V] → [...], summed in two levels."""
    return reduce_in_two_levels(mx.logsumexp, logits, layout="contiguous")


@logsumexp.vjp
def _logsumexp_vjp(logits: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    """Return the gradient: the softmax times the cotangent.

    Written out because autodiff goes through both levels, and the inner softmax of a segment of
    nothing but −inf is 0/0.
    """
    return cotangent[..., None] * mx.exp(logits - output[..., None])


def average_logps(
    model: Any, tokens: mx.array, score_start: mx.array, score_end: mx.array
) -> mx.array:
    """Return the mean over t in [score_start, score_end) of log p(tokens[t] | tokens[:t]).

    Args:
        model: an mlx-lm model: token ids [N, T] → logits [N, T, V].
        tokens: int32 [N, T].
        score_start, score_end: int32 [N], 1 ≤ score_start < score_end ≤ T; see
            `collate_stacked.StackedBatch`.

    Returns:
        float32 [N], in nats per token.
    """
    logits = model(tokens[:, :-1]).astype(mx.float32)
    targets = tokens[:, 1:]
    target_logits = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    total: mx.array = logsumexp(logits)  # type: ignore[assignment]  (mlx types it as object)
    logps = target_logits - total
    position = mx.arange(1, tokens.shape[1])  # the logits at position t are for token t + 1
    loss_mask = (position >= score_start[:, None]) & (position < score_end[:, None])
    return mx.where(loss_mask, logps, 0.0).sum(axis=-1) / (score_end - score_start)
