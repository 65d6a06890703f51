"""Least squares over micro-batches that fit into a budget: what a pass and a position cost."""

import math

import pytest
from helpers.clock import FakeClock
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.engine.pass_timing import (
    SIZES,
    SMALL,
    PassTiming,
    costs_at_ratio,
    fit,
    time_passes,
)
from mlx_simpo.engine.stopwatch import Measurement, Stopwatch
from mlx_simpo.engine.trial_shapes import Lengths, Shape, shape_of

TYPICAL = Lengths(64, 128)
LENGTHS = st.builds(Lengths, st.integers(2, 300), st.integers(2, 300))


def timing(positions: int, seconds: float, passes: int = 2) -> PassTiming:
    shape = shape_of(positions, TYPICAL)._replace(passes=passes)
    return PassTiming(shape, Measurement(seconds, 0))


def timed(
    pass_s: float,
    position_s: float,
    budget_s: float = 1e9,
    lengths: Lengths = TYPICAL,
    max_positions: int = SIZES[-1],
    position_bytes: int = 0,
    free_bytes: float = math.inf,
) -> tuple[list[PassTiming], float]:
    """What is timed where passes and positions cost so much, and the seconds that it takes."""
    clock = FakeClock()

    def seconds(shape: Shape) -> float:
        return pass_s * shape.passes + position_s * shape.positions

    class Watch(Stopwatch):
        def once(self, work):
            measured = super().once(work)
            return measured._replace(bytes=round(position_bytes * measured.seconds / position_s))

    watch = Watch(budget_s, clock)
    small_s = seconds(shape_of(min(SMALL, max_positions), lengths))
    timings = time_passes(
        watch, lambda s: clock.work(seconds(s)), lengths, small_s, max_positions, free_bytes
    )
    return timings, clock.now


# --- the line through them -------------------------------------------------------------------


@given(st.floats(1e-5, 1.0), st.floats(1e-7, 1e-2))
@settings(deadline=None)
def test_the_least_squares_are_the_costs_that_were_planted(
    pass_s: float, position_s: float
) -> None:
    timings, _ = timed(pass_s, position_s)
    assert len({t.shape.positions for t in timings if t.shape.passes == 2}) == 3
    costs = fit(timings)
    assert costs is not None
    assert costs.pass_s == pytest.approx(pass_s, rel=1e-6)
    assert costs.position_s == pytest.approx(position_s, rel=1e-6)
    assert costs.seconds(3, 100) == pytest.approx(3 * pass_s + 100 * position_s)


def test_each_measurement_counts_by_its_relative_error() -> None:
    """A tenth more in the largest is much more than a pass: without weights, hardly anything would
    be left of its cost."""
    timings = [timing(64, 0.00084), timing(320, 0.0034), timing(3840, 0.0386 * 1.1)]
    costs = fit(timings)
    assert costs is not None
    assert costs.pass_s == pytest.approx(1e-4, rel=0.3)
    assert costs.position_s == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize(
    "timings",
    [
        [],
        [timing(64, 0.1)],
        [timing(64, 0.1), timing(64, 0.12, passes=3)],
        [timing(64, 0.1), timing(640, 0.05)],  # b < 0
        [timing(64, 0.1), timing(640, 2.0)],  # a < 0
        [timing(64, 0.1), timing(640, math.nan)],
        [timing(64, 0.1), timing(640, math.inf)],
        [timing(64, 0.0), timing(640, 0.0)],
    ],
)
def test_measurements_without_a_line_give_none(timings: list[PassTiming]) -> None:
    assert fit(timings) is None


def test_one_measurement_is_divided_at_the_ratio_that_is_known() -> None:
    costs = costs_at_ratio(timing(64, 0.96), 16)
    assert costs.pass_s == pytest.approx(0.16)
    assert costs.position_s == pytest.approx(0.01)


# --- the budget ------------------------------------------------------------------------------


@given(st.floats(0, 0.3), st.floats(1e-6, 0.03), st.floats(0, 10), LENGTHS, st.sampled_from(SIZES))
@settings(deadline=None, max_examples=200)
def test_the_budget_is_never_exceeded(
    pass_s: float, position_s: float, budget_s: float, lengths: Lengths, max_positions: int
) -> None:
    timings, seconds = timed(pass_s, position_s, budget_s, lengths, max_positions)
    assert seconds <= budget_s
    assert all(t.shape.positions <= max_positions for t in timings)


@pytest.mark.parametrize(
    ("budget_s", "sizes"),
    [
        (0.5, []),  # a large model on a small machine: 64 positions take 0.66 s
        (1.5, [64]),
        (3.0, [64, 128]),
        (20.0, [64, 63, 320]),
        (500.0, [64, 63, 320, 3840]),
    ],
)
def test_a_larger_budget_measures_larger_sizes(budget_s: float, sizes: list[int]) -> None:
    timings, _ = timed(0.01, 0.01, budget_s)
    assert [t.shape.positions for t in timings] == pytest.approx(sizes, abs=4)


def test_nothing_runs_that_will_not_fit_into_memory() -> None:
    """A position takes 1 MB, and half of 1 GB may be used."""
    timings, _ = timed(1e-9, 1e-5, position_bytes=10**6, free_bytes=1e9)
    assert max(t.shape.positions for t in timings) == 320
