"""Settings that transformers 5 writes into a config.json under other names than mlx-lm reads.

mlx-lm 0.32.2 fails on such a model, or silently uses a default, above all for the rotary base (see
`rope`). This package loads every model with these repairs; tests/parity compares logits.
"""

from typing import Any

from .rope import rope_repairs

# Model types that mlx-lm knows by another name: text-only checkpoints of models that it wraps.
READ_AS = {"qwen3_5_text": "qwen3_5"}
# Model types of whose text_config mlx-lm does not read all settings.
TEXT_CONFIG = ("gemma3", "gemma4")
# By model type: a setting's name in mlx-lm and in transformers 5.
RENAMED = {
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "lfm2": ("block_dim", "hidden_size"),
}


def config_repairs(config: dict[str, Any]) -> dict[str, Any]:
    """Return the changes to a config.json's content with which mlx-lm reads the model it describes.

    Returns:
        New top-level entries; empty if nothing is missing.
    """
    changes = rope_repairs(config)
    model_type = str(config.get("model_type"))
    if model_type in READ_AS:
        changes["model_type"] = READ_AS[model_type]
    if model_type in RENAMED:
        name, new_name = RENAMED[model_type]
        if config.get(name) is None and config.get(new_name) is not None:
            changes[name] = config[new_name]
    if model_type == "gemma4_text":
        changes |= {k: v for k, v in full_attention(config).items() if config.get(k) is None}
    if model_type in TEXT_CONFIG:
        text = changes.get("text_config") or config.get("text_config")
        if isinstance(text, dict):
            changes |= text_repairs(config, text)
    return changes


def text_repairs(config: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Return the changes for a Gemma whose text model is wrapped.

    mlx-lm reads the vocabulary's size outside text_config, where transformers does not write it,
    and falls back on a default.

    Args:
        text: the text_config, with the repairs made so far.
    """
    changes: dict[str, Any] = {}
    if "vocab_size" not in config and "vocab_size" in text:
        changes["vocab_size"] = text["vocab_size"]
    if missing := {k: v for k, v in full_attention(text).items() if text.get(k) is None}:
        changes["text_config"] = {**text, **missing}
    return changes


def full_attention(config: dict[str, Any]) -> dict[str, Any]:
    """Return the head dimension and number of key-value heads of Gemma 4's full-attention layers.

    transformers 5 writes them per layer, mlx-lm reads one value for all.
    """
    layers = config.get("per_layer_config")
    if not isinstance(layers, dict):
        return {}
    values = {}
    for name, per_layer_name in (
        ("global_head_dim", "head_dim"),
        ("num_global_key_value_heads", "num_key_value_heads"),
    ):
        distinct = {v.get(per_layer_name) for v in layers.values() if isinstance(v, dict)}
        if len(distinct) == 1 and None not in distinct:
            values[name] = distinct.pop()
    return values
