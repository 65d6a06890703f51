"""Adapters in mlx-lm's format: read by mlx-lm itself, written so that it reads them exactly."""

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
    """The updates of an mlx-lm adapter, attached to ``model``; see `model.adapters.load_adapter`.

    Raises:
        SimPOError: it cannot be read, is incomplete or of another model, or of a kind that is not
            converted (fine_tune_type full).
    """
    load_adapter(model, folder)
    return lora_deltas_of(model)


def write_mlx(
    folder: Path,
    updates: dict[str, LoRADelta],
    model: nn.Module,
    extra: dict[str, Any],
) -> None:
    """Write updates as an mlx-lm adapter.

    mlx-lm knows one rank and one scale for all layers: smaller ranks are filled up with zeros,
    smaller scales taken into B.

    Args:
        model: the bare model that they are for.
        extra: what else is to stand in adapter_config.json; mlx-lm leaves it alone.

    Raises:
        SimPOError: mlx-lm has no DoRA for one of the layers, or DoRA and LoRA are mixed.
    """
    rank = max(update.rank for update in updates.values())
    scale = max((update.scale for update in updates.values()), key=abs)
    dora = {update.magnitude is not None for update in updates.values()}
    layers = adaptable_layers(model)
    if len(dora) > 1:
        raise SimPOError("the adapter has DoRA on some of its layers only, which mlx-lm has not")
    if dora == {True}:
        check_dora_support({path: layers[path] for path in updates})
        if any(isinstance(layers[path], EMBEDDING) for path in updates):
            raise SimPOError("the adapter has DoRA on an embedding, which is not converted")
    if not scale:
        raise SimPOError("the adapter's scale is 0: it changes nothing")
    keys, num_layers = keys_of(set(updates), model)
    weights: dict[str, mx.array] = {}
    for path, update in updates.items():
        update = update.scaled_to(scale).padded_to(rank)
        stacked = isinstance(layers[path], STACKED)
        weights[f"{path}.lora_a"] = update.a if stacked else update.a.T
        weights[f"{path}.lora_b"] = update.b if stacked else update.b.T
        if update.magnitude is not None:
            weights[f"{path}.m"] = update.magnitude
    config = {
        "fine_tune_type": "dora" if dora == {True} else "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
        **extra,
    }
    write_adapter(folder, weights, config)


def keys_of(paths: set[str], model: nn.Module) -> tuple[list[str], int]:
    """(lora_parameters.keys, num_layers) that make mlx-lm adapt these layers and no others.

    Names within a block and the number of blocks where that is the same; else whole paths, which
    mlx-lm looks up in the whole model.
    """
    blocks: list[nn.Module] = list(model.layers)  # type: ignore[arg-type]
    prefixes = {id(module): path for path, module in model.named_modules()}
    place = {
        f"{prefixes[id(block)]}.{inner}": (number, inner)
        for number, block in enumerate(blocks)
        for inner in adaptable_layers(block)
    }
    if paths <= place.keys():
        keys = {place[path][1] for path in paths}
        first = min(place[path][0] for path in paths)
        there = {path for path, (number, inner) in place.items() if number >= first}
        if {path for path in there if place[path][1] in keys} == paths:
            return sorted(keys), -1 if first == 0 else len(blocks) - first
    return sorted(paths), -1
