"""What turns hidden rows into logits: the model's own code, run on rows of our choice."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def head_logits(model: nn.Module, rows: mx.array) -> mx.array:
    """Logits [..., V] of hidden rows [..., D], as ``model`` makes them of its trunk's output.

    The model's own ``__call__`` runs, with a trunk that returns ``rows``: tied and untied heads,
    quantized ones, softcaps and logit scales come with it.
    """
    return type(model).__call__(_WithTrunk(model, rows), None)  # type: ignore[operator]


def outside_blocks(model: nn.Module) -> dict[str, mx.array]:
    """Trainable weights that no block holds: the head's and the embedding's (maybe one and the
    same), the final norm's."""
    inside = {
        id(weight)
        for block in model.layers  # type: ignore[union-attr]
        for _, weight in tree_flatten(block.trainable_parameters())
    }
    trainable: Any = tree_flatten(model.trainable_parameters())
    return {name: weight for name, weight in trainable if id(weight) not in inside}


def head_is_frozen(model: nn.Module) -> bool:
    """Whether gradients can end at the head's input, as with LoRA in the blocks alone."""
    return not outside_blocks(model)


class _WithTrunk:
    """The model, as its ``__call__`` sees it, but for its trunk."""

    def __init__(self, model: nn.Module, rows: mx.array) -> None:
        self._model, self._rows = model, rows

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        return _Given(found, self._rows) if name == "model" else found


class _Given:
    """The trunk, but for its ``__call__``."""

    def __init__(self, trunk: nn.Module, rows: mx.array) -> None:
        self._trunk, self._rows = trunk, rows

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)
