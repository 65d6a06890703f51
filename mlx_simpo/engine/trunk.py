"""Where mlx-lm's model classes keep their trunk: everything between token ids and the head."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

# Names that mlx-lm's classes give their trunk, and the text model within a model of several kinds
# of input, which has a trunk of its own.
_TRUNKS = ("model", "backbone", "transformer")
_TEXT_MODEL = "language_model"
_EMBEDDINGS = ("embed_tokens", "embeddings", "wte", "embedding", "tok_embeddings")


def trunk_path(model: Any) -> tuple[str, ...] | None:
    """Return the attributes that lead from ``model`` to its trunk; None if there is none.

    ("model",) for most, ("backbone",) for Mamba, ("language_model", "model") for Qwen 3.5.
    """
    if callable(getattr(model, _TEXT_MODEL, None)):
        inner = trunk_path(getattr(model, _TEXT_MODEL))
        return None if inner is None else (_TEXT_MODEL, *inner)
    return next(((n,) for n in _TRUNKS if callable(getattr(model, n, None))), None)


def text_model(model: Any) -> Any:
    """Return the module that holds trunk and head: the model, or the text model within it."""
    while callable(getattr(model, _TEXT_MODEL, None)):
        model = getattr(model, _TEXT_MODEL)
    return model


def trunk_of(model: Any) -> Any:
    """Return the trunk of a model that `trunk_path` has one for."""
    path = trunk_path(model)
    assert path is not None
    for name in path:
        model = getattr(model, name)
    return model


def embedding_of(model: Any) -> Any:
    """Return the trunk's embedding of token ids; None if it has none of a known name."""
    trunk = trunk_of(model)
    return next((getattr(trunk, n) for n in _EMBEDDINGS if hasattr(trunk, n)), None)


def run_trunk(model: Any, tokens: mx.array, caches: Sequence[Any]) -> mx.array:
    """Return the hidden states [n, T, D] of tokens [n, T], which follow what the caches hold."""
    return trunk_of(model)(tokens, cache=caches)
