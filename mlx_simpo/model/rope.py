"""Rotary settings of checkpoints saved by transformers 5, under the names that mlx-lm reads.

transformers 5 writes ``rope_theta`` and the scaling under ``rope_parameters`` only; most of
mlx-lm's model files (0.32.2) read them at the top level only and silently use a default base. The
generated text still looks right, but the log-probabilities are wrong. tests/parity compares logits.
"""

from typing import Any


def rope_repairs(config: dict[str, Any]) -> dict[str, Any]:
    """Return the changes to a config.json's content with which mlx-lm reads its rotary settings.

    Returns:
        New top-level entries, among them ``text_config`` if the text model's settings are in one;
        empty if nothing is missing. Entries that are there already are left alone.
    """
    changes: dict[str, Any] = {}
    parameters = config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        # One group per type of layer (Gemma 3 and others).
        local = parameters.get("sliding_attention") or {}
        if "rope_theta" in local:
            changes["rope_local_base_freq"] = local["rope_theta"]
        parameters = parameters.get("full_attention") or {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in parameters:
            changes[name] = parameters[name]
    # mlx-lm reads the type "proportional" (Gemma 4) where transformers writes it, and only there.
    if parameters.get("rope_type", "default") not in ("default", "proportional"):
        scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
        # mlx-lm's phi3 reads "type", the older name, only.
        changes["rope_scaling"] = {"type": scaling["rope_type"], **scaling}
    changes = {name: v for name, v in changes.items() if config.get(name) is None}
    text = config.get("text_config")
    if isinstance(text, dict) and (inner := rope_repairs(text)):
        changes["text_config"] = {**text, **inner}
    return changes


def with_both_rope_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json's content whose rotary settings transformers 4, 5 and mlx-lm read alike.

    Where they differ per type of layer (Gemma 3), no rope_parameters are added: transformers 5
    reads the older names itself.
    """
    changes = rope_repairs(config)
    if "rope_local_base_freq" in changes or "rope_local_base_freq" in config:
        # A rope_scaling is of one group only, and transformers 5 would apply it to all.
        changes.pop("rope_scaling", None)
        return {**config, **changes}
    config = {**config, **changes}
    scaling = config.get("rope_scaling") or {}
    if "rope_parameters" in config or "rope_theta" not in config or not isinstance(scaling, dict):
        return config
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    parameters = {**scaling, "rope_type": rope_type, "rope_theta": config["rope_theta"]}
    parameters.pop("type", None)
    if "partial_rotary_factor" in config:
        parameters["partial_rotary_factor"] = config["partial_rotary_factor"]
    return {**config, "rope_parameters": parameters}


def conflicting_rope_setting(config: dict[str, Any]) -> str | None:
    """Return the name of a rotary setting whose two spellings have different values, or None."""
    names = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
    newer = rope_repairs({name: v for name, v in config.items() if name not in names})
    return next((n for n in names if n in newer and config.get(n, newer[n]) != newer[n]), None)
