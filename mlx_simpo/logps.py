"""Average log-probabilities of responses under a model.

This is the reference: one forward pass of all rows, logits of every position in float32, a plain
log-softmax. Whatever computes the same faster is tested against it.
"""

from typing import Any

import mlx.core as mx


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
    logps = logps - mx.logsumexp(logits, axis=-1)
    # The logits at position t are for token t + 1.
    position = mx.arange(1, tokens.shape[1])
    scored = (position >= start[:, None]) & (position < end[:, None])
    return mx.where(scored, logps, 0.0).sum(axis=-1) / (end - start)
