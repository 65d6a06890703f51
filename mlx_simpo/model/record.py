"""The record of a training in its adapter, and how a model differs from the one it names."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.simpo_config import SimPOConfig
from ..errors import SimPOError
from ..files import weight_files
from ..version import __version__
from .loading import LoadedModel

RECORD_KEY = "mlx_simpo"  # in mlx-lm's adapter_config.json, where other readers ignore it
# Of each weights file; see `content_hash`.
SAMPLES, SAMPLE_BYTES = 256, 4096
RECORD_FILE = "mlx_simpo.json"  # beside an adapter or model that was converted


def training_record(
    loaded: LoadedModel, config: SimPOConfig, template: str | None
) -> dict[str, Any]:
    """Return the record of a run: version, base model, chat template and settings.

    Args:
        template: the chat template's text; None if the tokenizer has none.
    """
    return {
        "version": __version__,
        "base": base_record(loaded),
        "template_sha256": template_hash(template),
        "config": config.as_dict(),
    }


def base_record(loaded: LoadedModel) -> dict[str, Any]:
    """Return what identifies a base model: name, commit on the Hub, quantization."""
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        "quantization": loaded.config.get("quantization"),
    }


def content_hash(folder: Path) -> str:
    """Return a SHA-256 of a model's config.json and weights.

    Of the weights it covers each file's size and header and SAMPLES pieces of its data: any other
    training or quantization changes nearly all of them, and gigabytes need not be read.

    Raises:
        SimPOError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        digest.update((folder / "config.json").read_bytes())
        for path in weight_files(folder):
            size = path.stat().st_size
            digest.update(b"%d " % size)
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                digest.update(file.read(header))
                for part in range(SAMPLES):
                    file.seek(8 + header + part * (size - 8 - header) // SAMPLES)
                    digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise SimPOError(f"the model in {folder} cannot be read: {error}") from None
    return digest.hexdigest()


def template_hash(template: str | None) -> str | None:
    """Return the SHA-256 of a chat template's text."""
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def get_dict(content: Any, key: str) -> dict[str, Any]:
    """Return ``content[key]`` if both are dicts, else an empty dict.

    Adapters come from elsewhere, so that any part of a record may have any type.
    """
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, dict) else {}


def differences_from_training(
    record: dict[str, Any],
    loaded: LoadedModel,
    template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> list[str]:
    """Describe how a model differs from the one that an adapter was trained on.

    Args:
        record: as `training_record` returns it; what it does not name is not compared.
        template: the text of the chat template in use; None: templates are not compared.
        template_args: its arguments; None: they are not compared.

    Returns:
        One clause per known difference.
    """
    trained_base = get_dict(record, "base")
    current_base = base_record(loaded)
    differences = []
    for name in ("model", "revision", "quantization"):
        then, now = trained_base.get(name), current_base[name]
        is_unknown = name not in trained_base or (name == "revision" and None in (then, now))
        # The same model may have been copied to another folder.
        has_moved = name == "model" and Path(str(then)).name == Path(str(now)).name
        if then != now and not is_unknown and not has_moved:
            differences.append(
                f"{name} was {describe(then)} in training and is {describe(now)} now"
            )
    trained_hash = record.get("template_sha256")
    if (
        template is not None
        and trained_hash is not None
        and trained_hash != template_hash(template)
    ):
        differences.append("the chat template differs from the one in training")
    trained_data = get_dict(get_dict(record, "config"), "data")
    if template_args is not None and "template_args" in trained_data:
        # As JSON, in which records are saved.
        then, now = (
            json.dumps(arguments or {}, sort_keys=True, default=str)
            for arguments in (trained_data["template_args"], template_args)
        )
        if then != now:
            differences.append(f"data.template_args was {then} in training and is {now} now")
    return differences


def describe(value: Any) -> str:
    """Return a value of the base model's record in words."""
    if isinstance(value, dict):
        bits, mode = value.get("bits"), value.get("mode", "affine")
        return f"{bits}-bit {mode}, groups of {value.get('group_size')}"
    return "none" if value is None else str(value)[:120]
