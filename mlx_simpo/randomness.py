"""MLX's random state: read, set again, and put aside while something else draws numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np


def random_state() -> np.ndarray:
    """Return MLX's random state, uint32 [2]."""
    return np.array(mx.random.state[0])  # type: ignore[index]


def set_random_state(state: np.ndarray) -> None:
    """Set MLX's random state, uint32 [2]."""
    # mx.random.state cannot be assigned to; seed(n) makes it [n >> 32, n & (2³² − 1)].
    high, low = map(int, state)
    mx.random.seed((high << 32) | low)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let MLX's random numbers be those of ``seed`` in the context, and go on as before after it.

    What draws numbers later, a training for example, does not notice that others were drawn.
    """
    before = random_state()
    mx.random.seed(seed)
    try:
        yield
    finally:
        set_random_state(before)
