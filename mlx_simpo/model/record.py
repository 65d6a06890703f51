"""What an adapter was trained on: written beside it, and compared when it is loaded."""

import hashlib
from pathlib import Path
from typing import Any

from ..config.simpo_config import SimPOConfig
from ..version import __version__
from .loading import LoadedModel

RECORD = "mlx_simpo"  # the key in mlx-lm's adapter_config.json, whose readers leave it alone
RECORD_FILE = "mlx_simpo.json"  # beside what was converted


def training_record(
    loaded: LoadedModel, config: SimPOConfig, template: str | None
) -> dict[str, Any]:
    """The record of a run.

    Args:
        template: the chat template's text, None where there was none.
    """
    return {
        "version": __version__,
        "base": base_record(loaded),
        "template_sha256": template_hash(template),
        "config": config.as_dict(),
    }


def base_record(loaded: LoadedModel) -> dict[str, Any]:
    """What is to be known of a base model: name, commit of the Hub, quantization."""
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        "quantization": loaded.config.get("quantization"),
    }


def template_hash(template: str | None) -> str | None:
    """SHA-256 of a chat template's text."""
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def table(content: Any, name: str) -> dict[str, Any]:
    """The table of this name in another; empty if there is none."""
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def mismatches(
    record: dict[str, Any], loaded: LoadedModel, template: str | None = None
) -> list[str]:
    """How a model differs from the one an adapter was trained on; empty if in nothing known.

    Args:
        record: `training_record`'s; what it does not say is not compared.
        template: the chat template's text in use now; None leaves it out of the comparison.
    """
    base = table(record, "base")
    here = base_record(loaded)
    found = []
    for name in ("model", "revision", "quantization"):
        then, now = base.get(name), here[name]
        unknown = name not in base or (name == "revision" and None in (then, now))
        # A model may have been copied to another folder.
        moved = name == "model" and Path(str(then)).name == Path(str(now)).name
        if then != now and not unknown and not moved:
            found.append(f"{name} was {shown(then)} in training and is {shown(now)} now")
    trained = record.get("template_sha256")
    if template is not None and trained is not None and trained != template_hash(template):
        found.append("the chat template is another than in training")
    return found


def shown(value: Any) -> str:
    """A value of the record as one reads it."""
    if isinstance(value, dict):
        bits, mode = value.get("bits"), value.get("mode", "affine")
        return f"{bits}-bit {mode}, groups of {value.get('group_size')}"
    return "none" if value is None else str(value)[:120]
