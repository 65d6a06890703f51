"""LoRA on an mlx-lm model, with mlx-lm's own layers."""

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
    """Freeze ``model`` and put trainable LoRA layers into it.

    A is drawn uniformly from ±1/√in (as in PEFT and mlx-lm), B is zero; both are float32 whatever
    the base's dtype, because steps of 1e-6 vanish in bfloat16. With ``init_from``, A and B are
    those of an existing adapter, whose settings must be the same.

    Returns:
        The content of mlx-lm's adapter_config.json: fine_tune_type, num_layers, lora_parameters.

    Raises:
        SimPOError: a target that the model does not have, more layers than it has, DoRA where
            mlx-lm has none, an adapter that does not fit.
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
    model.update(tree_map(lambda p: p.astype(mx.float32), model.trainable_parameters()))
    mx.eval(model.trainable_parameters())
    return adapter


def adapter_config(model: nn.Module, config: LoRAConfig) -> dict[str, Any]:
    """mlx-lm's adapter_config.json for these settings; raises as `attach_lora` does."""
    blocks = len(model.layers)  # type: ignore[arg-type]
    if config.num_layers > blocks:
        raise SimPOError(
            f"lora.num_layers is {config.num_layers}; the model has {blocks} blocks (-1: all)"
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
    """Paths of the layers to adapt, relative to a block ("self_attn.q_proj").

    A name in target_modules is the last part of such a path or the whole of it.
    """
    blocks: list[nn.Module] = list(model.layers)  # type: ignore[arg-type]
    adapted = blocks if config.num_layers == -1 else blocks[-config.num_layers :]
    modules = {path: m for block in adapted for path, m in block.named_modules()}
    linear = {path: m for path, m in modules.items() if isinstance(m, LINEAR)}
    if config.target_modules == "all-linear":
        keys = set(linear)
    else:
        keys = set()
        for name in config.target_modules:
            found = {p for p in linear if p == name or p.rpartition(".")[2] == name}
            if not found:
                known = ", ".join(sorted({p.rpartition(".")[2] for p in linear}))
                raise SimPOError(
                    f"lora.target_modules names {name!r}, which no adapted block has; they have "
                    f"{known}"
                )
            keys |= found
    if config.dora:
        refuse_unsupported_dora({path: linear[path] for path in keys})
    return sorted(keys)


def refuse_unsupported_dora(layers: dict[str, nn.Module]) -> None:
    """SimPOError if mlx-lm has no DoRA for one of the layers (by path)."""
    for path, layer in layers.items():
        bits = getattr(layer, "bits", 4)
        if isinstance(layer, SwitchLinear | QuantizedSwitchLinear):
            raise SimPOError(
                f"lora.dora is true, but {path} is a mixture-of-experts layer, for which mlx-lm "
                "has no DoRA; leave it out of lora.target_modules or set lora.dora=false"
            )
        if 32 % bits:
            raise SimPOError(
                f"lora.dora is true, but {path} is quantized to {bits} bits; mlx-lm's DoRA takes "
                "2, 4 and 8 bits only; set lora.dora=false"
            )


def load_initial(model: nn.Module, adapter: dict[str, Any], folder: str) -> None:
    """Put the weights of an existing adapter into freshly attached layers.

    Raises:
        SimPOError: its settings differ from the run's (all differences in one message), or its
            weights are not those of this model.
    """
    theirs = read_adapter_config(folder)
    blocks = len(model.layers)  # type: ignore[arg-type]
    layers = [
        blocks if c.get("num_layers") == -1 else c.get("num_layers") for c in (theirs, adapter)
    ]
    pairs = {
        "fine_tune_type": (theirs.get("fine_tune_type", "lora"), adapter["fine_tune_type"]),
        "num_layers": (layers[0], layers[1]),
    }
    there, here = theirs["lora_parameters"], adapter["lora_parameters"]
    pairs |= {name: (there.get(name), here[name]) for name in ("rank", "scale")}
    if there.get("keys"):  # mlx-lm may leave them out: every layer; the weights' names then tell
        keys = there["keys"]
        pairs["keys"] = (sorted(keys) if isinstance(keys, list) else keys, here["keys"])
    differences = [f"{name} is {a} there and {b} here" for name, (a, b) in pairs.items() if a != b]
    if differences:
        raise SimPOError(
            f"lora.init_from: the adapter in {folder} has other settings than this run: "
            f"{'; '.join(differences)}. Set lora.rank, lora.scale, lora.target_modules, "
            "lora.num_layers and lora.dora to the adapter's"
        )
    load_weights(model, folder)
