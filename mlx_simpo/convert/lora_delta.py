"""What an adapter adds to each layer, in no library's format: the middle of every conversion."""

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
    """weight + scale · b @ a, for one layer; with a magnitude (DoRA), each row of the sum is then
    given that norm.

    a: (r, in). b: (out, r). Of stacked experts both have a first axis for the expert. Of an
    embedding "in" are the rows of the table and the product is transposed. magnitude: (out,).
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-2]

    def scaled_to(self, scale: float) -> "LoRADelta":
        """The same update with another scale, the difference taken into b: in float32, unless b's
        own dtype holds it exactly (powers of two)."""
        if scale == self.scale:
            return self
        factor = self.scale / scale
        exact = math.frexp(abs(factor))[0] in (0.0, 0.5)
        b = self.b if exact else self.b.astype(mx.float32)
        return replace(self, b=b * factor, scale=scale)

    def padded_to(self, rank: int) -> "LoRADelta":
        """The same update with a higher rank, filled up with zeros."""
        more = rank - self.rank
        if not more:
            return self
        experts = [(0, 0)] * (self.a.ndim - 2)
        return replace(
            self,
            a=mx.pad(self.a, [*experts, (0, more), (0, 0)]),
            b=mx.pad(self.b, [*experts, (0, 0), (0, more)]),
        )

    def without_zeros(self) -> "LoRADelta":
        """The same update without the part of its rank where b is zero, unless all of it is: what
        a projection does not use of an update that it shares with another."""
        used = np.array(mx.any(self.b != 0, axis=list(range(self.b.ndim - 1))))
        if used.all() or not used.any():
            return self
        kept = mx.array(np.flatnonzero(used))
        return replace(self, a=mx.take(self.a, kept, axis=-2), b=mx.take(self.b, kept, axis=-1))


def lora_deltas_of(model: nn.Module) -> dict[str, LoRADelta]:
    """The updates of the LoRA and DoRA layers that are attached to a model, by path.

    Raises:
        SimPOError: there are none, or one is of a kind that PEFT has no name for.
    """
    found: dict[str, LoRADelta] = {}
    for path, layer in model.named_modules():
        if "lora_a" not in layer:
            continue
        if isinstance(layer, LoRASwitchLinear):
            found[path] = LoRADelta(layer.lora_a, layer.lora_b, layer.scale)
        elif isinstance(layer, LoRALinear | LoRAEmbedding):
            found[path] = LoRADelta(layer.lora_a.T, layer.lora_b.T, layer.scale)
        elif isinstance(layer, DoRALinear):
            found[path] = LoRADelta(layer.lora_a.T, layer.lora_b.T, layer.scale, layer.m)
        else:
            raise SimPOError(
                f"{path} has a {type(layer).__name__}, which is not converted; fuse the model"
            )
    if not found:
        raise SimPOError("the adapter adapts no layer at all")
    return found


def check_lora_delta(path: str, update: LoRADelta, layer: nn.Module) -> None:
    """SimPOError if an update does not fit the layer it is for."""
    shape = layer_shape(layer)
    inputs, outputs = shape[-1], shape[-2]
    if isinstance(layer, EMBEDDING):
        inputs, outputs = outputs, inputs
    experts = shape[:-2] if isinstance(layer, STACKED) else ()
    wanted: list[tuple[str, mx.array | None, Shape]] = [
        ("A", update.a, (*experts, update.rank, inputs)),
        ("B", update.b, (*experts, outputs, update.rank)),
        ("magnitude", update.magnitude, (outputs,)),
    ]
    for what, array, expected in wanted:
        if array is not None and array.shape != expected:
            raise SimPOError(f"{path}: {what} has shape {array.shape}; this model needs {expected}")
        if array is not None and array.dtype not in FLOATS:
            raise SimPOError(f"{path}: {what} is of type {array.dtype}; it must be a float")
    if not math.isfinite(update.scale):
        raise SimPOError(f"{path}: the scale is {update.scale}; it must be a finite number")


def apply_lora_deltas(model: nn.Module, updates: dict[str, LoRADelta]) -> None:
    """Put updates into a model's own weights, in float32, by their definition.

    mlx-lm's LoRA layers have no part in this, which is what `verify` needs it for. The model must
    not be quantized.
    """
    layers = dict(model.named_modules())
    for path, update in updates.items():
        layer = layers[path]
        weight = layer["weight"].astype(mx.float32)
        product = update.b.astype(mx.float32) @ update.a.astype(mx.float32)
        if isinstance(layer, EMBEDDING):
            product = product.T
        weight = weight + update.scale * product
        if update.magnitude is not None:
            norms = mx.linalg.norm(weight, axis=1)
            weight = (update.magnitude.astype(mx.float32) / norms)[:, None] * weight
        layer["weight"] = weight


def common(values: Iterable[float]) -> float:
    """The value that occurs most often, the largest of several."""
    counts: dict[float, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return max(counts, key=lambda value: (counts[value], value))
