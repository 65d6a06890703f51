"""A model's names in MLX, in its checkpoint and in PEFT, by the rules of `architectures`."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..errors import SimPOError
from .architectures import Architecture, Experts
from .probe import Shape

STACKED = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
ADAPTABLE = (nn.Linear, nn.QuantizedLinear, *STACKED, *EMBEDDING)


class Target(NamedTuple):
    """Where PEFT puts the adapter of one of MLX's layers.

    module: path in transformers' model. parameter: the parameter of it that PEFT names in
    target_parameters, None for an ordinary layer. part: (number, count) of the layer among those
    that the parameter holds one behind the other on the axis of outputs.
    """

    module: str
    parameter: str | None = None
    part: tuple[int, int] = (0, 1)

    @property
    def path(self) -> str:
        """What PEFT matches its patterns against."""
        return self.module if self.parameter is None else f"{self.module}.{self.parameter}"


# Where the text part of a wrapped model is: in transformers, in its class for text alone (which
# AutoModelForCausalLM takes for Qwen3.5), and in transformers before 4.52 as in MLX.
TEXT_PARTS = ("model.language_model.", "model.", "language_model.model.")
_FUSED = {
    "gate_proj": ("gate_up_proj", (0, 2)),
    "up_proj": ("gate_up_proj", (1, 2)),
    "down_proj": ("down_proj", (0, 1)),
}


def peft_target(path: str, architecture: Architecture, text: str = TEXT_PARTS[0]) -> Target:
    """PEFT's name for the layer at this path of the MLX model.

    Args:
        text: where a wrapped model has its text part, one of TEXT_PARTS.
    """
    path = path.removeprefix(architecture.prefix)
    if architecture.wrapped:
        path = unwrapped(path, text)
    if found := stacked_projection(path, architecture.experts):
        block, projection, experts = found
        parameter, part = _FUSED[projection]
        return Target(block + experts.live, parameter, part)
    for old, new in architecture.renamed:
        path = path.replace(old, new)
    if architecture.parameters and re.search(rf"(^|\.)({architecture.parameters})$", path):
        return Target(path, "weight")
    return Target(path)


def unwrapped(name: str, text: str = TEXT_PARTS[0]) -> str:
    """transformers' name for what MLX has below language_model in a wrapped model."""
    ours = TEXT_PARTS[-1]
    if text == ours:
        return name
    if name.startswith(ours):
        return text + name.removeprefix(ours)
    return name.removeprefix("language_model.")


def separate_target(path: str, expert: int, architecture: Architecture) -> Target:
    """The name of one expert's layer in transformers before 5.0, and in its PEFT adapters."""
    found = stacked_projection(path.removeprefix(architecture.prefix), architecture.experts)
    assert found is not None
    block, projection, experts = found
    return Target(f"{block}{experts.separate.format(expert)}.{experts.names[projection]}")


def stacked_projection(path: str, experts: Experts | None) -> tuple[str, str, Experts] | None:
    """(path of the block with its dot, projection, rule) of a layer of stacked experts."""
    if experts is None:
        return None
    block, found, projection = path.partition(f"{experts.stacked}.")
    return (block, projection, experts) if found and projection in _FUSED else None


def checkpoint_shapes(weights: dict[str, mx.array], architecture: Architecture) -> dict[str, Shape]:
    """Names and shapes of a checkpoint's tensors for a model of this type.

    Args:
        weights: the model's arrays, not quantized; only their shapes are looked at.
    """
    shapes: dict[str, Shape] = {}
    for name, array in weights.items():
        path, _, kind = name.removeprefix(architecture.prefix).rpartition(".")
        if found := stacked_projection(path, architecture.experts):
            shapes |= expert_shapes(*found, array.shape, kind)
        elif architecture.heads_split and path.endswith(".embed_q"):
            heads = weights[name.replace("embed_q", "unembed_out")].shape
            rank, nope = array.shape[1:]
            joined = path.replace("embed_q", "kv_b_proj")
            shapes[f"{joined}.{kind}"] = (heads[0] * (nope + heads[1]), rank)
        elif architecture.heads_split and path.endswith(".unembed_out"):
            continue
        elif any(f"{path}.{kind}".endswith(suffix) for suffix in architecture.convolutions):
            channels, width, one = array.shape
            shapes[f"{path}.{kind}"] = (channels, one, width)
        else:
            shapes[f"{path}.{kind}" if path else kind] = array.shape
    return shapes


def expert_shapes(
    block: str, projection: str, experts: Experts, shape: Shape, kind: str
) -> dict[str, Shape]:
    """The checkpoint's tensors that one stacked array (experts, out, in) belongs to."""
    if experts.separate:
        names = (
            f"{block}{experts.separate.format(number)}.{experts.names[projection]}.{kind}"
            for number in range(shape[0])
        )
        return dict.fromkeys(names, shape[1:])
    parent = experts.stacked.rpartition(".")[0]
    for fused, parts in experts.fused.items():
        if projection in parts and kind == "weight":
            whole = (shape[0], shape[1] * len(parts), *shape[2:])
            return {f"{block}{parent}.{fused}": whole}
    raise AssertionError(projection)


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that mlx-lm can put LoRA on, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, ADAPTABLE)}


def layer_shape(layer: nn.Module) -> Shape:
    """(out, in) of a linear layer, (experts, out, in) of stacked ones, (rows, width) of an
    embedding; unpacked if quantized."""
    weight = layer["weight"]
    if "scales" in layer:
        return (*weight.shape[:-1], weight.shape[-1] * 32 // layer.bits)  # type: ignore[operator]
    return weight.shape


def refuse_unknown_stacks(model: nn.Module, architecture: Architecture) -> None:
    """SimPOError for stacked layers that the architecture's rule does not know.

    Sanitize leaves MLX's own names alone, so that the probe would take them for the checkpoint's.
    """
    for path, layer in adaptable_layers(model).items():
        known = stacked_projection(path.removeprefix(architecture.prefix), architecture.experts)
        if isinstance(layer, STACKED) and not known:
            raise SimPOError(
                f"{path} holds stacked experts, which no rule for {architecture.model_type} "
                "covers; such a model is not converted"
            )


def refuse_tied(paths: Iterable[str], model: nn.Module) -> None:
    """SimPOError for an adapter on an embedding that is the output layer as well.

    PEFT adapts the one use of it and not the other, mlx-lm both; a merged model again differs.
    """
    layers = adaptable_layers(model)
    if any(path.endswith("lm_head") for path in layers):
        return
    for path in paths:
        # Gemma 4 has other tables beside the one for tokens, which nothing is tied to.
        if isinstance(layers[path], EMBEDDING) and not path.endswith("per_layer"):
            raise SimPOError(
                f"the adapter adapts {path}, which is also the output layer of this model (tied "
                "embeddings): PEFT and mlx-lm mean different things by that; fuse the model "
                "instead: mlx-simpo fuse"
            )
