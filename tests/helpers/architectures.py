"""Tiny models of every architecture that the engines are tested with, and LoRA on them."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from helpers.tiny import tiny_model
from mlx.utils import tree_map

from mlx_simpo import LoRAConfig
from mlx_simpo.model.lora import attach_lora

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Those whose prefix can be shared.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    # mlx-lm reads Mistral's window from a list of layer types only; a third as long as the pairs.
    "mistral": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 24, "sliding_window_pattern": 2, "num_hidden_layers": 4},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_MOE, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "olmo2": {},
    "granite": {
        "logits_scaling": 4.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "cohere": {"logit_scale": 0.25, "layer_norm_eps": 1e-5},
    "smollm3": {},
}
# Those with a recurrent state, which cannot be shared.
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {
        "state_size": 4,
        "intermediate_size": 48,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "qwen3_next": {  # gated delta rule in one layer, attention in the other, as in Qwen 3.5
        **_MOE,
        "full_attention_interval": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.5,
    },
}


def architecture_with_lora(name: str = "llama", **lora: Any) -> Any:
    """A tiny model of this architecture with LoRA whose matrices are not zero."""
    return with_lora(tiny_model(name, **(ARCHITECTURES | RECURRENT)[name]), **lora)


def with_lora(model: nn.Module, **lora: Any) -> Any:
    """The model with LoRA of rank 4, and noise on it: B is zero at first, and so would be A's
    gradient."""
    attach_lora(model, LoRAConfig(rank=4, **lora), seed=0)
    noisy = tree_map(lambda p: p + 0.05 * mx.random.normal(p.shape), model.trainable_parameters())
    model.update(noisy)
    return model
