"""Each epoch takes every pair once, in an order that depends on seed and epoch alone."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.order import epoch_steps, steps_per_epoch

EPOCH = (st.integers(0, 50), st.integers(1, 30))


def epoch(count: int, step_pairs: int, seed: int = 1, number: int = 0) -> list[list[int]]:
    """The pair indices of an epoch, step by step."""
    return [step.tolist() for step in epoch_steps(count, step_pairs, seed, number)]


def flat(steps: list[list[int]]) -> list[int]:
    return [index for step in steps for index in step]


@given(*EPOCH, st.integers(0, 5))
@settings(deadline=None, max_examples=80)
def test_every_pair_occurs_once_per_epoch(count: int, size: int, number: int) -> None:
    assert Counter(flat(epoch(count, size, number=number))) == Counter(range(count))


@given(*EPOCH)
@settings(deadline=None, max_examples=80)
def test_all_steps_are_full_but_the_last(count: int, size: int) -> None:
    """No pair is dropped, and none is repeated to fill a step."""
    steps = epoch(count, size)
    assert len(steps) == steps_per_epoch(count, size)
    assert [len(step) for step in steps] == [size] * (count // size) + [count % size] * (
        count % size > 0
    )


@given(*EPOCH, st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_the_same_seed_and_epoch_give_the_same_order(count: int, size: int, seed: int) -> None:
    assert epoch(count, size, seed) == epoch(count, size, seed)


def test_each_seed_and_epoch_has_its_own_order() -> None:
    # (1, 0) and (0, 1) differ, too: the order does not depend on seed + epoch.
    orders = {tuple(flat(epoch(40, 1, seed, n))) for seed in range(4) for n in range(4)}
    assert len(orders) == 16
    assert tuple(range(40)) not in orders


def test_the_order_does_not_depend_on_numpys_global_state() -> None:
    np.random.seed(0)
    first = epoch(30, 4)
    np.random.seed(1)
    assert epoch(30, 4) == first


def test_every_pair_is_equally_likely_in_the_first_step() -> None:
    first = Counter(i for seed in range(400) for i in epoch(10, 2, seed)[0])
    assert sum(first.values()) == 800
    # Each is expected 80 times, with a standard deviation of 8.
    assert all(48 <= first[i] <= 112 for i in range(10))


def test_no_pairs_no_steps() -> None:
    assert epoch(0, 4) == []
    assert steps_per_epoch(0, 4) == 0
