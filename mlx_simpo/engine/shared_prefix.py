"""The shared-prefix engine's computation: each prompt runs once, and only hidden states that
predict a scored token become logits.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx

from ..kernels.choice import BUILT_IN, Implementation
from .gradient_checkpointing import is_checkpointed
from .head import Head
from .lora_linear import SharedWork
from .prefix_cache import run_continuations, run_first, run_prefix
from .token_logps import MAX_CHUNK_LOGITS, chunk_logits_beside_trunk, token_logps


def shared_prefix_logps(
    model: Any,
    head: Head,
    prefix_tokens: mx.array,
    groups: Sequence[tuple[mx.array, mx.array]],
    hidden_indices: mx.array,
    targets: mx.array,
    logp_indices: mx.array,
    response_lengths: mx.array,
    prefix_length: int,
    *,
    training: bool,
    implementation: Implementation = BUILT_IN,
    chunk_logits: int = MAX_CHUNK_LOGITS,
) -> mx.array:
    """Return the average log-probability of each response of a `collate_shared.SharedPrefixBatch`.

    Args:
        model: an mlx-lm model; within `operations.patched`, training takes less memory.
        head: of `head.resolve_head`.
        prefix_tokens, …, prefix_length: the fields of `collate_shared.SharedPrefixBatch`.
        training: whether gradients will be asked for; see `token_logps`.
        chunk_logits: logits computed at once, at most; fewer where the trunk needs less memory.

    Returns:
        float32 [2B], in nats per token: the B chosen responses, then the B rejected ones.
    """
    saves = training and not is_checkpointed(model)
    hidden = _hidden_states(model, prefix_tokens, groups, prefix_length, saves=saves)
    saving_layers = len(model.layers) if saves else 1
    positions = prefix_tokens.size + sum(tokens.size for tokens, _ in groups)
    beside_trunk = chunk_logits_beside_trunk(positions, hidden.shape[1], saving_layers)
    logps = token_logps(
        model,
        head,
        hidden[hidden_indices],
        targets,
        training=training,
        implementation=implementation,
        chunk_logits=min(chunk_logits, beside_trunk),
    )
    loss_mask = mx.arange(logp_indices.shape[1]) < response_lengths[:, None]
    return mx.where(loss_mask, logps[logp_indices], 0.0).sum(axis=-1) / response_lengths


def _hidden_states(
    model: Any,
    prefix_tokens: mx.array,
    groups: Sequence[tuple[mx.array, mx.array]],
    prefix_length: int,
    *,
    saves: bool,
) -> mx.array:
    """Return the hidden states [positions, D] that ``hidden_indices`` count, from all passes.

    saves: whether what the layers compute is saved for the backward pass.
    """
    shared = SharedWork()

    def sharing(*, is_last: bool) -> AbstractContextManager[None]:
        # A checkpointed layer is a function of its weights, and differentiated by itself.
        return shared.in_pass(is_last=is_last) if saves else nullcontext()

    hidden = []
    if prefix_tokens.shape[1] > prefix_length:
        with sharing(is_last=False):
            first, prefix = run_first(model, prefix_tokens, prefix_length)
        hidden.append(first)
    else:
        # Without returning weights: nothing needs most of the last layer, but that would be needed.
        with sharing(is_last=True):
            prefix = run_prefix(model, prefix_tokens)
    for number, (tokens, prefix_index) in enumerate(groups, start=1):
        with sharing(is_last=number == len(groups)):
            hidden.append(run_continuations(model, tokens, prefix, prefix_index))
    return mx.concatenate([h.reshape(-1, h.shape[-1]) for h in hidden])
