"""A forward pass in which several continuations share one prefix, gradients through it included.

mlx-lm's models read keys and values through a cache object. A `Layer` puts those it was given in
front and remembers the whole; what it holds are ordinary arrays of the graph, and no two passes
share a `Layer`.

Long sequences run in segments, each on top of those before it: attention's scores are then at most
SEGMENT × length at a time and memory grows with the length, not with its square. (MLX's attention
has a fused forward pass on GPUs only and a fused gradient nowhere: else all scores are made.)
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

SEGMENT = 512


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
    layers = [Layer() for _ in range(cache_layers(model))]
    if tokens.shape[1]:
        run_segments(model, tokens, layers)
    return layers


def run_continuations(
    model: nn.Module, tokens: mx.array, prefix: Sequence[Layer], owner: mx.array
) -> mx.array:
    """Hidden rows [n, T, D] of tokens [n, T] that follow the prefixes ``owner`` [n]."""
    layers = [Layer(*(array[owner] for array in layer.arrays())) for layer in prefix]
    return run_segments(model, tokens, layers)


def run_segments(model: nn.Module, tokens: mx.array, layers: list[Layer]) -> mx.array:
    """Hidden rows [n, T, D] of tokens [n, T] behind what ``layers`` hold, which then hold them."""
    segments = mx.split(tokens, cuts(tokens.shape[1], SEGMENT), axis=1)
    hidden = [model.model(segment, cache=layers) for segment in segments]  # type: ignore[operator]
    return hidden[0] if len(hidden) == 1 else mx.concatenate(hidden, axis=1)


def cuts(length: int, size: int) -> list[int]:
    """Where to cut a length into the fewest parts of at most ``size``, as even as can be."""
    parts = -(-length // size)
    return [length * part // parts for part in range(1, parts)]


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
