"""Average log-probabilities over a shared prefix: each prompt runs once, and only hidden states
that predict a scored token become logits.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..kernels.choice import BUILT_IN, Implementation
from .prefix_cache import run_continuations, run_prefix
from .token_logps import token_logps


def shared_prefix_logps(
    model: Any,
    prefix: mx.array,
    groups: Sequence[tuple[mx.array, mx.array]],
    rows: mx.array,
    targets: mx.array,
    places: mx.array,
    lengths: mx.array,
    *,
    training: bool,
    implementation: Implementation = BUILT_IN,
) -> mx.array:
    """The same averages [2B] from a `SharedPrefixBatch`: each prompt runs once, and only the rows that
    predict a scored token become logits, a chunk at a time.

    training: whether gradients will be asked for; see `token_logps`.
    """
    recorded = run_prefix(model, prefix)
    hidden = [run_continuations(model, tokens, recorded, owner) for tokens, owner in groups]
    flat = mx.concatenate([h.reshape(-1, h.shape[-1]) for h in hidden])
    logps = token_logps(
        model, flat[rows], targets, training=training, implementation=implementation
    )
    scored = mx.arange(places.shape[1]) < lengths[:, None]
    return mx.where(scored, logps[places], 0.0).sum(axis=-1) / lengths
