"""Times work on the device within a budget of seconds, and leaves no trace of it."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from ..randomness import random_state, set_random_state

# Builds a graph and returns the arrays to evaluate.
Work = Callable[[], Any]

# Work is repeated, and the quicker of the two counts, if it takes at most this share of what is
# left: what else the machine does can only slow it down.
REPEATED_SHARE = 0.25

# Times that differ by less are as good as the same, and the one that needs less memory is chosen.
ABOUT_AS_QUICK = 1.05


class Measurement(NamedTuple):
    """What some work has taken: seconds, and bytes of memory at its peak beyond those before."""

    seconds: float
    bytes: int


class Stopwatch:
    """A budget of seconds, and a clock that runs it down from the beginning."""

    def __init__(self, budget_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = clock()
        self._end = self._started + budget_s

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._started

    @property
    def left(self) -> float:
        """Seconds of the budget that are left; negative beyond it."""
        return self._end - self._clock()

    def part(self, share: float) -> "Stopwatch":
        """Return a stopwatch with this share of what is left as its budget."""
        return Stopwatch(share * self.left, self._clock)

    def once(self, work: Work) -> Measurement:
        """Do some work once."""
        before = memory_in_use()
        mx.reset_peak_memory()
        started = self._clock()
        mx.eval(work())
        seconds = self._clock() - started
        return Measurement(seconds, max(0, mx.get_peak_memory() - before))

    def measure(self, work: Work, expected_s: float, *, is_new: bool = False) -> Measurement | None:
        """Do some work, twice if it is quick, and return the quicker; None if the seconds that it
        is expected to take are not left.

        Args:
            is_new: it has arrays of new shapes. A first run, which does not count, allocates their
                buffers and may compile kernels.
        """
        if (1 + is_new) * expected_s > self.left:
            return None
        if is_new:
            self.once(work)
            if expected_s > self.left:
                return None
        first = self.once(work)
        if first.seconds > REPEATED_SHARE * self.left:
            return first
        return min(first, self.once(work))


def memory_in_use() -> int:
    """Return the bytes of all arrays that something refers to."""
    mx.synchronize()  # on a CPU, the thread that computes frees what it has read
    return mx.get_active_memory()


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Leave the model's weights and mode and MLX's random numbers as they were, and its peak of
    memory at 0, as if nothing had run within the context."""
    was_training, weights, random = model.training, model.trainable_parameters(), random_state()
    gc.collect()  # arrays in reference cycles would be freed later, in the middle of a measurement
    try:
        yield
    finally:
        model.update(weights)
        model.train(was_training)
        set_random_state(random)
        mx.clear_cache()
        mx.reset_peak_memory()
