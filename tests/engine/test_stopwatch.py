"""Timing within a budget, without a trace in model, random numbers and memory counters."""

import gc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.clock import FakeClock
from helpers.steps import model_with_lora, weights
from mlx.utils import tree_map

from mlx_simpo.engine.stopwatch import Measurement, Stopwatch, memory_in_use, undisturbed


def test_work_that_does_not_fit_is_not_begun() -> None:
    clock = FakeClock()
    watch = Stopwatch(3.0, clock)
    assert watch.measure(clock.work(1.0), 3.1) is None
    assert (clock.now, watch.left, watch.elapsed) == (0.0, 3.0, 0.0)


def test_quick_work_is_repeated_and_the_quicker_of_the_two_counts() -> None:
    clock, runs = FakeClock(), iter([0.5, 0.25])

    def work() -> list:
        clock.now += next(runs)
        return []

    assert Stopwatch(3.0, clock).measure(work, 0.5) == Measurement(0.25, 0)
    assert clock.now == 0.75


def test_slow_work_runs_once() -> None:
    clock = FakeClock()
    clock.now = 7.0
    watch = Stopwatch(3.0, clock)
    assert watch.measure(clock.work(1.0), 1.0) == Measurement(1.0, 0)
    assert (clock.now, watch.elapsed, watch.left) == (8.0, 1.0, 2.0)


def test_new_work_runs_once_before_it_counts_if_there_is_time_for_both() -> None:
    clock, runs = FakeClock(), iter([2.0, 1.0])

    def work() -> list:
        clock.now += next(runs)
        return []

    watch = Stopwatch(5.0, clock)
    assert watch.measure(work, 2.6, is_new=True) is None
    assert clock.now == 0.0
    assert watch.measure(work, 2.5, is_new=True) == Measurement(1.0, 0)
    assert clock.now == 3.0


def test_new_work_whose_first_run_leaves_no_time_does_not_count() -> None:
    clock = FakeClock()
    assert Stopwatch(5.0, clock).measure(clock.work(4.0), 2.0, is_new=True) is None
    assert clock.now == 4.0


def test_a_part_ends_before_the_whole() -> None:
    clock = FakeClock()
    watch = Stopwatch(4.0, clock)
    clock.now = 2.0
    part = watch.part(0.25)
    assert part.measure(clock.work(0.5), 0.6) is None
    assert part.measure(clock.work(0.5), 0.5) == Measurement(0.5, 0)
    assert (part.left, watch.left) == (0.0, 1.5)
    assert watch.part(0.5).left == 0.75


def test_memory_is_that_of_the_peak_beyond_what_was_there() -> None:
    there = mx.arange(10**6) + 1.0
    mx.eval(there, mx.zeros(10**7))  # an earlier peak is another's
    measured = Stopwatch(60.0, FakeClock()).once(lambda: there + 1.0)
    assert measured.bytes == pytest.approx(4e6, rel=0.01)


def test_weights_mode_random_numbers_and_peak_are_as_if_nothing_had_run() -> None:
    model = model_with_lora()
    model.eval()
    before, random = weights(model), np.array(mx.random.state[0])  # type: ignore[index]

    def disturb() -> None:
        with undisturbed(model):
            model.train()
            model.update(tree_map(lambda p: p + 1, model.trainable_parameters()))
            mx.eval(mx.random.normal((10**6,)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disturb()
    assert not model.training
    assert all((value == before[name]).all() for name, value in weights(model).items())
    np.testing.assert_array_equal(np.array(mx.random.state[0]), random)  # type: ignore[index]
    assert mx.get_peak_memory() <= mx.get_active_memory()
    assert mx.get_cache_memory() == 0


def test_arrays_in_reference_cycles_are_freed_before_it_begins() -> None:
    """And not in the middle of a measurement, whose memory would seem to be less."""
    cycle: list[Any] = [mx.zeros(10**6)]
    mx.eval(cycle)
    cycle.append(cycle)
    before = memory_in_use()
    gc.disable()
    try:
        del cycle
        with undisturbed(model_with_lora()):
            assert memory_in_use() < before - 10**6
    finally:
        gc.enable()
