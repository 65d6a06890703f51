"""What could go wrong with the states of a prefix that several passes follow."""

from typing import Any

import mlx.core as mx

from mlx_simpo.engine.prefix_cache import set_arrays


def no_fork(cache: Any, arrays: Any) -> Any:
    """In place of `with_arrays`: the prefix's cache itself, in which one pass leaves its tokens to
    the next."""
    set_arrays(cache, arrays)
    return cache


def overwrite(cache: Any, index: int, value: mx.array) -> None:
    """In place of `PrefixStates.__setitem__`: a write into the state's own array, which everyone
    who holds that array sees."""
    if cache.cache[index] is None or cache.cache[index].shape != value.shape:
        cache.cache[index] = value
    else:
        cache.cache[index][:] = value
