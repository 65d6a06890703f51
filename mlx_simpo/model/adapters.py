"""Adapter folders in mlx-lm's format: adapters.safetensors and adapter_config.json."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from ..errors import SimPOError, one_line
from ..files import load_safetensors, read_header, read_json, save_safetensors, sync
from ..paths import local_path

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
SCRATCH = ".saving-"  # begins the name of the folder in which an adapter is written
PEFT_WEIGHTS = "adapter_model.safetensors"  # PEFT's; the configuration has the same name
MAX_RANK = 65_536
MAX_SCALE = 1e6
_LINEAR = (nn.Linear, nn.QuantizedLinear)


def flat_arrays(tree: Any) -> dict[str, mx.array]:
    """Return the arrays of a parameter tree by their dotted paths."""
    return tree_flatten(tree, destination={})  # type: ignore[return-value]


def save_adapter(
    folder: str | Path,
    model: nn.Module,
    config: dict[str, Any],
    texts: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write the trainable weights of a model and their adapter_config.json with `write_adapter`."""
    return write_adapter(folder, flat_arrays(model.trainable_parameters()), config, texts)


def write_adapter(
    folder: str | Path,
    weights: dict[str, mx.array],
    config: dict[str, Any],
    texts: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write an adapter's weights and its adapter_config.json in mlx-lm's format.

    ``mlx_lm.generate --adapter-path`` loads the folder. Each file is written under another name,
    and when all of them are on the disk they are moved into place: a reader never sees half a file,
    and if the disk is full, the adapter that was there stays as it was.

    Args:
        texts: content of further files by name.

    Returns:
        The folder.

    Raises:
        SimPOError: the folder cannot be written.
    """
    folder = local_path(folder)
    texts = {CONFIG: json.dumps(config, indent=4, sort_keys=True) + "\n", **texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as name:
            scratch = Path(name)
            save_safetensors(scratch / WEIGHTS, weights, "mlx")
            for name, text in texts.items():
                # Escaped where it is not Unicode, as `files.write_text` does.
                (scratch / name).write_bytes(text.encode("utf-8", "backslashreplace"))
            for name in (WEIGHTS, *texts):
                sync(scratch / name)
            for name in (WEIGHTS, *texts):
                os.replace(scratch / name, folder / name)
        sync(folder)
    except (OSError, ValueError) as error:
        raise SimPOError(f"the adapter cannot be written to {folder}: {error}") from None
    return folder


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Read the adapter_config.json of an mlx-lm adapter.

    Raises:
        SimPOError: there is no such file, it belongs to another library, or its settings are
            missing or out of range.
    """
    try:
        config = read_json(local_path(folder) / CONFIG)
    except SimPOError as error:
        raise SimPOError(f"{folder} is not the folder of an adapter: {error}") from None
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
    """Check the settings that mlx-lm builds LoRA layers from.

    Args:
        where: names the file in messages.

    Raises:
        SimPOError: a setting is missing, or of another type or out of range.
    """
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise SimPOError(f"{where} has no lora_parameters; is it an mlx-lm LoRA adapter?")
    rank, scale, keys = (parameters.get(name) for name in ("rank", "scale", "keys"))
    layers = config.get("num_layers")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise SimPOError(f"{where}: rank is {str(rank)[:40]}; it must be 1 to {MAX_RANK}")
    if not is_valid_scale(scale):
        raise SimPOError(
            f"{where}: scale is {str(scale)[:40]}; it must be a finite number of at most "
            f"{MAX_SCALE:g}"
        )
    if type(layers) is not int:
        raise SimPOError(f"{where}: num_layers is {str(layers)[:40]}; it must be a whole number")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(k, str) for k in keys)):
        raise SimPOError(f"{where}: keys must be a list of names, not {str(keys)[:40]}")


def is_valid_scale(value: Any) -> bool:
    """Return whether a value can be the scale of a LoRA delta, or lora_alpha."""
    # A comparison with NaN is false, and JSON's whole numbers may be too large for a float.
    return type(value) in (int, float) and -MAX_SCALE <= value <= MAX_SCALE


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """Check an adapter's files without a model: before one is loaded, and scored for minutes.

    Returns:
        The adapter's configuration.

    Raises:
        SimPOError: the folder holds no adapter, or one that cannot be read.
    """
    config = read_adapter_config(folder)
    path = local_path(folder) / WEIGHTS
    if not any(name.endswith(".lora_b") for name in read_header(path).shapes):
        raise SimPOError(f"{path} holds no LoRA weights; use a complete copy of the adapter")
    return config


def check_fits(model: nn.Module, folder: str | Path) -> None:
    """Check by the names and sizes of its layers that an adapter belongs to a model without one.

    `load_adapter` compares every weight; this changes nothing, so that the model can run without
    the adapter first.

    Raises:
        SimPOError: the model lacks a layer of the adapter, or has it in another size.
    """
    path = local_path(folder) / WEIGHTS
    modules = dict(model.named_modules())
    for name, shape in sorted(read_header(path).shapes.items()):
        layer, _, part = name.rpartition(".")
        module: Any = modules.get(layer)
        if part != "lora_b":
            continue
        if module is None:
            problem = f"it has no {layer}"
        # lora_b is (rank, out); a linear layer's weight is (out, in), quantized or not.
        elif isinstance(module, _LINEAR) and shape[-1:] != module.weight.shape[:1]:
            problem = f"its {layer} has {len(module.weight)} outputs, and {name} the shape {shape}"
        else:
            continue
        raise SimPOError(
            f"the adapter in {folder} does not fit this model: {problem}; use the model that it "
            "was trained on"
        )


def load_adapter(model: nn.Module, folder: str | Path) -> dict[str, Any]:
    """Attach the adapter in ``folder`` to a model without one, ready for evaluation.

    mlx-lm accepts a file that lacks some of the adapter's weights and leaves these at their random
    initial values; here that is an error.

    Returns:
        The adapter's configuration.

    Raises:
        SimPOError: the adapter cannot be read, is incomplete, or belongs to another model.
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
    """Load the weights in ``folder`` into a model whose LoRA layers are attached already.

    Raises:
        SimPOError: they are not exactly those of the model's LoRA layers.
    """
    weights = check_complete(model, folder)
    model.load_weights(list(weights.items()), strict=False)


def check_complete(model: nn.Module, folder: str | Path) -> dict[str, mx.array]:
    """Return an adapter's weights if they are exactly the trainable ones of a model.

    Raises:
        SimPOError: names, shapes or dtypes differ; the message lists all the ways in which they do.
    """
    path = local_path(folder) / WEIGHTS
    weights = load_safetensors([path])
    shapes = {name: p.shape for name, p in flat_arrays(model.trainable_parameters()).items()}
    common = shapes.keys() & weights.keys()
    problems = {
        "missing": shapes.keys() - weights.keys(),
        "unknown": weights.keys() - shapes.keys(),
        "of another shape": {name for name in common if weights[name].shape != shapes[name]},
        "not floating-point": {
            name for name, w in weights.items() if not mx.issubdtype(w.dtype, mx.floating)
        },
    }
    clauses = [
        f"{len(names)} {what}, e.g. {min(names)}" for what, names in problems.items() if names
    ]
    if clauses:
        raise SimPOError(
            f"{path} is not a complete adapter of this model: {'; '.join(clauses)}; use the "
            "model that it was trained on, or a complete copy of the adapter"
        )
    return weights
