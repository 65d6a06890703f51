"""The limits of MLX's memory that the settings memory.* name, checked against the machine.

What MLX 0.32.4 makes of them, by its source (mlx/backend/*/allocator.cpp, mlx/transforms.cpp):

- Memory limit: no allocation fails for it. As long as more is in use, MLX submits no further work
  before earlier work has ended, so that fewer results are in memory ahead of time, and on Metal and
  CUDA it gives freed buffers back first. Its own is 1.5 times what Metal recommends, at most 95 %
  of the machine's memory; 95 % of it on CUDA, and 80 % on a CPU.
- Cache limit: freed buffers that are kept for later arrays, the least recently used given back
  first. Its own is the memory limit on a GPU, so that the cache of a training, whose shapes vary,
  takes whatever the machine has; 32 MiB on a CPU.
- Wired limit: bytes that macOS may not page out (version 15 and later). Metal refuses more than it
  recommends; without Metal there is no such limit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx

from ..config.sections import MemoryConfig
from ..device import device_memory_bytes, recommended_memory_bytes
from ..errors import InvalidSettingsError

# Of the cache, where nothing is set and MLX's own limit is above it: enough for the arrays of one
# layer's backward pass, and a machine of 8 GB can be used for other things meanwhile.
DEFAULT_CACHE_BYTES = 10**9


class _Limits(NamedTuple):
    """Limits in bytes; None: stays as it is."""

    memory: int | None
    cache: int | None
    wired: int | None


@contextmanager
def memory_limits(settings: MemoryConfig) -> Iterator[None]:
    """Within the context, MLX's limits are those of the settings, and afterwards what they were.

    Raises:
        InvalidSettingsError: settings beyond what the machine has; it tells all of them.
    """
    before = set_memory_limits(settings)
    try:
        yield
    finally:
        mx.synchronize()  # what is wired must not change while something runs
        _set(before)


def set_memory_limits(settings: MemoryConfig) -> _Limits:
    """Set MLX's limits for the rest of the process.

    Where a setting is null, MLX's memory limit stays, its cache limit is at most
    DEFAULT_CACHE_BYTES, and what Metal recommends is wired, so that macOS does not page weights out
    between two steps.

    Returns:
        The limits before.

    Raises:
        InvalidSettingsError: settings beyond what the machine has; it tells all of them.
    """
    problems = list(_problems(settings))
    if problems:
        raise InvalidSettingsError(problems)
    memory, cache, wired = (
        None if limit is None else bytes_of(limit)
        for limit in (settings.limit_gb, settings.cache_limit_gb, settings.wired_limit_gb)
    )
    before = _set(
        _Limits(
            memory,
            DEFAULT_CACHE_BYTES if cache is None else cache,
            recommended_memory_bytes() if wired is None else wired,
        )
    )
    # What MLX's limit is shows only when another one is set.
    if cache is None and before.cache is not None:
        mx.set_cache_limit(min(before.cache, DEFAULT_CACHE_BYTES))
    return before


def _set(limits: _Limits) -> _Limits:
    """Set limits, and return those before."""
    pairs = zip((mx.set_memory_limit, mx.set_cache_limit, mx.set_wired_limit), limits, strict=True)
    return _Limits(*(None if limit is None else set_limit(limit) for set_limit, limit in pairs))


def _problems(settings: MemoryConfig) -> Iterator[str]:
    """Yield a message for each setting beyond what the machine has."""
    available = device_memory_bytes()
    for name in ("limit_gb", "cache_limit_gb"):
        value = getattr(settings, name)
        if value is not None and bytes_of(value) > available:
            yield (
                f"memory.{name} is {value:g}, but MLX's device has {gigabytes(available)} of "
                "memory; set less, or leave it out"
            )
    value, recommended = settings.wired_limit_gb, recommended_memory_bytes()
    if value and recommended is None:
        yield (
            f"memory.wired_limit_gb is {value:g}, but only Metal on macOS can keep memory from "
            "being paged out, and MLX does not run on Metal here; leave it out, or set 0"
        )
    elif value and recommended is not None and bytes_of(value) > recommended:
        yield (
            f"memory.wired_limit_gb is {value:g}, but Metal allows {recommended / 1e9:.4g}; set "
            "less, or raise what it allows with sudo sysctl iogpu.wired_limit_mb=N"
        )


def bytes_of(limit_gb: float) -> int:
    """Return a limit in GB, of 10⁹ bytes, as a number of bytes."""
    return round(limit_gb * 1e9)


def gigabytes(size: float) -> str:
    """Return a number of bytes in GB, of 10⁹ bytes, with three digits."""
    return f"{size / 1e9:.3g} GB"
