"""Models for the memory forecast, and runs of a micro-batch whose memory is known exactly."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from helpers.tiny import tiny_model

from mlx_simpo import LoRAConfig
from mlx_simpo.data.encode import EncodedPair
from mlx_simpo.model.adapters import flat_arrays
from mlx_simpo.model.lora import attach_lora


def model_of(layers: int, **lora: Any) -> Any:
    """A tiny model with so many layers and LoRA."""
    model = tiny_model(num_hidden_layers=layers)
    attach_lora(model, LoRAConfig(rank=4, **lora), seed=1)
    return model


def trainable_bytes(model: nn.Module) -> int:
    """Size of the weights that train."""
    return sum(array.nbytes for array in flat_arrays(model.trainable_parameters()).values())


def resident(model: nn.Module, copies: float) -> float:
    """Bytes in use, and so many copies of what trains."""
    mx.eval(model.parameters())
    mx.clear_cache()
    return mx.get_active_memory() + copies * trainable_bytes(model)


class Law:
    """A run that takes fixed + per_layer × (layers that train) bytes, both functions of the pairs'
    tokens, and remembers what it has taken."""

    def __init__(
        self,
        model: nn.Module,
        fixed: Callable[[int], float] = lambda tokens: 1e6,
        per_layer: Callable[[int], float] = lambda tokens: 2e3 * tokens,
    ) -> None:
        self.model, self.fixed, self.per_layer = model, fixed, per_layer
        self.taken: list[int] = []

    def __call__(self, pairs: Sequence[EncodedPair]) -> None:
        layers: Any = self.model.layers
        training = [layer for layer in layers if flat_arrays(layer.trainable_parameters())]
        self.taken.append(self.bytes(pairs, len(training)))
        mx.eval(mx.zeros(self.taken[-1], mx.uint8))

    def bytes(self, pairs: Sequence[EncodedPair], num_layers: int) -> int:
        """What it takes with so many layers that train."""
        tokens = sum(len(s.tokens) for pair in pairs for s in (pair.chosen, pair.rejected))
        return round(self.fixed(tokens) + num_layers * self.per_layer(tokens))
