"""What transformers 5 writes into a config.json under other names than mlx-lm reads.

mlx-lm 0.32.2 fails on such a model, or silently takes a default: the rotary base above all (see
`rope`). Every model of this package is loaded with these repairs; tests/parity compares logits.
"""

from typing import Any

from .rope import repaired_rope

# Model types that mlx-lm reads as another: text-only checkpoints of models that it wraps.
READ_AS = {"qwen3_5_text": "qwen3_5"}
# Model types whose text_config mlx-lm does not read whole.
TEXT_CONFIG = ("gemma3", "gemma4")
# By model type: mlx-lm's name and the one that transformers 5 writes the same value under.
RENAMED = {
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "lfm2": ("block_dim", "hidden_size"),
}


def repaired(config: dict[str, Any]) -> dict[str, Any]:
    """What to change in a config.json's content so that mlx-lm reads the model it describes.

    Returns:
        New top-level entries; empty where nothing is missing.
    """
    changes = repaired_rope(config)
    kind = str(config.get("model_type"))
    if kind in READ_AS:
        changes["model_type"] = READ_AS[kind]
    if kind in RENAMED:
        name, written = RENAMED[kind]
        if config.get(name) is None and config.get(written) is not None:
            changes[name] = config[written]
    if kind == "gemma4_text":
        changes |= {k: v for k, v in full_attention(config).items() if config.get(k) is None}
    if kind in TEXT_CONFIG:
        text = changes.get("text_config") or config.get("text_config")
        if isinstance(text, dict):
            changes |= repaired_text(config, text)
    return changes


def repaired_text(config: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """The same for a wrapped Gemma: mlx-lm takes the vocabulary's size from outside text_config,
    where transformers does not write it, or else its own default."""
    changes: dict[str, Any] = {}
    if "vocab_size" not in config and "vocab_size" in text:
        changes["vocab_size"] = text["vocab_size"]
    if missing := {k: v for k, v in full_attention(text).items() if text.get(k) is None}:
        changes["text_config"] = {**text, **missing}
    return changes


def full_attention(config: dict[str, Any]) -> dict[str, Any]:
    """Gemma 4's width and number of heads in full attention, which transformers 5 writes layer by
    layer."""
    layers = config.get("per_layer_config")
    if not isinstance(layers, dict):
        return {}
    found = {}
    for name, written in (
        ("global_head_dim", "head_dim"),
        ("num_global_key_value_heads", "num_key_value_heads"),
    ):
        values = {layer.get(written) for layer in layers.values() if isinstance(layer, dict)}
        if len(values) == 1 and None not in values:
            found[name] = values.pop()
    return found
