"""A forward pass in which several continuations share one prefix, gradients through it included.

mlx-lm's models read keys and values through a cache object. `Recorded` hands out what it is given
and keeps it; `Forked` puts the recorded prefix in front. Neither is ever changed after its one
layer has called it, and what they hold are ordinary arrays of the graph.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache


class Layer:
    """What mlx-lm's attention asks of a cache: offset, update_and_fetch, make_mask."""

    offset = 0

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None) -> None:
        self.keys, self.values = keys, values

    def arrays(self) -> tuple:
        """The keys and values it has, for a function that must name its inputs and outputs."""
        return () if self.keys is None else (self.keys, self.values)

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The causal mask of n new positions behind ``offset`` old ones."""
        if return_array or (window_size is not None and self.offset + n > window_size):
            return create_causal_mask(n, self.offset, window_size=window_size)
        return None if n == 1 else "causal"


class Recorded(Layer):
    """The prefix's keys and values of one layer, [B, heads, P, D], once it has run."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


class Forked(Layer):
    """One layer's view of n continuations; the keys and values of each one's prefix come first,
    [n, heads, P, D]."""

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None) -> None:
        super().__init__(keys, values)
        self.offset = 0 if keys is None else keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is None or self.values is None:
            return keys, values
        return (
            mx.concatenate([self.keys, keys], axis=2),
            mx.concatenate([self.values, values], axis=2),
        )


def run_prefix(model: nn.Module, tokens: mx.array, layers: int) -> list[Recorded]:
    """Keys and values of a prefix, tokens [B, P]; P may be 0."""
    prefix = [Recorded() for _ in range(layers)]
    if tokens.shape[1]:
        model.model(tokens, cache=prefix)  # type: ignore[operator]
    return prefix


def run_continuations(
    model: nn.Module, tokens: mx.array, prefix: list[Recorded], owner: mx.array
) -> mx.array:
    """Hidden rows [n, T, D] of tokens [n, T] that follow the prefixes ``owner`` [n]."""
    layers = [Forked(*(array[owner] for array in layer.arrays())) for layer in prefix]
    return model.model(tokens, cache=layers)  # type: ignore[operator]


def cache_layers(model: nn.Module) -> int:
    """How many layers read a cache."""
    return len(make_prompt_cache(model))


def why_not_shared(model: nn.Module) -> str | None:
    """Why the prefix cannot be shared in this model; None where it can."""
    kinds: set[Any] = {type(layer) for layer in make_prompt_cache(model)}
    others = sorted(kind.__name__ for kind in kinds - {KVCache, RotatingKVCache})
    if others:
        return f"its layers keep a state that cannot be forked ({', '.join(others)})"
    if not callable(getattr(model, "model", None)):
        return "its trunk and its head are not told apart"
    return None
