"""Attach LoRA to an mlx-lm model, with mlx-lm's own LoRA layers."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..config.simpo_config import LoRAConfig
from ..errors import SimPOError
from .adapters import load_weights, read_adapter_config

LINEAR = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)


def attach_lora(model: nn.Module, config: LoRAConfig, seed: int) -> dict[str, Any]:
    """Freeze ``model`` and add trainable LoRA layers to it.

    A (in, rank) is drawn uniformly from ±1/√in, as in PEFT and mlx-lm; B (rank, out) is zero. With
    ``init_from``, A and B are those of an existing adapter, whose settings must be the same. Both
    are float32 whatever the dtype of the base model.

    Returns:
        The content of mlx-lm's adapter_config.json: fine_tune_type, num_layers, lora_parameters.

    Raises:
        SimPOError: the model does not have a target or that many layers, mlx-lm has no DoRA for a
            target, or the adapter of ``init_from`` does not fit.
    """
    adapter = adapter_config(model, config)
    mx.random.seed(seed)
    model.freeze()
    parameters = adapter["lora_parameters"]
    try:
        linear_to_lora_layers(model, adapter["num_layers"], parameters, use_dora=config.dora)
    except ValueError as error:
        raise SimPOError(f"LoRA cannot be attached: {error}") from None
    if config.init_from is not None:
        load_initial(model, adapter, config.init_from)
    # An optimizer's steps of 1e-6 would vanish in bfloat16, which has 8 bits of precision.
    model.update(tree_map(lambda p: p.astype(mx.float32), model.trainable_parameters()))
    mx.eval(model.trainable_parameters())
    return adapter


def adapter_config(model: nn.Module, config: LoRAConfig) -> dict[str, Any]:
    """Return the content of mlx-lm's adapter_config.json for these settings.

    Raises:
        SimPOError: the model does not have a target or that many layers, or mlx-lm has no DoRA for
            a target.
    """
    num_layers = len(model.layers)  # type: ignore[arg-type]
    if config.num_layers > num_layers:
        raise SimPOError(
            f"lora.num_layers is {config.num_layers}; the model has {num_layers} layers (-1: all)"
        )
    return {
        "fine_tune_type": "dora" if config.dora else "lora",
        "num_layers": config.num_layers,
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.resolved_scale,
            "dropout": config.dropout,
            "keys": target_keys(model, config),
        },
    }


def target_keys(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the paths of the modules to adapt, relative to a layer: "self_attn.q_proj".

    A name in target_modules is the last part of such a path or all of it.

    Raises:
        SimPOError: the model does not have a target, or mlx-lm has no DoRA for it.
    """
    layers: list[nn.Module] = list(model.layers)  # type: ignore[arg-type]
    adapted = layers if config.num_layers == -1 else layers[-config.num_layers :]
    # Some models mix layers: attention and recurrence, dense layers and mixtures of experts, or
    # quantized to more bits at the ends.
    modules = [(path, m) for layer in adapted for path, m in layer.named_modules()]
    modules = [(path, m) for path, m in modules if isinstance(m, LINEAR)]
    linear = {path for path, _ in modules}
    if config.target_modules == "all-linear":
        keys = linear
    else:
        keys = set()
        for name in config.target_modules:
            matches = {p for p in linear if p == name or p.rpartition(".")[2] == name}
            if not matches:
                known = ", ".join(sorted({p.rpartition(".")[2] for p in linear}))
                raise SimPOError(
                    f"lora.target_modules names {name!r}, which no adapted layer has; they have "
                    f"{known}"
                )
            keys |= matches
    if config.dora:
        check_dora_support((path, m) for path, m in modules if path in keys)
    return sorted(keys)


def check_dora_support(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Check that mlx-lm has DoRA for all of these modules, each with its path in a layer.

    Raises:
        SimPOError: one is of experts, or quantized to 3, 5 or 6 bits; mlx-lm fails on them later.
    """
    for path, module in modules:
        bits = getattr(module, "bits", 4)
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            raise SimPOError(
                f"lora.dora is true, but {path} is a mixture-of-experts layer, for which mlx-lm "
                "has no DoRA; leave it out of lora.target_modules or set lora.dora=false"
            )
        # mlx-lm counts 32 // bits codes per packed word: wrong where codes cross words.
        if 32 % bits:
            raise SimPOError(
                f"lora.dora is true, but {path} is quantized to {bits} bits; mlx-lm's DoRA "
                "supports 2, 4 and 8 bits only; set lora.dora=false"
            )


def load_initial(model: nn.Module, adapter: dict[str, Any], folder: str) -> None:
    """Load the weights of an existing adapter into freshly attached LoRA layers.

    Args:
        adapter: the adapter_config.json of this run. folder: the existing adapter's.

    Raises:
        SimPOError: its settings differ from the run's (all differences in one message), or its
            weights are not those of this model.
    """
    existing = read_adapter_config(folder)
    total = len(model.layers)  # type: ignore[arg-type]
    # mlx-lm takes every number that is not above 0 for all layers.
    numbers = [c["num_layers"] for c in (existing, adapter)]
    num_layers = [number if number > 0 else total for number in numbers]
    there, here = existing["lora_parameters"], adapter["lora_parameters"]
    settings = {
        "fine_tune_type": (existing.get("fine_tune_type", "lora"), adapter["fine_tune_type"]),
        "num_layers": (num_layers[0], num_layers[1]),
        "rank": (there.get("rank"), here["rank"]),
        "scale": (there.get("scale"), here["scale"]),
    }
    # mlx-lm omits keys where every module is adapted; the names of the weights are then compared.
    if keys := there.get("keys"):
        settings["keys"] = (sorted(keys), here["keys"])
    differences = [f"{n} is {a} there and {b} here" for n, (a, b) in settings.items() if a != b]
    if differences:
        raise SimPOError(
            f"lora.init_from: the adapter in {folder} has other settings than this run: "
            f"{'; '.join(differences)}. Set lora.rank, lora.scale, lora.target_modules, "
            "lora.num_layers and lora.dora to the adapter's"
        )
    load_weights(model, folder)
