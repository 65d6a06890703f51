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
    if parameters.get("rope_type", "default") != "default":
        changes["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    changes = {name: v for name, v in changes.items() if config.get(name) is None}
    text = config.get("text_config")
    if isinstance(text, dict) and (inner := repaired_rope(text)):
        changes["text_config"] = {**text, **inner}
    return changes
