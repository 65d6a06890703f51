"""A forward pass in which several continuations share one prefix, gradients through it included.

mlx-lm's models read keys and values through a cache object. A `PrefixKVCache` puts those of a
prefix in front of the new ones; what it holds are ordinary arrays of the graph, and no two passes
share a `PrefixKVCache`.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from .attention import attention

_ATTENTION_NAME = scaled_dot_product_attention.__name__


class PrefixKVCache:
    """The keys and values of one layer, with the part of mlx-lm's cache interface that its
    attention uses: offset, update_and_fetch and make_mask.

    keys, values: [n, heads, positions, D], of the prefix; after update_and_fetch, of all positions.
    """

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None) -> None:
        self.keys, self.values = keys, values

    @property
    def offset(self) -> int:
        """The number of positions before those that run now."""
        return 0 if self.keys is None else self.keys.shape[2]

    def arrays(self) -> tuple:
        """Return (keys, values), or () if there are none, to pass them to a function as arrays."""
        return () if self.keys is None else (self.keys, self.values)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append new keys and values [n, heads, T, D] and return all of them."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            self.keys = mx.concatenate([self.keys, keys], axis=2)
            self.values = mx.concatenate([self.values, values], axis=2)
        return self.keys, self.values

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Return the causal mask of n new positions behind ``offset`` old ones."""
        if return_array or (window_size is not None and self.offset + n > window_size):
            return create_causal_mask(n, self.offset, window_size=window_size)
        return None if n == 1 else "causal"


def run_prefix(model: nn.Module, tokens: mx.array) -> list[PrefixKVCache]:
    """Return each layer's keys and values of the prefixes ``tokens`` [B, P]; P may be 0."""
    caches = [PrefixKVCache() for _ in make_prompt_cache(model)]
    if tokens.shape[1]:
        model.model(tokens, cache=caches)  # type: ignore[operator]
    return caches


def run_continuations(
    model: nn.Module, tokens: mx.array, prefix: Sequence[PrefixKVCache], prefix_index: mx.array
) -> mx.array:
    """Return the hidden states [n, T, D] of tokens [n, T], which follow prefixes by index [n]."""
    # Indexing copies: what one continuation appends is not seen by another.
    caches = [PrefixKVCache(*(a[prefix_index] for a in cache.arrays())) for cache in prefix]
    return model.model(tokens, cache=caches)  # type: ignore[operator]


def reason_not_shareable(model: nn.Module) -> str | None:
    """Return why a prefix cannot be shared in this model; None where it can."""
    kinds: set[Any] = {type(cache) for cache in make_prompt_cache(model)}
    others = sorted(kind.__name__ for kind in kinds - {KVCache, RotatingKVCache})
    if others:
        return f"its layers keep a state that cannot be forked ({', '.join(others)})"
    if not callable(getattr(model, "model", None)):
        return "mlx-lm does not separate its trunk from its head"
    return None


# --- the patch of mlx-lm's attention -----------------------------------------------------------

# The contexts that hold the patch of a module; without any, it is as mlx-lm wrote it.
_holders: dict[ModuleType, set[object]] = defaultdict(set)
# Re-entrant: garbage collection may end an abandoned context while this thread holds the lock.
_lock = RLock()


def attention_modules(model: nn.Module) -> tuple[ModuleType, ...]:
    """Return the modules that define ``model``'s layers and call mlx-lm's attention by its name.

    Models that compute their scores themselves (Gemma 2, for its softcap) have none.
    """
    layers: Any = model.layers
    names = {type(module).__module__ for layer in layers for module in layer.modules()}
    modules = [sys.modules[name] for name in sorted(names)]
    either = (scaled_dot_product_attention, _attention)  # the second within `patched_attention`
    return tuple(m for m in modules if vars(m).get(_ATTENTION_NAME) in either)


@contextmanager
def patched_attention(modules: Sequence[ModuleType]) -> Iterator[None]:
    """Within the context, let ``modules`` use `attention` where they run on a `PrefixKVCache`.

    mlx-lm's model files import one function by name, ``scaled_dot_product_attention``, and pass it
    the cache. Within the context that name leads to a function that passes every other cache on to
    mlx-lm's; afterwards, also after an exception or Ctrl-C, to mlx-lm's own again. Contexts may be
    nested, overlap, and run in several threads: the last one to end takes the patch away.

    MLX calls Python only while it builds a graph, so the context has to be entered for that and not
    for mx.eval. A function in mx.checkpoint is called again when its gradient's graph is built,
    which is after the forward pass: it has to enter the context itself.

    Args:
        modules: of `attention_modules`.
    """
    holder = object()
    try:
        with _lock:
            for module in modules:
                _holders[module].add(holder)
                vars(module)[_ATTENTION_NAME] = _attention
        yield
    finally:
        with _lock:
            for module in modules:
                _holders[module].discard(holder)
                if not _holders[module]:
                    vars(module)[_ATTENTION_NAME] = scaled_dot_product_attention


def _attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Compute `attention` on a `PrefixKVCache`, and mlx-lm's own with any other cache, with sinks,
    and with a mask that is more than booleans [T, S] (an additive one may have a gradient)."""
    is_plain = mask is None or isinstance(mask, str) or (mask.dtype == mx.bool_ and mask.ndim == 2)
    if isinstance(cache, PrefixKVCache) and sinks is None and is_plain:
        return attention(queries, keys, values, scale, mask)
    return scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)  # type: ignore
