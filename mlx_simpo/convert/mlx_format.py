"""Adapters in mlx-lm's format: read with mlx-lm itself, written so that it reads them exactly."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import SimPOError
from ..model.adapters import load_adapter, write_adapter
from ..model.lora import check_dora_support
from .lora_delta import LoRADelta, lora_deltas_of
from .names import EMBEDDING, STACKED, adaptable_layers


def read_mlx(folder: str | Path, model: nn.Module) -> dict[str, LoRADelta]:
    """Attach an mlx-lm adapter to ``model`` and return its deltas by path.

    Raises:
        SimPOError: the adapter cannot be read, is incomplete, belongs to another model (see
            `model.adapters.load_adapter`), or is not LoRA or DoRA (fine_tune_type full).
    """
    load_adapter(model, folder)
    return lora_deltas_of(model)


def write_mlx(
    folder: Path,
    deltas: dict[str, LoRADelta],
    model: nn.Module,
    extra: dict[str, Any],
) -> None:
    """Write deltas as an mlx-lm adapter.

    mlx-lm knows one rank and one scale for all layers: smaller ranks are padded with zeros, and the
    ratio of a smaller scale to the largest one is multiplied into B.

    Args:
        deltas: by path.
        model: the base model that they are for.
        extra: more entries of adapter_config.json; mlx-lm ignores them.

    Raises:
        SimPOError: mlx-lm has no DoRA for one of the layers, DoRA and LoRA are mixed, or the
            scale is 0.
    """
    rank = max(delta.rank for delta in deltas.values())
    scale = max((delta.scale for delta in deltas.values()), key=abs)
    dora = {delta.magnitude is not None for delta in deltas.values()}
    layers = adaptable_layers(model)
    if len(dora) > 1:
        raise SimPOError(
            "the adapter has DoRA on some of its layers only, which mlx-lm does not support; merge "
            "it into its model with PEFT (merge_and_unload) and convert that: mlx-simpo convert "
            "from-hf"
        )
    if dora == {True}:
        check_dora_support((path, layers[path]) for path in deltas)
        if any(isinstance(layers[path], EMBEDDING) for path in deltas):
            raise SimPOError(
                "the adapter has DoRA on an embedding, which is not converted; merge it into its "
                "model with PEFT (merge_and_unload) and convert that: mlx-simpo convert from-hf"
            )
    if not scale:
        raise SimPOError(
            "the adapter's scale is 0, so it changes nothing; there is nothing to convert"
        )
    keys, num_layers = keys_of(set(deltas), model)
    weights: dict[str, mx.array] = {}
    for path, delta in deltas.items():
        delta = delta.scaled_to(scale).padded_to(rank)
        stacked = isinstance(layers[path], STACKED)
        weights[f"{path}.lora_a"] = delta.a if stacked else delta.a.T
        weights[f"{path}.lora_b"] = delta.b if stacked else delta.b.T
        if delta.magnitude is not None:
            weights[f"{path}.m"] = delta.magnitude
    config = {
        "fine_tune_type": "dora" if dora == {True} else "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
        **extra,
    }
    write_adapter(folder, weights, config)


def keys_of(paths: set[str], model: nn.Module) -> tuple[list[str], int]:
    """Return (lora_parameters.keys, num_layers) that make mlx-lm adapt exactly these layers.

    Names within a layer of the model, and the number of its last layers, where these select the
    same; otherwise whole paths, which mlx-lm looks up in the whole model.
    """
    model_layers: list[nn.Module] = list(model.layers)  # type: ignore[arg-type]
    prefixes = {id(module): path for path, module in model.named_modules()}
    # Path → (index of the model's layer, name within it).
    positions = {
        f"{prefixes[id(layer)]}.{inner}": (index, inner)
        for index, layer in enumerate(model_layers)
        for inner in adaptable_layers(layer)
    }
    if paths <= positions.keys():
        keys = {positions[path][1] for path in paths}
        first = min(positions[path][0] for path in paths)
        selected = {p for p, (index, key) in positions.items() if index >= first and key in keys}
        if selected == paths:
            # mlx-lm adapts layers[-max(num_layers, 0):], which for -1 is all of them.
            return sorted(keys), -1 if first == 0 else len(model_layers) - first
    return sorted(paths), -1
