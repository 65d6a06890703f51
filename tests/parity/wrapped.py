"""Tiny random models that see, as transformers saves them: mlx-lm runs the text part alone.

Their text parts are those of the zoo; every vision tower is there and stays as it is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import torch
from helpers.tiny import tiny_tokenizer
from parity import zoo
from parity.zoo import COMMON, FEW, GEMMA3, GEMMA4, QWEN3_5, TIED, TOKENS, rope
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText


class Wrapped(NamedTuple):
    """text, vision, top: changes to the three levels of the configuration. spellings: how else the
    checkpoints of this type name their tensors. q_norm: as in the zoo. text_class: transformers'
    class for text alone makes another model of it, with other paths. experts: as in the zoo. same:
    what rounding weights in float32 moves the logits by in one framework, at most (qwen3_5_moe: up
    to 2.6e-4 by random changes of 6e-8).
    """

    model_type: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    top: Mapping[str, Any] = zoo.NOTHING
    spellings: tuple[str, ...] = ("saved",)
    q_norm: float = 1.0
    text_class: bool = False
    experts: str = ""
    same: float = 1e-4


SMALL = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
TOWER = SMALL | {"num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "image_size": 28}
PIXTRAL = TOWER | {"model_type": "pixtral", "image_size": 28, "head_dim": 16}
GEMMA4_VISION = TOWER | {
    "model_type": "gemma4_vision",
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "position_embedding_size": 64,
}
GEMMA4_MOE = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
QWEN_VISION = SMALL | {
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
YARN = rope(
    rope_type="yarn",
    factor=8.0,
    original_max_position_embeddings=32,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
)
MISTRAL = {"head_dim": 16, "sliding_window": None}
MOE = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80} | FEW
SEEN = {"image_token_id": 511, "video_token_id": 510}
MARKS = {"boi_token_id": 509, "eoi_token_id": 508, "audio_token_id": 507, "boa_token_id": 506}

MODELS: dict[str, Wrapped] = {
    "gemma3": Wrapped(
        "gemma3",
        GEMMA3 | TIED | {"model_type": "gemma3_text"},
        SIGLIP,
        {"mm_tokens_per_image": 4, "image_token_index": 511},
    ),
    "gemma4": Wrapped(
        "gemma4",
        GEMMA4 | TIED | {"model_type": "gemma4_text"},
        GEMMA4_VISION,
        {"audio_config": None, "eoa_token_index": 505} | SEEN | MARKS,
        q_norm=0.3,
    ),
    "gemma4-moe": Wrapped(
        "gemma4",
        GEMMA4 | GEMMA4_MOE | TIED | {"model_type": "gemma4_text"},
        GEMMA4_VISION,
        {"audio_config": None, "eoa_token_index": 505} | SEEN | MARKS,
        q_norm=0.3,
        experts="experts",
    ),
    "mistral3": Wrapped(
        "mistral3",
        MISTRAL | {"model_type": "mistral"},
        PIXTRAL,
        {"image_token_index": 511},
        ("saved", "live"),
    ),
    "mistral3-ministral3": Wrapped(
        "mistral3",
        MISTRAL | YARN | {"model_type": "ministral3"},
        PIXTRAL,
        {"image_token_index": 511},
        ("saved", "live"),
    ),
    "qwen3_5": Wrapped(
        "qwen3_5",
        QWEN3_5 | {"model_type": "qwen3_5_text"},
        QWEN_VISION | {"model_type": "qwen3_5_vision"},
        SEEN,
        ("saved", "mtp"),
        text_class=True,
    ),
    "qwen3_5_moe": Wrapped(
        "qwen3_5_moe",
        QWEN3_5 | MOE | {"model_type": "qwen3_5_moe_text"},
        QWEN_VISION | {"model_type": "qwen3_5_moe_vision"},
        SEEN,
        ("saved", "mtp"),
        text_class=True,
        experts="mlp.experts",
        same=5e-4,
    ),
}
CASES = [(name, spelling) for name in MODELS for spelling in MODELS[name].spellings]
COMPANIONS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def saved(name: str, folder: Path, spelling: str = "saved") -> Path:
    """The model of MODELS[name], the same at every call, with a tokenizer and files for images.

    Args:
        spelling: "saved" as transformers names it (experts as the Hub has them), "live" as its
            modules are called, "mtp" with the tensors that the Hub has beside the model's.
    """
    wrapped = MODELS[name]
    torch.manual_seed(0)
    text = COMMON | wrapped.text
    config = AutoConfig.for_model(
        wrapped.model_type,
        text_config=text,
        vision_config=dict(wrapped.vision),
        tie_word_embeddings=text["tie_word_embeddings"],
        **wrapped.top,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.ndim > 1:
                value.normal_(0, 0.15)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.1)
            if key.endswith("q_norm.weight"):
                value.mul_(wrapped.q_norm)
    model.save_pretrained(folder)
    tiny_tokenizer()._tokenizer.save_pretrained(folder)
    for number, file in enumerate(COMPANIONS):
        (folder / file).write_text(f'{{"a": {number}}}\n', encoding="utf-8")
    if wrapped.model_type == "qwen3_5_moe":
        rewritten(folder, with_fused_experts)
    if spelling != "saved":
        rewritten(folder, {"live": with_live_names, "mtp": with_mtp}[spelling])
    return folder


Weights = dict[str, mx.array]


def rewritten(
    folder: Path, change: Callable[[Weights], Weights], file: str = "model.safetensors"
) -> None:
    weights = {key: mx.array(value) for key, value in mx.load(str(folder / file)).items()}  # type: ignore
    mx.eval(weights)
    (folder / file).unlink()
    mx.save_safetensors(str(folder / file), change(weights), {"format": "pt"})


def with_live_names(weights: Weights) -> Weights:
    """model.language_model. instead of language_model.model., as transformers 5 calls its modules
    and has saved some of these models."""

    def live(key: str) -> str:
        inner = key.removeprefix("language_model.")
        if inner == key:
            return f"model.{key}"
        rest = inner.removeprefix("model.")
        return inner if rest == inner else f"model.language_model.{rest}"

    return {live(key): value for key, value in weights.items()}


def with_mtp(weights: Weights) -> Weights:
    """The layer that predicts a token more, which neither library runs."""
    extra = {name: mx.random.normal((64,)) for name in ("mtp.norm.weight", "mtp.fc.weight")}
    return weights | extra


def with_fused_experts(weights: Weights) -> Weights:
    """As the Hub has Qwen3.5's experts; transformers 5 saves a new model's one by one, which
    mlx-lm does not read."""
    fused = {key: value for key, value in weights.items() if ".experts." not in key}
    blocks = {key.partition(".experts.")[0] for key in weights if ".experts." in key}
    for block in blocks:
        gate, up, down = (
            mx.stack([weights[f"{block}.experts.{n}.{name}_proj.weight"] for n in range(4)])
            for name in ("gate", "up", "down")
        )
        fused[f"{block}.experts.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        fused[f"{block}.experts.down_proj"] = down
    return fused


def torch_model(folder: Path, adapter: Path | None = None, *, alone: bool = False) -> Any:
    """The zoo's, of the whole model; alone: of what transformers' class for text makes of it."""
    kind = AutoModelForCausalLM if alone else AutoModelForImageTextToText
    return zoo.torch_model(folder, adapter, kind)


def torch_logits(folder: Path, adapter: Path | None = None, *, alone: bool = False) -> np.ndarray:
    with torch.no_grad():
        return torch_model(folder, adapter, alone=alone)(torch.tensor(TOKENS)).logits.numpy()
