"""What a forward pass with its gradient costs: seconds = a · passes + b · positions.

The micro-batches that are timed are those of training, prefix and continuations, in two or three
sizes. They score two tokens per pair, so that b is the trunk's alone: padding never reaches the
head (`head_timing` measures that).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .stopwatch import Measurement, Stopwatch, Work
from .trial_shapes import Lengths, Shape, shape_of

SMALL = 64  # positions: quick with the largest models, and tells what more would take
SIZES = (128, 256, 512, 1024, 2048, 4096)
# A CPU is kept busy by the second size at the latest. A GPU may not be: the third is to be as large
# as possible.
SECOND_AT_MOST = 512
# Attention grows with the square of the length, and a machine has other things to do.
MARGIN = 1.3
# Of the memory that is free, how much a micro-batch may take while it is timed.
MEMORY_SHARE = 0.5
# Of what is left of the budget, how much a third pass of the smallest size may take: it tells the
# cost of a pass more directly, but a second size is needed more.
UNEVEN_SHARE = 0.2


class PassTiming(NamedTuple):
    """What a micro-batch of this shape has taken."""

    shape: Shape
    measured: Measurement


class PassCosts(NamedTuple):
    """Seconds of a pass and of a position, gradients included."""

    pass_s: float
    position_s: float

    def seconds(self, passes: int, positions: int) -> float:
        """Return what a micro-batch takes, without its head."""
        return self.pass_s * passes + self.position_s * positions


def time_passes(
    watch: Stopwatch,
    work_of: Callable[[Shape], Work],
    lengths: Lengths,
    small_s: float,
    max_positions: int,
    free_bytes: float,
) -> list[PassTiming]:
    """Time micro-batches of two or three sizes as far as the budget goes, the smallest first.

    Args:
        work_of: shape → value and gradient of such a micro-batch, which has run in the smallest
            shape before: a first run compiles kernels.
        lengths: of the run's typical pair. small_s: what the smallest takes, at most.
        max_positions: of a micro-batch of the run.
        free_bytes: memory that MLX can still use.

    Returns:
        What was timed; nothing if even the smallest does not fit.
    """
    small = shape_of(min(SMALL, max_positions), lengths)
    timings: list[PassTiming] = []

    def time(shape: Shape, expected_s: float) -> None:
        measured = watch.measure(work_of(shape), expected_s)
        if measured is not None:
            timings.append(PassTiming(shape, measured))

    time(small, small_s)
    if not timings:
        return []
    uneven_s = 1.5 * timings[0].measured.seconds
    if uneven_s <= UNEVEN_SHARE * watch.left:
        time(small._replace(passes=3), uneven_s)
    for largest in (SECOND_AT_MOST, SIZES[-1]):
        expected = {
            size: _expected(timings, shape_of(size, lengths))
            for size in reversed(SIZES)
            if 2 * timings[-1].shape.positions <= size <= min(largest, max_positions)
        }
        quick = {
            size: e.seconds
            for size, e in expected.items()
            if e.bytes <= MEMORY_SHARE * free_bytes and e.seconds <= watch.left
        }
        # The largest for which there is time to repeat it; or, if there is for none, to run it.
        twice = [size for size, seconds in quick.items() if 2 * seconds <= watch.left]
        for size in (twice or [*quick])[:1]:
            time(shape_of(size, lengths), quick[size])
    return timings


def _expected(timings: Sequence[PassTiming], shape: Shape) -> Measurement:
    """Return the most that a larger micro-batch should take."""
    last = max(timings, key=lambda t: t.shape.positions)
    factor = MARGIN * shape.positions / last.shape.positions
    # In proportion until two sizes show what does not grow.
    seconds, costs = factor * last.measured.seconds, fit(timings)
    if costs is not None:
        seconds = min(seconds, MARGIN * costs.seconds(shape.passes, shape.positions))
    return Measurement(seconds, round(factor * last.measured.bytes))


def fit(timings: Sequence[PassTiming]) -> PassCosts | None:
    """Return the least squares of seconds = a · passes + b · positions, relative to the seconds.

    None if there is no such line: too few sizes, or a time that is not finite, or one that does
    not grow with the positions (b ≤ 0), or one that would be less without passes (a < 0).
    """
    seconds = np.array([t.measured.seconds for t in timings])
    if not (has_two_sizes(timings) and np.isfinite(seconds).all() and (seconds > 0).all()):
        return None
    positions, passes = np.array([(t.shape.positions, t.shape.passes) for t in timings]).T
    # Divided by the seconds: a measurement is off by some share of itself.
    matrix = np.stack([passes, positions], axis=1) / seconds[:, None]
    (pass_s, position_s), *_ = np.linalg.lstsq(matrix, np.ones(len(timings)))
    if position_s <= 0 or pass_s < -0.5 * position_s:  # less than half a position is rounding
        return None
    return PassCosts(max(0.0, float(pass_s)), float(position_s))


def has_two_sizes(timings: Sequence[PassTiming]) -> bool:
    """Return whether the numbers of positions differ enough to tell what one costs."""
    positions = [t.shape.positions for t in timings]
    return max(positions, default=0) >= 1.5 * min(positions, default=1)


def costs_at_ratio(timing: PassTiming, pass_cost: int) -> PassCosts:
    """Return the costs that one measurement shows if a pass costs as much as so many positions."""
    shape = timing.shape
    position_s = timing.measured.seconds / (shape.positions + pass_cost * shape.passes)
    return PassCosts(pass_cost * position_s, position_s)
