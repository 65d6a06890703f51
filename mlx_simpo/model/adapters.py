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

from ..errors import SimPOError, one_line
from ..files import load_safetensors, read_header, read_json, save_safetensors
from ..paths import local_path

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"  # PEFT's; the configuration has the same name
MAX_RANK = 65_536
MAX_SCALE = 1e6


def flat_arrays(tree: Any) -> dict[str, mx.array]:
    """The arrays of a parameter tree under their dotted paths."""
    return tree_flatten(tree, destination={})  # type: ignore[return-value]


def save_adapter(folder: str | Path, model: nn.Module, config: dict[str, Any]) -> Path:
    """Write the trainable weights of a model and their adapter_config.json; see `write_adapter`."""
    return write_adapter(folder, flat_arrays(model.trainable_parameters()), config)


def write_adapter(folder: str | Path, weights: dict[str, mx.array], config: dict[str, Any]) -> Path:
    """Write an adapter's weights and its adapter_config.json; ``mlx_lm.generate --adapter-path``
    takes the folder as it is.

    Each file is written under another name and then moved into place, so that a reader never meets
    half a file. Returns the folder.

    Raises:
        SimPOError: the folder cannot be written.
    """
    folder = local_path(folder)
    text = json.dumps(config, indent=4, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            written = Path(scratch)
            save_safetensors(written / WEIGHTS, weights, "mlx")
            (written / CONFIG).write_text(text, encoding="utf-8")
            for name in (WEIGHTS, CONFIG):
                os.replace(written / name, folder / name)
    except (OSError, ValueError) as error:
        raise SimPOError(f"the adapter cannot be written to {folder}: {error}") from None
    return folder


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The adapter_config.json of an mlx-lm adapter.

    Raises:
        SimPOError: no such folder or file, or an adapter of another library.
    """
    try:
        config = read_json(local_path(folder) / CONFIG)
    except SimPOError as error:
        raise SimPOError(f"{folder} is no adapter folder: {error}") from None
    if "peft_type" in config:
        raise SimPOError(
            f"{folder} holds a PEFT adapter; convert it first: mlx-simpo convert from-peft"
        )
    if config.get("fine_tune_type", "lora") not in ("lora", "dora"):
        raise SimPOError(
            f"{folder} has fine_tune_type {str(config['fine_tune_type'])[:40]!r}; it must be lora "
            "or dora"
        )
    check_parameters(config, f"{folder}/{CONFIG}")
    return config


def check_parameters(config: dict[str, Any], where: str) -> None:
    """SimPOError if what mlx-lm builds layers from is missing or impossible."""
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise SimPOError(f"{where} has no lora_parameters; is it an mlx-lm LoRA adapter?")
    rank, scale, keys = (parameters.get(name) for name in ("rank", "scale", "keys"))
    layers = config.get("num_layers")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise SimPOError(f"{where}: rank is {str(rank)[:40]}; it must be 1 to {MAX_RANK}")
    if not reasonable(scale):
        raise SimPOError(
            f"{where}: scale is {str(scale)[:40]}; it must be a finite number of at most "
            f"{MAX_SCALE:g}"
        )
    if type(layers) is not int:
        raise SimPOError(f"{where}: num_layers is {str(layers)[:40]}; it must be a whole number")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(k, str) for k in keys)):
        raise SimPOError(f"{where}: keys must be a list of names, not {str(keys)[:40]}")


def reasonable(value: Any) -> bool:
    """Whether a value can be the scale of an update, or lora_alpha."""
    return type(value) in (int, float) and -MAX_SCALE <= value <= MAX_SCALE


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
    read_header(local_path(folder) / WEIGHTS)
    model.freeze()
    try:
        load_adapters(model, str(local_path(folder)))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError) as error:
        raise SimPOError(
            f"the adapter in {folder} does not fit this model: {one_line(error, 300)}"
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
    weights = load_safetensors([path])
    wanted = {name: p.shape for name, p in flat_arrays(model.trainable_parameters()).items()}
    missing = sorted(wanted.keys() - weights.keys())
    unknown = sorted(weights.keys() - wanted.keys())
    whole = sorted(n for n, w in weights.items() if not mx.issubdtype(w.dtype, mx.floating))
    misshapen = [n for n in wanted.keys() & weights.keys() if weights[n].shape != wanted[n]]
    problems = [
        f"{len(names)} {what}, e.g. {names[0]}"
        for what, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("misshapen", misshapen),
            ("not of floats", whole),
        )
        if names
    ]
    if problems:
        raise SimPOError(f"{path} is not a whole adapter of this model: {'; '.join(problems)}")
    return weights
