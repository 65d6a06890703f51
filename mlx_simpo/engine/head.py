"""How hidden states become logits: a matrix product, a scale and a softcap where that is all that
happens, and otherwise the model's own code, run on hidden states of our choice.
"""

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .trunk import embedding_of, text_model, trunk_path


class Head(NamedTuple):
    """How a model's logits follow from its raw logits.

    logits = softcap · tanh(scale · raw_logits / softcap), or scale · raw_logits where softcap is 0.

    is_projection: whether raw logits are hidden states through lm_head (or the tied embedding).
        Otherwise they are what the model's own code returns, and scale and softcap have no effect.

    A head holds no weights: it stays valid when they train, or when lm_head gets LoRA.
    """

    scale: float
    softcap: float
    is_projection: bool

    def raw_logits(self, model: nn.Module, hidden: mx.array) -> mx.array:
        """Return raw logits [..., V] of hidden states [..., D], in their dtype."""
        if not self.is_projection:
            return model_logits(model, hidden)
        projection = _projection(model)
        return (
            projection(hidden) if "lm_head" in text_model(model) else projection.as_linear(hidden)
        )

    def shifted_raw_logits(self, model: nn.Module, hidden: mx.array, targets: mx.array) -> mx.array:
        """Return raw logits [C, V] of hidden states [C, D], each row shifted by its target's where
        that is more exact. (A shift of a whole row changes none of its log-probabilities.)

        In half precision, rounding the logits is the largest error: near 20, a bfloat16 is off by
        0.06. Shifted within the product, before it is rounded, the logits that count most are near
        0.
        """
        # A softcap is not linear, so it needs the raw logits themselves.
        if self.softcap or not self.is_projection or hidden.dtype == mx.float32:
            return self.raw_logits(model, hidden)
        projection = _projection(model)
        if type(projection) not in (nn.Linear, nn.Embedding) or "bias" in projection:
            return self.raw_logits(model, hidden)  # quantized, LoRA, …: not hidden @ weight.T alone
        weight = projection.weight
        at_target = (hidden.astype(mx.float32) * weight[targets]).sum(axis=-1, keepdims=True)
        return mx.addmm(at_target.astype(hidden.dtype), hidden, weight.T, beta=-1.0)

    def logits(self, model: nn.Module, hidden: mx.array) -> mx.array:
        """Return logits [..., V] of hidden states [..., D], in float32."""
        scaled = self.scale * self.raw_logits(model, hidden).astype(mx.float32)
        return self.softcap * mx.tanh(scaled / self.softcap) if self.softcap else scaled


MODELS_OWN_CODE = Head(scale=1.0, softcap=0.0, is_projection=False)


def resolve_head(model: nn.Module) -> Head:
    """Return the head that ``model``'s settings describe, if a trial confirms it.

    The trial compares a few logits with the model's own. Where they differ, more happens than the
    usual settings say, and the head is `MODELS_OWN_CODE`.
    """
    embedding = embedding_of(model)
    if embedding is None:
        return MODELS_OWN_CODE
    head = _described_head(model)
    hidden = embedding(mx.arange(4))
    # Logits of twice the softcap, or of 20: large enough to tell a softcap from none.
    largest = mx.abs(head.scale * head.raw_logits(model, hidden)).max()
    hidden = (hidden * (2 * (head.softcap or 10.0) / largest)).astype(hidden.dtype)
    expected, actual = model_logits(model, hidden).astype(mx.float32), head.logits(model, hidden)
    tolerance = 1e-5 if hidden.dtype == mx.float32 else 2e-2
    agrees = (mx.abs(actual - expected) <= tolerance * mx.abs(expected).max()).all()
    return head if agrees.item() else MODELS_OWN_CODE


def _described_head(model: nn.Module) -> Head:
    """Return the head that the model's settings describe.

    Cohere multiplies, Granite divides, Gemma and Recurrent Gemma have names of their own.
    """
    settings: Any = getattr(text_model(model), "args", None)
    scale = getattr(settings, "logit_scale", None) or 1.0
    scale /= getattr(settings, "logits_scaling", None) or 1.0
    names = ("final_logit_softcapping", "logits_soft_cap")
    softcap = next(filter(None, (getattr(settings, name, None) for name in names)), 0.0)
    return Head(scale, softcap, is_projection=True)


def _projection(model: Any) -> Any:
    """Return lm_head, or the embedding that is tied to it, as the model has it now."""
    return text_model(model).get("lm_head", embedding_of(model))


def model_logits(model: nn.Module, hidden: mx.array) -> mx.array:
    """Return the logits [..., V] that ``model`` itself makes of its trunk's output [..., D].

    The model's own ``__call__`` runs, with a trunk that returns ``hidden``: tied and untied heads,
    quantized ones, softcaps and logit scales come with it.
    """
    path = trunk_path(model)
    assert path is not None
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    # Nothing is computed from the tokens, but some models ask for their shape.
    logits = _ModelWithHidden(model, path, rows)(mx.zeros(rows.shape[:2], mx.int32))
    return logits.reshape(*hidden.shape[:-1], -1)


def weights_outside_layers(model: nn.Module) -> dict[str, mx.array]:
    """Return the trainable weights that no layer holds, by name.

    They are the final norm's, the head's and the embedding's, which may be one and the same.
    """
    layers = {id(layer) for layer in model.layers}  # type: ignore[union-attr]
    outside = model.filter_and_map(
        nn.Module.trainable_parameter_filter,
        lambda value: None if id(value) in layers else value,
        is_leaf_fn=lambda _module, _name, value: id(value) in layers or isinstance(value, mx.array),
    )
    trainable: Any = tree_flatten(outside)
    return {name: weight for name, weight in trainable if weight is not None}


def is_head_frozen(model: nn.Module) -> bool:
    """Return whether gradients can end at the head's input, as with LoRA in the layers alone."""
    return not weights_outside_layers(model)


class _ModelWithHidden:
    """A model, as its ``__call__`` sees it, whose trunk returns ``hidden`` for every input.

    path: the attributes that lead to the trunk.
    """

    def __init__(self, model: Any, path: tuple[str, ...], hidden: mx.array) -> None:
        self._model, self._path, self._hidden = model, path, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return type(self._model).__call__(self, *args, **kwargs)

    def __contains__(self, name: str) -> bool:
        return name in self._model

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._model, name)
        if name != self._path[0]:
            return attribute
        if path_within := self._path[1:]:
            return _ModelWithHidden(attribute, path_within, self._hidden)
        return _TrunkWithHidden(attribute, self._hidden)


class _TrunkWithHidden:
    """A trunk that returns ``hidden`` and is itself in all other respects."""

    def __init__(self, trunk: nn.Module, hidden: mx.array) -> None:
        self._trunk, self._hidden = trunk, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)
