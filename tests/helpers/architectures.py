"""Tiny models of every architecture that the engines are tested with, and LoRA on them."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from helpers.tiny import tiny_config, tiny_model
from mlx.utils import tree_map

from mlx_simpo import LoRAConfig
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.model.trainable import make_trainable

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_QWEN_MOE = {**_MOE, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
_GRANITE = {
    "logits_scaling": 4.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_bias": False,
}
# Layers that keep keys and values.
ATTENTION: dict[str, dict[str, Any]] = {
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
    "qwen3_moe": _QWEN_MOE,
    "olmo2": {},
    "granite": {**_GRANITE, "mlp_bias": False},
    "cohere": {"logit_scale": 0.25, "layer_norm_eps": 1e-5},
    "smollm3": {},
}
_LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_YARN = {
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
    "rope_type": "default",
}
# Models that are built otherwise: a text model within another, a trunk or an embedding of another
# name, several caches for a layer, a head that is more than a projection.
OTHERWISE_BUILT: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**tiny_config("gemma3_text"), **ATTENTION["gemma3_text"]},
        "vocab_size": 512,
    },
    "mistral3": {"text_config": tiny_config("ministral3", rope_parameters=_YARN)},
    "llama4": {
        "text_config": tiny_config(
            "llama4_text",
            num_hidden_layers=4,
            attention_bias=False,
            attention_chunk_size=24,
            interleave_moe_layer_step=2,
            intermediate_size_mlp=48,
            num_experts_per_tok=1,
            num_local_experts=4,
            rope_scaling=None,
            use_qk_norm=True,
            floor_scale=16,
        ),
    },
    "gemma4_text": {  # the last two layers take keys and values from those before
        "num_hidden_layers": 4,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 512,
        "num_kv_shared_layers": 2,
        "sliding_window": 24,
        "sliding_window_pattern": 2,
    },
    "nanochat": {},
    "exaone": {"num_layers": 2, "layer_norm_epsilon": 1e-5},
    "gpt_bigcode": {
        "n_embd": 32,
        "n_layer": 2,
        "n_inner": 48,
        "n_head": 4,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
    },
    "longcat_flash": {
        **_LATENT,
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "ffn_hidden_size": 48,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "num_layers": 2,
        "q_lora_rank": 16,
        "routed_scaling_factor": 1.0,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "attention_bias": False,
    },
    "deepseek_v32": {
        **_LATENT,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 512,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "q_lora_rank": 16,
        "first_k_dense_replace": 1,
    },
}
_DELTA_RULE = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
_QWEN_HYBRID = {
    **_DELTA_RULE,
    "num_hidden_layers": 3,
    "full_attention_interval": 2,
    "shared_expert_intermediate_size": 16,
    "partial_rotary_factor": 0.5,
}
_LFM2 = {
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
}
_STATE_SPACE = {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True}
# Layers that keep a recurrent or convolution state, alone or beside attention.
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_QWEN_MOE, **_QWEN_HYBRID},
    "qwen3_5": _QWEN_HYBRID,
    "qwen3_5_moe": {**_QWEN_MOE, **_QWEN_HYBRID},
    "lfm2": {
        **_LFM2,
        "block_dim": 32,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        **_MOE,
        **_LFM2,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "num_dense_layers": 1,
    },
    "granitemoehybrid": {
        **_GRANITE,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_proj_bias": False,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_n_groups": 2,
        "mamba_conv_bias": True,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "mamba_rms_norm": True,
        "lm_head_multiplier": 2.0,
        "embedding_multiplier": 0.5,
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "-", "*", "E", "M"],
        "attention_bias": False,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "mamba_proj_bias": False,
        "ssm_state_size": 8,
        "n_groups": 2,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        **_STATE_SPACE,
    },
    "jamba": {
        "num_hidden_layers": 3,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 4,
        "mamba_expand": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mamba": {**_STATE_SPACE, "state_size": 4, "time_step_rank": 4},
    "mamba2": {
        **_STATE_SPACE,
        "num_heads": 4,
        "head_dim": 16,
        "layer_norm_epsilon": 1e-5,
        "n_groups": 2,
        "time_step_limit": (0.0, 100.0),
        "time_step_rank": 4,
    },
    "kimi_linear": {
        **_MOE,
        **_LATENT,
        "num_hidden_layers": 3,
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "num_heads": 4,
            "head_dim": 8,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 512,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "olmo_hybrid": {
        **_DELTA_RULE,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_allow_neg_eigval": True,
        "attention_bias": False,
    },
    "plamo2": {
        "num_hidden_layers": 3,
        "hidden_size_per_head": 8,
        "mamba_d_state": 8,
        "mamba_num_heads": 4,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 5.0,
        "attention_window_size": 24,
        "block_types": ["recurrent", "attention", "recurrent"],
    },
    "rwkv7": {
        "num_hidden_layers": 3,
        "norm_eps": 1e-5,
        "a_low_rank_dim": 4,
        "v_low_rank_dim": 4,
        "gate_low_rank_dim": 4,
        "decay_low_rank_dim": 4,
    },
}
ARCHITECTURES = ATTENTION | OTHERWISE_BUILT | RECURRENT


def architecture(name: str = "llama", **changes: Any) -> Any:
    """A tiny model of this architecture in which every weight counts: what is 0 or 1 when a model
    is made (gates, biases, decay rates, norms) has noise on it.

    changes: to its settings; where the text model is wrapped, to that model's too.
    """
    settings = {**ARCHITECTURES[name], **changes}
    if "text_config" in settings:
        settings["text_config"] = {**settings["text_config"], **changes}
    model = tiny_model(name, **settings)
    make_trainable(model)
    mx.random.seed(1)
    model.update(
        tree_map(
            lambda p: p + 0.2 * mx.random.normal(p.shape) if p.ndim < 2 else p, model.parameters()
        )
    )
    mx.eval(model.parameters())
    return model


def architecture_with_lora(name: str = "llama", **lora: Any) -> Any:
    """A tiny model of this architecture with LoRA whose matrices are not zero."""
    return with_lora(architecture(name), **lora)


def with_lora(model: nn.Module, **lora: Any) -> Any:
    """The model with LoRA of rank 4, and noise on it: B is zero at first, and so would be A's
    gradient."""
    attach_lora(model, LoRAConfig(rank=4, **lora), seed=0)
    noisy = tree_map(lambda p: p + 0.05 * mx.random.normal(p.shape), model.trainable_parameters())
    model.update(noisy)
    return model
