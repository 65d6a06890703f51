"""What turns hidden rows into logits: the model's own code, run on rows of our choice."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class Head(NamedTuple):
    """Logits are softcap · tanh(scale · product(rows) / softcap), or scale · product(rows) where
    softcap is 0; product: hidden rows [..., D] → [..., V]. weight: [V, D] where product is
    rows @ weight.T and nothing else (no bias, quantization or LoRA)."""

    product: Callable[[mx.array], mx.array]
    scale: float
    softcap: float
    weight: mx.array | None = None

    def centred(self, rows: mx.array, targets: mx.array) -> mx.array:
        """product(rows) [C, V], with each row's value at its target taken off where that makes it
        more exact (a row's log-probabilities do not depend on what is taken off all of it).

        In half precision, rounding the products is the largest error: near 20, a bfloat16 is off by
        0.06. Taken off within the product, before it is rounded, what counts most is near 0.
        """
        if self.weight is None or self.softcap or rows.dtype == mx.float32:
            return self.product(rows)
        column = mx.clip(targets, 0, len(self.weight) - 1)
        at_target = (rows.astype(mx.float32) * self.weight[column]).sum(axis=-1, keepdims=True)
        return mx.addmm(at_target.astype(rows.dtype), rows, self.weight.T, beta=-1.0)

    def logits(self, rows: mx.array) -> mx.array:
        """float32 [..., V]."""
        scaled = self.scale * self.product(rows).astype(mx.float32)
        return self.softcap * mx.tanh(scaled / self.softcap) if self.softcap else scaled


# Kinds of model whose logits are known to be, or not to be, what their settings say.
_as_said: dict[tuple, bool] = {}


def resolve_head(model: nn.Module) -> Head:
    """The head as a matrix product and what follows it; or, where a trial on some rows shows that
    more follows than the usual settings say, all of the model's own code as ``product``."""
    all_of_it = Head(partial(head_logits, model), 1.0, 0.0)
    embedding = getattr(model.model, "embed_tokens", None)
    if embedding is None:
        return all_of_it
    said = _said(model, embedding)
    kind = (type(model), "lm_head" in model, said.scale, said.softcap)
    if kind not in _as_said:
        rows = embedding(mx.arange(4))
        # Large enough to tell a softcap from none.
        greatest = mx.abs(said.scale * said.product(rows)).max()
        rows = (rows * (2 * (said.softcap or 10.0) / greatest)).astype(rows.dtype)
        expected, found = head_logits(model, rows).astype(mx.float32), said.logits(rows)
        near = 1e-5 if rows.dtype == mx.float32 else 2e-2
        _as_said[kind] = bool((mx.abs(found - expected) <= near * mx.abs(expected).max()).all())
    return said if _as_said[kind] else all_of_it


def _said(model: nn.Module, embedding: Any) -> Head:
    """The head that the model's settings speak of (Cohere multiplies, Granite divides)."""
    settings: Any = getattr(model, "args", None)
    scale = getattr(settings, "logit_scale", None) or 1.0
    scale /= getattr(settings, "logits_scaling", None) or 1.0
    softcap = getattr(settings, "final_logit_softcapping", None) or 0.0
    owner: Any = model.get("lm_head", embedding)
    product = embedding.as_linear if owner is embedding else owner
    plain = type(owner) in (nn.Linear, nn.Embedding) and "bias" not in owner
    return Head(product, scale, softcap, owner.weight if plain else None)


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


def is_head_frozen(model: nn.Module) -> bool:
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
