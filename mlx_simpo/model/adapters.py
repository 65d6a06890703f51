"""Adapter folders in mlx-lm's format: adapters.safetensors and adapter_config.json."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from ..errors import SimPOError
from ..paths import local_path

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def flat_arrays(tree: Any) -> dict[str, mx.array]:
    """The arrays of a parameter tree under their dotted paths."""
    return tree_flatten(tree, destination={})  # type: ignore[return-value]


def save_adapter(folder: str | Path, model: nn.Module, config: dict[str, Any]) -> Path:
    """Write the trainable weights and their adapter_config.json; ``mlx_lm.generate --adapter-path``
    takes the folder as it is.

    Each file is written under another name and then moved into place, so that a reader never meets
    half a file. Returns the folder.

    Raises:
        SimPOError: the folder cannot be written.
    """
    folder = local_path(folder)
    weights = flat_arrays(model.trainable_parameters())
    text = json.dumps(config, indent=4, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            written = Path(scratch)
            mx.save_safetensors(str(written / WEIGHTS), weights, {"format": "mlx"})
            (written / CONFIG).write_text(text, encoding="utf-8")
            for name in (WEIGHTS, CONFIG):
                os.replace(written / name, folder / name)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: of mx.save_safetensors
        raise SimPOError(f"the adapter cannot be written to {folder}: {error}") from None
    return folder


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The adapter_config.json of an mlx-lm adapter.

    Raises:
        SimPOError: no such folder or file, or an adapter of another library.
    """
    path = local_path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SimPOError(f"{folder} is no adapter folder: cannot read {CONFIG}: {error}") from None
    if not isinstance(config, dict):
        raise SimPOError(f"{folder}/{CONFIG} is no adapter's configuration: {str(config)[:40]}")
    if "peft_type" in config:
        raise SimPOError(f"{folder} holds a PEFT adapter; an mlx-lm adapter is wanted")
    if not isinstance(config.get("lora_parameters"), dict):
        raise SimPOError(f"{folder}/{CONFIG} has no lora_parameters; is it an mlx-lm LoRA adapter?")
    return config


def load_adapter(model: nn.Module, folder: str | Path) -> dict[str, Any]:
    """Attach the adapter in ``folder`` to a model without one, ready for evaluation.

    mlx-lm accepts a file that lacks some of the adapter's weights and leaves those at their random
    start; here that is an error.

    Returns:
        The adapter's configuration.

    Raises:
        SimPOError: unreadable, of another model, or incomplete.
    """
    config = read_adapter_config(folder)
    model.freeze()
    try:
        load_adapters(model, str(local_path(folder)))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError) as error:
        raise SimPOError(
            f"the adapter in {folder} does not fit this model: {' '.join(str(error).split())[:300]}"
        ) from None
    check_complete(model, folder)
    model.eval()
    return config


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load only the weights of ``folder`` into a model whose LoRA layers are attached already.

    Raises:
        SimPOError: they are not exactly the weights that the model's layers have.
    """
    weights = check_complete(model, folder)
    model.load_weights(list(weights.items()), strict=False)


def check_complete(model: nn.Module, folder: str | Path) -> dict[str, mx.array]:
    """The file's weights, if names and shapes are the model's trainable ones; SimPOError if not."""
    path = local_path(folder) / WEIGHTS
    try:
        weights = mx.load(str(path))
    except (OSError, RuntimeError) as error:
        raise SimPOError(f"cannot read {path}: {error}") from None
    assert isinstance(weights, dict)
    wanted = {name: p.shape for name, p in flat_arrays(model.trainable_parameters()).items()}
    missing = sorted(wanted.keys() - weights.keys())
    unknown = sorted(weights.keys() - wanted.keys())
    misshapen = [n for n in wanted.keys() & weights.keys() if weights[n].shape != wanted[n]]
    problems = [
        f"{len(names)} {what}, e.g. {names[0]}"
        for what, names in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise SimPOError(f"{path} is not a whole adapter of this model: {'; '.join(problems)}")
    return weights
