"""What transformers 5 writes into a config.json under other names than mlx-lm reads.

mlx-lm 0.32.2 fails on such a model, or silently takes a default: the rotary base above all (see
`rope`). Every model of this package is loaded with these repairs; tests/parity compares logits.
"""

from typing import Any

from .rope import repaired_rope

# Model types that mlx-lm reads as another: text-only checkpoints of models that it wraps.
READ_AS = {"qwen3_5_text": "qwen3_5"}
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
    if kind == "gemma4_text" and "global_head_dim" not in config:
        changes |= global_head_dim(config)
    return changes


def global_head_dim(config: dict[str, Any]) -> dict[str, Any]:
    """Gemma 4's width of a head in full attention, which transformers 5 writes layer by layer."""
    layers = config.get("per_layer_config")
    if not isinstance(layers, dict):
        return {}
    widths = {layer.get("head_dim") for layer in layers.values() if isinstance(layer, dict)}
    return {"global_head_dim": widths.pop()} if len(widths) == 1 and None not in widths else {}
