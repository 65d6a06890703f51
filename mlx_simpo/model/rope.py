"""Rotary settings of checkpoints saved by transformers 5, where mlx-lm finds them.

transformers 5 writes ``rope_theta`` and the scaling under ``rope_parameters`` only; most of
mlx-lm's model files (0.32.2) read them at the top level and silently take a default base instead.
The generated text still looks right, the log-probabilities are not. tests/parity compares logits.
"""

from typing import Any


def repaired_rope(config: dict[str, Any]) -> dict[str, Any]:
    """What to change in a config.json's content so that mlx-lm reads its rotary settings.

    Returns:
        New top-level entries (and a new ``text_config`` where the model is wrapped in one); empty
        where nothing is missing. Entries that are there already are left alone.
    """
    changes: dict[str, Any] = {}
    parameters = config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        # One group per kind of layer (Gemma 3 and others).
        local = parameters.get("sliding_attention") or {}
        if "rope_theta" in local:
            changes["rope_local_base_freq"] = local["rope_theta"]
        parameters = parameters.get("full_attention") or {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in parameters:
            changes[name] = parameters[name]
    # mlx-lm reads a proportional one (Gemma 4) where transformers writes it, and nowhere else.
    if parameters.get("rope_type", "default") not in ("default", "proportional"):
        scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
        # phi3 reads the older name only.
        changes["rope_scaling"] = {"type": scaling["rope_type"], **scaling}
    changes = {name: v for name, v in changes.items() if config.get(name) is None}
    text = config.get("text_config")
    if isinstance(text, dict) and (inner := repaired_rope(text)):
        changes["text_config"] = {**text, **inner}
    return changes


def both_ways(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json's content with its rotary settings for transformers 4 and mlx-lm and for
    transformers 5.

    Groups by kind of layer (Gemma 3) are left to transformers 5's own reading of the older names.
    """
    changes = repaired_rope(config)
    if "rope_local_base_freq" in changes or "rope_local_base_freq" in config:
        # One rope_scaling cannot speak for several groups, and transformers 5 takes it for all.
        changes.pop("rope_scaling", None)
        return {**config, **changes}
    config = {**config, **changes}
    scaling = config.get("rope_scaling") or {}
    if "rope_parameters" in config or "rope_theta" not in config or not isinstance(scaling, dict):
        return config
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    parameters = {**scaling, "rope_type": kind, "rope_theta": config["rope_theta"]}
    parameters.pop("type", None)
    if "partial_rotary_factor" in config:
        parameters["partial_rotary_factor"] = config["partial_rotary_factor"]
    return {**config, "rope_parameters": parameters}


def contradiction(config: dict[str, Any]) -> str | None:
    """The name of a rotary setting that a config.json's two spellings give different values."""
    names = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
    newer = repaired_rope({name: v for name, v in config.items() if name not in names})
    return next((n for n in names if n in newer and config.get(n, newer[n]) != newer[n]), None)
