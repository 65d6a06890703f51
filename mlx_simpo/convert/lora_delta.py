"""What LoRA adds to the weights of each layer, independent of any library's file format.

Every conversion reads an adapter into LoRA deltas and writes these.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from ..errors import SimPOError
from .names import EMBEDDING, STACKED, layer_shape
from .probe import Shape

FLOATS = (mx.float32, mx.bfloat16, mx.float16)


@dataclass(frozen=True)
class LoRADelta:
    """weight + scale · b @ a, for one layer (https://arxiv.org/abs/2106.09685).

    With a magnitude (DoRA, https://arxiv.org/abs/2402.09353) each row of the sum is then scaled to
    have that norm.

    a: (rank, in). b: (out, rank). Both have a leading axis for the experts where these are stacked.
    For an embedding "in" is the vocabulary, and the product is transposed. magnitude: (out,).
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def rank(self) -> int:
        """The rank of the product b @ a as it is stored."""
        return self.a.shape[-2]

    def scaled_to(self, scale: float) -> "LoRADelta":
        """Return the same delta with another scale, the ratio of the two multiplied into b.

        b becomes float32, unless its own dtype represents the result exactly (powers of two).
        """
        if scale == self.scale:
            return self
        factor = self.scale / scale
        exact = math.frexp(abs(factor))[0] in (0.0, 0.5)
        b = self.b if exact else self.b.astype(mx.float32)
        return replace(self, b=b * factor, scale=scale)

    def padded_to(self, rank: int) -> "LoRADelta":
        """Return the same delta with a higher rank, padded with zeros."""
        padding = rank - self.rank
        if not padding:
            return self
        experts = [(0, 0)] * (self.a.ndim - 2)
        return replace(
            self,
            a=mx.pad(self.a, [*experts, (0, padding), (0, 0)]),
            b=mx.pad(self.b, [*experts, (0, 0), (0, padding)]),
        )

    def without_zeros(self) -> "LoRADelta":
        """Return the same delta without the ranks where b is zero, unless b is zero altogether.

        A projection that shares a parameter's delta with another does not use these.
        """
        used = np.array(mx.any(self.b != 0, axis=list(range(self.b.ndim - 1))))
        if used.all() or not used.any():
            return self
        ranks = mx.array(np.flatnonzero(used))
        return replace(self, a=mx.take(self.a, ranks, axis=-2), b=mx.take(self.b, ranks, axis=-1))


def lora_deltas_of(model: nn.Module) -> dict[str, LoRADelta]:
    """Return the deltas of the LoRA and DoRA layers attached to a model, by path.

    Raises:
        SimPOError: there are no such layers, or PEFT has no counterpart for one of them.
    """
    deltas: dict[str, LoRADelta] = {}
    for path, layer in model.named_modules():
        if "lora_a" not in layer:
            continue
        if isinstance(layer, LoRASwitchLinear):
            deltas[path] = LoRADelta(layer.lora_a, layer.lora_b, layer.scale)
        elif isinstance(layer, LoRALinear | LoRAEmbedding):
            # mlx-lm computes x @ lora_a @ lora_b: both are the transposes of the definition's.
            deltas[path] = LoRADelta(layer.lora_a.T, layer.lora_b.T, layer.scale)
        elif isinstance(layer, DoRALinear):
            deltas[path] = LoRADelta(layer.lora_a.T, layer.lora_b.T, layer.scale, layer.m)
        else:
            raise SimPOError(
                f"{path} has a {type(layer).__name__}, which is not converted; fuse the model "
                "instead (mlx-simpo fuse)"
            )
    if not deltas:
        raise SimPOError("the adapter adapts no layer at all; there is nothing to convert")
    return deltas


def check_lora_delta(path: str, delta: LoRADelta, layer: nn.Module) -> None:
    """Check that a delta fits the layer that it is for.

    Raises:
        SimPOError: a tensor has another shape or is not of floats, or the scale is not finite.
    """
    shape = layer_shape(layer)
    inputs, outputs = shape[-1], shape[-2]
    if isinstance(layer, EMBEDDING):
        inputs, outputs = outputs, inputs
    experts = shape[:-2] if isinstance(layer, STACKED) else ()
    expected: list[tuple[str, mx.array | None, Shape]] = [
        ("A", delta.a, (*experts, delta.rank, inputs)),
        ("B", delta.b, (*experts, outputs, delta.rank)),
        ("magnitude", delta.magnitude, (outputs,)),
    ]
    for name, array, needed in expected:
        if array is not None and array.shape != needed:
            raise SimPOError(f"{path}: {name} has shape {array.shape}; this model needs {needed}")
        if array is not None and array.dtype not in FLOATS:
            raise SimPOError(f"{path}: {name} is of type {array.dtype}; it must be a float")
    if not math.isfinite(delta.scale):
        raise SimPOError(f"{path}: the scale is {delta.scale}; it must be a finite number")


def apply_lora_deltas(model: nn.Module, deltas: dict[str, LoRADelta]) -> None:
    """Add deltas to a model's own weights, in place, in float32.

    This follows the definition and does not use mlx-lm's LoRA layers: `verify` compares the two.

    Args:
        model: not quantized.
    """
    layers = dict(model.named_modules())
    for path, delta in deltas.items():
        layer = layers[path]
        weight = layer["weight"].astype(mx.float32)
        # A stack of experts is multiplied expert by expert.
        product = delta.b.astype(mx.float32) @ delta.a.astype(mx.float32)
        if isinstance(layer, EMBEDDING):
            product = product.T
        weight = weight + delta.scale * product
        if delta.magnitude is not None:
            # DoRA: the rows of the sum are normalized, then multiplied by the trained magnitudes.
            norms = mx.linalg.norm(weight, axis=1)
            weight = (delta.magnitude.astype(mx.float32) / norms)[:, None] * weight
        layer["weight"] = weight


def most_common(values: Iterable[float]) -> float:
    """Return the value that occurs most often, the largest one if several do."""
    counts: dict[float, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return max(counts, key=lambda value: (counts[value], value))
