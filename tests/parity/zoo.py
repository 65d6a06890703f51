"""A tiny random model of every architecture that is converted, as transformers saves it, and its
logits in both frameworks.

Weights are large enough for logits of size 1 to 10, and norms, biases and the other vectors are
moved off their defaults: whatever is lost on the way, the logits show it.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import torch
from helpers.tiny import tiny_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from mlx_simpo import load_adapter, load_model

NOTHING: Mapping[str, Any] = MappingProxyType({})
EXACT = 1e-4  # between the frameworks where nothing is known to differ
TOKENS = np.random.default_rng(1).integers(3, 500, (2, 40))


class Zoo(NamedTuple):
    """changes: to COMMON. floor: the largest |torch - MLX| of a base's logits; why: where it is
    more than EXACT. std: of the random matrices; q_norm: what that norm is multiplied by (Gemma 4
    does not scale its attention, and is chaotic in float32 with random queries of full size).
    experts: the module that holds the routed ones, as transformers names it.
    """

    model_type: str
    changes: Mapping[str, Any] = NOTHING
    floor: float = EXACT
    why: str = ""
    std: float = 0.15
    q_norm: float = 1.0
    experts: str | None = None


COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3333.0},
    "tie_word_embeddings": False,
}
GELU = "mlx-lm 0.32.2 computes the exact GELU; the model is trained with the tanh approximation"
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": COMMON["rope_parameters"] | changes}


GEMMA2 = {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16}
GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 16,
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 16,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 3333.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 222.0},
    },
}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 3333.0, "partial_rotary_factor": 0.25}
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "num_hidden_layers": 6,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 512,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "rope_parameters": {
        "full_attention": PROPORTIONAL,
        "sliding_attention": {"rope_type": "default", "rope_theta": 222.0},
    },
}
QWEN3_5 = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "attention_bias": True,
    **rope(partial_rotary_factor=0.25),
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "attention_bias": True,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
YARN = rope(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=1, mscale_all_dim=1
)
LFM2 = {
    "layer_types": ["conv", "full_attention", "conv"],
    "num_hidden_layers": 3,
    "conv_bias": True,
    "block_auto_adjust_ff_dim": False,
    **TIED,
}
COHERE = {"logit_scale": 1.0, "attention_bias": True} | TIED
MLP = {"experts": "mlp.experts"}
FEW = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

ZOO: dict[str, Zoo] = {
    "llama": Zoo("llama", BIASED),
    "llama-tied": Zoo("llama", BIASED | TIED),
    "mistral": Zoo("mistral", {"sliding_window": 64}),
    "qwen2": Zoo("qwen2"),
    "qwen3": Zoo("qwen3", {"head_dim": 16}),
    "gemma": Zoo("gemma", {"head_dim": 16} | TIED, 3e-3, GELU),
    "gemma2": Zoo("gemma2", GEMMA2 | TIED),
    "gemma3_text": Zoo("gemma3_text", GEMMA3 | TIED),
    "gemma4_text": Zoo("gemma4_text", GEMMA4 | TIED, q_norm=0.3),
    "phi": Zoo("phi", rope(partial_rotary_factor=0.5)),
    "phi3": Zoo("phi3", rope(partial_rotary_factor=1.0)),
    "smollm3": Zoo("smollm3", {"num_hidden_layers": 4} | BIASED),
    "olmo2": Zoo("olmo2", {"attention_bias": True}),
    "granite": Zoo("granite", GRANITE | BIASED),
    "cohere": Zoo("cohere", COHERE | {"use_qk_norm": True}),
    "cohere2": Zoo(
        "cohere2", COHERE | {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 16}
    ),
    "glm4": Zoo("glm4", {"head_dim": 16, **rope(partial_rotary_factor=0.5)}),
    "stablelm": Zoo(
        "stablelm",
        {"use_qkv_bias": True, "qk_layernorm": True, **rope(partial_rotary_factor=0.25)},
    ),
    "lfm2": Zoo("lfm2", LFM2),
    "starcoder2": Zoo("starcoder2", {"use_bias": True}, 3e-3, GELU),
    "qwen3_5_text": Zoo("qwen3_5_text", QWEN3_5),
    "mixtral": Zoo("mixtral", LOCAL, **MLP),
    "phimoe": Zoo("phimoe", {"attention_bias": True, "lm_head_bias": True} | LOCAL, **MLP),
    "qwen3_moe": Zoo(
        "qwen3_moe",
        {"head_dim": 16, "moe_intermediate_size": 48, "norm_topk_prob": True} | FEW,
        **MLP,
    ),
    "olmoe": Zoo("olmoe", {"attention_bias": True} | FEW, **MLP),
    "qwen2_moe": Zoo(
        "qwen2_moe",
        {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80} | FEW,
        **MLP,
    ),
    "deepseek_v2": Zoo("deepseek_v2", DEEPSEEK | YARN | {"max_position_embeddings": 128}, **MLP),
    "deepseek_v3": Zoo("deepseek_v3", DEEPSEEK | {"n_group": 1, "topk_group": 1}, **MLP),
    "granitemoe": Zoo(
        "granitemoe",
        {"attention_bias": True} | LOCAL | GRANITE,
        experts="block_sparse_moe.experts",
    ),
}


def attention(name: str) -> list[str]:
    """The linear layers of a mixture of experts' attention that both frameworks have."""
    if not name.startswith("deepseek"):
        return ["q_proj", "k_proj", "v_proj", "o_proj"]
    both = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
    return [*both, "kv_b_proj"] if name == "deepseek_v2" else both


def saved(name: str, folder: Path) -> Path:
    """The model of ZOO[name], the same at every call, saved by transformers with a tokenizer."""
    zoo = ZOO[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(zoo.model_type, **(COMMON | zoo.changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.ndim > 1:
                value.normal_(0, zoo.std)
            else:
                value.add_(torch.randn_like(value) * 0.1)
            if key.endswith("q_norm.weight"):
                value.mul_(zoo.q_norm)
    model.save_pretrained(folder)
    tiny_tokenizer()._tokenizer.save_pretrained(folder)
    return folder


def torch_model(folder: Path, adapter: Path | None = None, kind: Any = AutoModelForCausalLM) -> Any:
    """transformers' model in float32, with the PEFT adapter; not one key may be missing or left."""
    model, display = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not display[kind], (kind, sorted(display[kind])[:5])
    if adapter is not None:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, str(adapter))
            result = model.load_adapter(str(adapter), "default")
        assert not [w for w in heard if "missing adapter keys" in str(w.message)], heard[-1].message
        assert not result.missing_keys, result.missing_keys[:5]
        assert not result.unexpected_keys, result.unexpected_keys[:5]
    return model.eval()


def torch_logits(
    folder: Path, tokens: np.ndarray = TOKENS, adapter: Path | None = None
) -> np.ndarray:
    with torch.no_grad():
        return torch_model(folder, adapter)(torch.tensor(tokens)).logits.numpy()


def mlx_logits(
    folder: Path, tokens: np.ndarray = TOKENS, adapter: Path | None = None
) -> np.ndarray:
    model = load_model(str(folder), dtype="float32").model
    if adapter is not None:
        load_adapter(model, adapter)
    model.eval()
    return np.array(model(mx.array(tokens)).astype(mx.float32))


def mlx_adapter(
    base: Path, folder: Path, *, num_layers: int = -1, dora: bool = False, **lora: Any
) -> Path:
    """An adapter as mlx-lm saves it, with random weights; lora: changes to its lora_parameters.
    Without keys it is on all linear layers of the blocks, the experts' too."""
    mx.random.seed(7)
    parameters = {"rank": 4, "scale": 2.5, "dropout": 0.0} | lora
    model = load_model(str(base), dtype="float32").model
    model.freeze()
    linear_to_lora_layers(model, num_layers, parameters, use_dora=dora)
    weights = dict(tree_flatten(model.trainable_parameters()))
    assert weights, "no layer of that name"
    for name, value in weights.items():
        noise = mx.random.normal(value.shape)
        if name.endswith(".lora_b"):
            weights[name] = 0.05 * noise
        elif name.endswith(".m"):
            weights[name] = value * (1 + 0.2 * noise)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights, {"format": "mlx"})
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "model": str(base),
        "num_layers": num_layers,
        "lora_parameters": parameters,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
    return folder


def agree(theirs: np.ndarray, ours: np.ndarray, bound: float) -> None:
    """Logits to the bound, and the same best token wherever that is no matter of rounding."""
    largest = np.abs(theirs - ours).max()
    print(f"{largest:.1e} of {bound:.1e}", end=" ")
    assert largest <= bound
    top = np.sort(theirs, axis=-1)[..., -2:]
    clear = top[..., 1] - top[..., 0] > 2 * bound
    assert clear.mean() > 0.8
    assert (theirs.argmax(-1) == ours.argmax(-1))[clear].all()
