"""A forward pass in which several continuations share one prefix, gradients through it included.

mlx-lm's models read keys, values and recurrent states through cache objects. Ours hold those of a
prefix as ordinary arrays of the graph, and no two passes share one.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from .attention import CausalMask
from .trunk import run_trunk, trunk_path


class PrefixKVCache:
    """The keys and values of one layer, with the part of mlx-lm's cache interface that its
    attention uses: offset, update_and_fetch and make_mask.

    keys, values: [n, heads, positions, D], of the prefix; after update_and_fetch, of all positions.
    start_position: the first position that is there, for models with chunked attention (Llama 4).
    """

    start_position = 0

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None) -> None:
        self.keys, self.values = keys, values

    @property
    def offset(self) -> int:
        """The number of positions before those that run now."""
        return 0 if self.keys is None else self.keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append new keys and values [n, heads, T, D] and return all of them."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            self.keys = mx.concatenate([self.keys, keys], axis=2)
            self.values = mx.concatenate([self.values, values], axis=2)
        return self.keys, self.values

    def maybe_trim_front(self) -> None:
        """Do nothing: positions that attention no longer sees are masked."""

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Return the causal mask of n new positions behind ``offset`` old ones."""
        if return_array or (window_size is not None and self.offset + n > window_size):
            return create_causal_mask(n, self.offset, window_size=window_size)
        return None if n == 1 else CausalMask()


class PrefixStates(ArraysCache):
    """The recurrent and convolution states of one layer, each [n, …] or None.

    A layer replaces its states and never writes into their arrays, so a copy of the list is a fork.
    """

    def __init__(self, states: Sequence[mx.array | None]) -> None:
        super().__init__(len(states))
        self.cache = list(states)


class PrefixCacheList(CacheList):
    """The caches of a layer that has several, as Falcon-H1's: attention beside a recurrence."""


PrefixCache = PrefixKVCache | PrefixStates | PrefixCacheList


def is_prefix_cache(value: Any) -> TypeGuard[PrefixCache]:
    """Return whether ``value`` is one of ours."""
    return isinstance(value, PrefixKVCache | PrefixStates | PrefixCacheList)


def cache_arrays(cache: PrefixCache) -> Any:
    """Return what a cache holds as a tree of arrays, to pass it to a function or to index it."""
    if isinstance(cache, PrefixKVCache):
        return {} if cache.keys is None else {"keys": cache.keys, "values": cache.values}
    if isinstance(cache, PrefixStates):
        return {str(i): state for i, state in enumerate(cache.cache) if state is not None}
    return [cache_arrays(inner) for inner in cache.caches]


def with_arrays(cache: PrefixCache, arrays: Any) -> PrefixCache:
    """Return a new cache of the same kind that holds ``arrays``, as `cache_arrays` returns them."""
    if isinstance(cache, PrefixKVCache):
        return type(cache)(**arrays)
    if isinstance(cache, PrefixStates):
        return PrefixStates([arrays.get(str(i)) for i in range(len(cache.cache))])
    inner = zip(cache.caches, arrays, strict=True)
    return PrefixCacheList(*(with_arrays(one, part) for one, part in inner))


def without_arrays(cache: PrefixCache) -> PrefixCache:
    """Return a new cache of the same kind that holds nothing."""
    if isinstance(cache, PrefixCacheList):
        return PrefixCacheList(*map(without_arrays, cache.caches))
    return with_arrays(cache, {})


def set_arrays(cache: PrefixCache, arrays: Any) -> None:
    """Let ``cache`` hold ``arrays``, as `cache_arrays` returns them."""
    if isinstance(cache, PrefixKVCache):
        cache.keys, cache.values = arrays.get("keys"), arrays.get("values")
    elif isinstance(cache, PrefixStates):
        cache.cache = [arrays.get(str(i)) for i in range(len(cache.cache))]
    else:
        for inner, part in zip(cache.caches, arrays, strict=True):
            set_arrays(inner, part)


def empty_caches(model: nn.Module) -> list[PrefixCache]:
    """Return a cache of our kind for each that mlx-lm makes for the model.

    Raises:
        TypeError: mlx-lm makes one that holds something else, by its name; see
            `reason_not_shareable`.
    """
    return [_empty(cache) for cache in make_prompt_cache(model)]


def _empty(cache: Any) -> PrefixCache:
    """Return an empty cache of our kind for one of mlx-lm's.

    Raises:
        TypeError: there is none, with the name of mlx-lm's.
    """
    if type(cache) in (KVCache, RotatingKVCache, ChunkedKVCache, ConcatenateKVCache):
        return PrefixKVCache()
    if type(cache) is ArraysCache:
        return PrefixStates([None] * len(cache.cache))
    if type(cache) is CacheList:
        return PrefixCacheList(*map(_empty, cache.caches))
    raise TypeError(type(cache).__name__)


def run_prefix(model: nn.Module, tokens: mx.array) -> list[PrefixCache]:
    """Return each layer's cache after the prefixes ``tokens`` [B, P]; P may be 0."""
    caches = empty_caches(model)
    if tokens.shape[1]:
        run_trunk(model, tokens, caches)
    return caches


def run_first(
    model: nn.Module, tokens: mx.array, prefix_length: int
) -> tuple[mx.array, list[PrefixCache]]:
    """Run prefixes and a continuation of each in one pass, in a model that `can_extend_prefix`.

    Returns:
        The hidden states [B, T, D] of tokens [B, T], and each layer's cache after their first
        ``prefix_length``.
    """
    caches = empty_caches(model)
    hidden = run_trunk(model, tokens, caches)
    # What follows the prefix does not change its keys and values.
    prefix = [
        with_arrays(cache, tree_map(lambda a: a[:, :, :prefix_length], cache_arrays(cache)))
        for cache in caches
    ]
    return hidden, prefix


def can_extend_prefix(model: nn.Module) -> bool:
    """Return whether a prefix may run in one pass with what follows it: if the state after it is
    within the state after the whole, as its keys and values are.

    Raises:
        TypeError: see `empty_caches`.
    """
    return all(map(_is_extendable, empty_caches(model)))


def _is_extendable(cache: PrefixCache) -> bool:
    if isinstance(cache, PrefixCacheList):
        return all(map(_is_extendable, cache.caches))
    return isinstance(cache, PrefixKVCache)


def run_continuations(
    model: nn.Module,
    tokens: mx.array,
    prefix: Sequence[PrefixCache],
    prefix_index: mx.array | None,
) -> mx.array:
    """Return the hidden states [n, T, D] of tokens [n, T], which follow prefixes by index [n].

    Args:
        prefix_index: None: all prefixes in their order, each time as often as there are rows.
    """

    def fork(array: mx.array) -> mx.array:
        # A new array each time: what one continuation appends is not seen by another.
        if prefix_index is not None:
            return array[prefix_index]
        repeats = len(tokens) // len(array)
        if repeats == 1:
            return array[...]
        # Its gradient is a sum, where an index's is a scatter into zeros.
        return mx.broadcast_to(array, (repeats, *array.shape)).reshape(-1, *array.shape[1:])

    caches = [with_arrays(cache, tree_map(fork, cache_arrays(cache))) for cache in prefix]
    if tokens.shape[1] == 1 and any(not isinstance(cache, PrefixKVCache) for cache in prefix):
        # A recurrent layer's step of one token is a kernel without a gradient on Metal.
        return run_trunk(model, mx.pad(tokens, [(0, 0), (0, 1)]), caches)[:, :1]
    return run_trunk(model, tokens, caches)


def reason_not_shareable(model: nn.Module) -> str | None:
    """Return why a prefix cannot be shared in this model; None where it can."""
    if trunk_path(model) is None:
        return "mlx-lm does not separate its trunk from its head"
    try:
        empty_caches(model)
    except TypeError as error:
        return f"its layers keep a state that this engine does not know how to fork ({error})"
    return None
