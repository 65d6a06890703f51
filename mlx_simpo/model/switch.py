"""Switch a loaded adapter off and on again: the base model from the same weights, loaded once."""

import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

_LINEAR = (LoRALinear, LoRASwitchLinear, DoRALinear)
_EMBEDDING = (LoRAEmbedding, DoRAEmbedding)


class AdapterSwitch:
    """Exchanges the adapter's layers of a model for the base model's, and back.

    The base model's own layers run when it is off. A scale of 0 would not do: LoRA would add zeros,
    which are NaN where the adapter overflows, and DoRA would still normalize the weights.

    Args:
        model: with an adapter attached (`adapters.load_adapter`), which is on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.is_on = True
        # The inner layer of an adapter's layer is listed, too, and has no adapter of its own.
        self._adapted = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, (*_LINEAR, *_EMBEDDING))
        }
        self._base = {
            path: module.embedding if isinstance(module, _EMBEDDING) else module.linear
            for path, module in self._adapted.items()
        }

    def set(self, is_on: bool) -> None:
        """Let the model be the adapted one, or the base model."""
        if is_on != self.is_on:
            layers = self._adapted if is_on else self._base
            self.model.update_modules(tree_unflatten(list(layers.items())))
            self.is_on = is_on
