"""A forward pass in which several continuations share one prefix, gradients through it included.

mlx-lm's models read keys and values through a cache object. A `Layer` puts those it was given in
front and remembers the whole; what it holds are ordinary arrays of the graph, and no two passes
share a `Layer`.
"""

import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from .attention import attention


class Layer:
    """What mlx-lm's attention asks of a cache: offset, update_and_fetch, make_mask.

    keys, values: [n, heads, positions, D] of what comes before, then of all that has run.
    """

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None) -> None:
        self.keys, self.values = keys, values

    @property
    def offset(self) -> int:
        """Positions before the ones that run now."""
        return 0 if self.keys is None else self.keys.shape[2]

    def arrays(self) -> tuple:
        """The keys and values it has, for a function that must name its inputs and outputs."""
        return () if self.keys is None else (self.keys, self.values)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """All keys and values up to the new ones."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            self.keys = mx.concatenate([self.keys, keys], axis=2)
            self.values = mx.concatenate([self.values, values], axis=2)
        return self.keys, self.values

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The causal mask of n new positions behind ``offset`` old ones."""
        if return_array or (window_size is not None and self.offset + n > window_size):
            return create_causal_mask(n, self.offset, window_size=window_size)
        return None if n == 1 else "causal"


def run_prefix(model: nn.Module, tokens: mx.array) -> list[Layer]:
    """Keys and values of a prefix, tokens [B, P]; P may be 0."""
    patched_attention(model)
    layers = [Layer() for _ in range(cache_layers(model))]
    if tokens.shape[1]:
        model.model(tokens, cache=layers)  # type: ignore[operator]
    return layers


def run_continuations(
    model: nn.Module, tokens: mx.array, prefix: Sequence[Layer], owner: mx.array
) -> mx.array:
    """Hidden rows [n, T, D] of tokens [n, T] that follow the prefixes ``owner`` [n]."""
    layers = [Layer(*(array[owner] for array in layer.arrays())) for layer in prefix]
    return model.model(tokens, cache=layers)  # type: ignore[operator]


def patched_attention(model: nn.Module) -> None:
    """Let ``model``'s blocks take `attention` where they run on a `Layer`.

    mlx-lm's model files import one function by name and hand it the cache; in the files of this
    model's blocks, the name leads to `_attention` from now on. Models that form their scores
    themselves (Gemma 2's softcap) go on doing so.
    """
    for file in {type(module).__module__ for module in model.layers[0].modules()}:  # type: ignore
        names = vars(sys.modules[file])
        if names.get("scaled_dot_product_attention") is scaled_dot_product_attention:
            names["scaled_dot_product_attention"] = _attention


def _attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """`attention` on a `Layer`; mlx-lm's own with any other cache, with sinks, and with a mask that
    is more than booleans [T, S] (one that is added may have a gradient)."""
    plain = mask is None or isinstance(mask, str) or (mask.dtype == mx.bool_ and mask.ndim == 2)
    if isinstance(cache, Layer) and sinks is None and plain:
        return attention(queries, keys, values, scale, mask)
    return scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)  # type: ignore


def cache_layers(model: nn.Module) -> int:
    """How many layers read a cache."""
    return len(make_prompt_cache(model))


def reason_not_shareable(model: nn.Module) -> str | None:
    """Why the prefix cannot be shared in this model; None where it can."""
    kinds: set[Any] = {type(layer) for layer in make_prompt_cache(model)}
    others = sorted(kind.__name__ for kind in kinds - {KVCache, RotatingKVCache})
    if others:
        return f"its layers keep a state that cannot be forked ({', '.join(others)})"
    if not callable(getattr(model, "model", None)):
        return "its trunk and its head are not told apart"
    return None
