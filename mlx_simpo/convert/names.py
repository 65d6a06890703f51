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

    module: path in transformers' model. parameter: the parameter of that module that PEFT names in
    target_parameters; None for an ordinary layer. part: (index, count) of the layer among those
    that the parameter concatenates along its output axis.
    """

    module: str
    parameter: str | None = None
    part: tuple[int, int] = (0, 1)

    @property
    def path(self) -> str:
        """The path that PEFT matches its patterns against."""
        return self.module if self.parameter is None else f"{self.module}.{self.parameter}"


# Prefixes of a vision-language model's text part: in transformers, in transformers' class for text
# alone (which AutoModelForCausalLM picks for Qwen3.5), and in transformers before 4.52 as in MLX.
TEXT_PREFIXES = ("model.language_model.", "model.", "language_model.model.")
# MLX's projection → transformers 5's fused parameter, and (index, count) of the part within it.
_FUSED = {
    "gate_proj": ("gate_up_proj", (0, 2)),
    "up_proj": ("gate_up_proj", (1, 2)),
    "down_proj": ("down_proj", (0, 1)),
}


def peft_target(
    path: str, architecture: Architecture, text_prefix: str = TEXT_PREFIXES[0]
) -> Target:
    """Return PEFT's name for a layer of the MLX model.

    Args:
        path: of the layer in the MLX model.
        text_prefix: where a vision-language model has its text part, one of TEXT_PREFIXES.
    """
    path = path.removeprefix(architecture.prefix)
    if architecture.vision_language:
        path = transformers_name(path, text_prefix)
    if match := stacked_projection(path, architecture.experts):
        layer, projection, experts = match
        parameter, part = _FUSED[projection]
        return Target(layer + experts.transformers_path, parameter, part)
    for old, new in architecture.renamed:
        path = path.replace(old, new)
    # At a dot, so that a pattern for "mlp.gate" does not match another module that ends in it.
    if architecture.parameters and re.search(rf"(^|\.)({architecture.parameters})$", path):
        return Target(path, "weight")
    return Target(path)


def transformers_name(name: str, text_prefix: str = TEXT_PREFIXES[0]) -> str:
    """Return transformers' name for something below language_model in a vision-language model."""
    mlx_prefix = TEXT_PREFIXES[-1]
    if text_prefix == mlx_prefix:
        return name
    if name.startswith(mlx_prefix):
        return text_prefix + name.removeprefix(mlx_prefix)
    return name.removeprefix("language_model.")  # the output layer, which is outside the text part


def peft_targets(
    paths: Iterable[str], architecture: Architecture, modules: Iterable[str]
) -> dict[str, Target]:
    """Return PEFT's names for layers of the MLX model, by path, as one adapter spells them.

    Args:
        modules: of the adapter. Those of a vision-language model tell which of TEXT_PREFIXES its
            names have.
    """
    whole, text_only, old = TEXT_PREFIXES
    prefix = whole
    for name in modules:
        if name.startswith("language_model."):
            prefix = old
            break
        if name.startswith((f"{text_only}layers.", f"{text_only}embed_tokens")):
            prefix = text_only
            break
    return {path: peft_target(path, architecture, prefix) for path in paths}


def single_expert_target(path: str, expert: int, architecture: Architecture) -> Target:
    """Return the name of one expert's layer in transformers before 5.0 and its PEFT adapters.

    Args:
        path: of the stacked layer in the MLX model.
        expert: its index.
    """
    match = stacked_projection(path.removeprefix(architecture.prefix), architecture.experts)
    assert match is not None
    layer, projection, experts = match
    module = experts.checkpoint_path.format(expert)
    return Target(f"{layer}{module}.{experts.projections[projection]}")


def stacked_projection(path: str, experts: Experts | None) -> tuple[str, str, Experts] | None:
    """Split the path of a stacked projection.

    Returns:
        The path of the model's layer with its dot, the projection and the rule; None for a path
        that is not one of stacked experts.
    """
    if experts is None:
        return None
    layer, separator, projection = path.partition(f"{experts.mlx_path}.")
    return (layer, projection, experts) if separator and projection in _FUSED else None


def checkpoint_shapes(weights: dict[str, mx.array], architecture: Architecture) -> dict[str, Shape]:
    """Return names and shapes of the checkpoint's tensors for a model of this type.

    Args:
        weights: the model's arrays by name, not quantized; only their shapes are used.
    """
    shapes: dict[str, Shape] = {}
    for name, array in weights.items():
        path, _, kind = name.removeprefix(architecture.prefix).rpartition(".")
        if match := stacked_projection(path, architecture.experts):
            shapes |= expert_shapes(*match, array.shape, kind)
        elif architecture.splits_kv_b_proj and path.endswith(".embed_q"):
            # embed_q (heads, rank, nope) and unembed_out (heads, v, rank) are kv_b_proj's rows,
            # head by head: nope rows of keys, then v rows of values.
            heads, values, _ = weights[name.replace("embed_q", "unembed_out")].shape
            rank, nope = array.shape[1:]
            joined = path.replace("embed_q", "kv_b_proj")
            shapes[f"{joined}.{kind}"] = (heads * (nope + values), rank)
        elif architecture.splits_kv_b_proj and path.endswith(".unembed_out"):
            continue
        elif any(f"{path}.{kind}".endswith(suffix) for suffix in architecture.convolutions):
            channels, width, one = array.shape
            shapes[f"{path}.{kind}"] = (channels, one, width)
        else:
            shapes[f"{path}.{kind}" if path else kind] = array.shape
    return shapes


def expert_shapes(
    layer: str, projection: str, experts: Experts, shape: Shape, kind: str
) -> dict[str, Shape]:
    """Return names and shapes of the checkpoint's tensors that one stacked array belongs to.

    Args:
        shape: (experts, out, in) of a weight, (experts, out) of a bias.
        kind: "weight" or "bias".

    Raises:
        AssertionError: the rule does not name this projection.
    """
    if experts.checkpoint_path:
        names = (
            f"{layer}{experts.checkpoint_path.format(n)}.{experts.projections[projection]}.{kind}"
            for n in range(shape[0])
        )
        return dict.fromkeys(names, shape[1:])
    parent = experts.mlx_path.rpartition(".")[0]
    for fused, parts in experts.fused_tensors.items():
        if projection in parts and kind == "weight":
            whole = (shape[0], shape[1] * len(parts), *shape[2:])
            return {f"{layer}{parent}.{fused}": whole}
    raise AssertionError(projection)


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that mlx-lm can put LoRA on, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, ADAPTABLE)}


def layer_shape(layer: nn.Module) -> Shape:
    """Return the shape of a layer's weight as it is when not quantized.

    Returns:
        (out, in) of a linear layer, (experts, out, in) of stacked ones, (vocabulary, width) of an
        embedding.
    """
    weight = layer["weight"]
    if "scales" in layer:  # packed: 32 bits of quantized values per element
        return (*weight.shape[:-1], weight.shape[-1] * 32 // layer.bits)  # type: ignore[operator]
    return weight.shape


def check_stacks_known(model: nn.Module, architecture: Architecture) -> None:
    """Check that the architecture's rule covers all stacked layers of a model.

    Sanitize leaves MLX's own names alone, so the probe would take them for the checkpoint's.

    Raises:
        SimPOError: it does not cover one of them.
    """
    for path, layer in adaptable_layers(model).items():
        known = stacked_projection(path.removeprefix(architecture.prefix), architecture.experts)
        if isinstance(layer, STACKED) and not known:
            raise SimPOError(
                f"{path} holds stacked experts, which no rule for {architecture.model_type} "
                "covers; such a model is not converted"
            )


def check_not_tied(paths: Iterable[str], model: nn.Module) -> None:
    """Check that an adapter is not on an embedding that is the output layer as well.

    mlx-lm adapts both uses of such an embedding, PEFT only one as long as it is not merged.

    Args:
        paths: the adapted layers of the MLX model.

    Raises:
        SimPOError: it is on such an embedding.
    """
    layers = adaptable_layers(model)
    if any(path.endswith("lm_head") for path in layers):
        return
    for path in paths:
        # Gemma 4 has other embeddings beside that of the tokens, which nothing is tied to.
        if isinstance(layers[path], EMBEDDING) and not path.endswith("per_layer"):
            raise SimPOError(
                f"the adapter adapts {path}, which is also the output layer of this model (tied "
                "embeddings): PEFT and mlx-lm mean different things by that; fuse the model "
                "instead: mlx-simpo fuse"
            )
