"""Each epoch takes every pair once, in an order that depends on seed and epoch alone; with weights,
it takes of each source as many as its share."""

from collections import Counter
from fractions import Fraction
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.order import EpochOrder, draw_sample, pairs_per_epoch, steps_per_epoch

SAMPLE = [0, 10, 13, 16, 17]  # 5 of 20, seed 42
EPOCH = (st.integers(0, 50), st.integers(1, 30))


def epoch(count: int, step_pairs: int, seed: int = 1, number: int = 0) -> list[list[int]]:
    """The pair indices of an epoch, step by step."""
    length = steps_per_epoch(count, step_pairs)
    steps = EpochOrder([np.arange(count)], None, seed).steps(step_pairs, number * length)
    return [step.tolist() for step in islice(steps, length)]


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
    assert list(EpochOrder([np.arange(0)], None, 1).steps(4)) == []
    assert steps_per_epoch(0, 4) == 0


def test_the_order_of_one_source_is_that_of_the_first_version() -> None:
    """Runs that began with it go on with the same pairs."""
    expected = [
        np.random.default_rng([9, number]).permutation(11)[start : start + 4].tolist()
        for number in range(3)
        for start in (0, 4, 8)
    ]
    assert [step for number in range(3) for step in epoch(11, 4, 9, number)] == expected
    steps = EpochOrder([np.arange(11)], None, 9).steps(4)
    assert [step.tolist() for step in islice(steps, 9)] == expected


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 30))
@settings(deadline=None, max_examples=60)
def test_steps_go_on_where_others_end(count: int, size: int, done: int) -> None:
    order = EpochOrder([np.arange(count)], None, 3)
    whole = [step.tolist() for step in islice(order.steps(size), done + 5)]
    assert [step.tolist() for step in islice(order.steps(size, done), 5)] == whole[done:]


# --- several sources -------------------------------------------------------------------------

SIZES_AND_WEIGHTS = st.lists(
    st.tuples(st.integers(1, 60), st.one_of(st.integers(1, 9), st.floats(0.01, 50))),
    min_size=1,
    max_size=4,
)


def mixed(sizes: list[int], weights: list[float] | None, seed: int = 1) -> EpochOrder:
    """The order of sources of these sizes, one after the other."""
    ends = np.cumsum(sizes)
    groups = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return EpochOrder(groups, weights, seed)


def by_source(order: EpochOrder, number: int) -> list[list[int]]:
    """The pairs of an epoch, those of each source in ascending order."""
    taken = set(order.epoch(number).tolist())
    return [sorted(taken & set(group.tolist())) for group in order.groups]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([1000, 1000], [1, 1], [1000, 1000]),
        ([1000, 100], [1, 1], [100, 100]),
        ([1000, 100, 500], [2, 1, 1], [200, 100, 100]),
        ([1000, 100], [9, 1], [900, 100]),
        ([10, 1000], [0.5, 0.25], [10, 5]),
        ([3, 3], [1000, 1], [3, 1]),  # 1, and not 0.003
        ([7], [0.3], [7]),
    ],
)
def test_the_pairs_of_an_epoch_by_hand(
    sizes: list[int], weights: list[float], expected: list[int]
) -> None:
    assert pairs_per_epoch(sizes, weights) == expected
    assert mixed(sizes, weights).counts == expected
    with pytest.raises(ValueError, match="argument 2 is"):  # each source has its weight
        pairs_per_epoch([*sizes, 3], weights)


@given(SIZES_AND_WEIGHTS)
@settings(deadline=None, max_examples=200)
def test_the_shares_are_the_weights(sources: list[tuple[int, float]]) -> None:
    """In exact arithmetic: no source is more than half a pair away from its share, and the one that
    runs out first gives all that it has."""
    sizes, weights = [n for n, _ in sources], [Fraction(w) for _, w in sources]
    counts = pairs_per_epoch(sizes, [w for _, w in sources])
    length = min(n * sum(weights) / w for n, w in zip(sizes, weights, strict=True))
    for size, weight, count in zip(sizes, weights, counts, strict=True):
        exact = length * weight / sum(weights)
        assert 1 <= count <= size
        assert count == 1 or abs(count - exact) <= Fraction(1, 2) + Fraction(1, 10**9)
    assert any(count == size for count, size in zip(counts, sizes, strict=True))


@given(SIZES_AND_WEIGHTS, st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=100)
def test_no_pair_is_repeated_before_a_source_has_run_out(
    sources: list[tuple[int, float]], seed: int
) -> None:
    sizes = [n for n, _ in sources]
    order = mixed(sizes, [w for _, w in sources], seed)
    same = mixed(sizes, [w for _, w in sources], seed)
    epochs = [by_source(order, number) for number in range(6)]
    for number, parts in enumerate(epochs):
        assert [len(part) for part in parts] == order.counts
        taken = order.epoch(number).tolist()
        assert len(set(taken)) == len(taken) == order.num_pairs
        assert same.epoch(number).tolist() == taken
    for source, (size, count) in enumerate(zip(sizes, order.counts, strict=True)):
        blocks = size // count
        for turn in range(0, 6 - blocks + 1, blocks):
            pairs = [i for parts in epochs[turn : turn + blocks] for i in parts[source]]
            assert len(set(pairs)) == len(pairs) == blocks * count


def test_a_source_is_drawn_anew_when_it_has_run_out() -> None:
    order = mixed([20, 5], [1, 1])
    turns = [tuple(map(tuple, [by_source(order, n)[0] for n in range(t, t + 4)])) for t in (0, 4)]
    assert sorted(i for block in turns[0] for i in block) == list(range(20))
    assert sorted(i for block in turns[1] for i in block) == list(range(20))
    assert turns[0] != turns[1]


def test_the_order_of_several_sources_is_that_of_the_first_version() -> None:
    """Restated: runs that began with it go on with the same pairs."""
    order = EpochOrder([np.array([5, 0, 3, 7, 2, 8]), np.array([1, 4, 6])], [1.0, 1.5], 9)
    assert order.counts == [2, 3]
    for number in range(7):
        blocks = []
        for source, (group, count) in enumerate(zip(order.groups, order.counts, strict=True)):
            turn, block = divmod(number, len(group) // count)
            drawn = np.random.default_rng([9, source, turn, 1]).permutation(group)
            blocks.append(drawn[block * count :][:count])
        expected = np.random.default_rng([9, number]).permutation(np.concatenate(blocks))
        assert order.epoch(number).tolist() == expected.tolist()


def test_the_sources_of_an_epoch_are_shuffled_together() -> None:
    """Every position is as likely to have a pair of one source as of the other."""
    first = Counter(int(mixed([40, 10], [1, 1], seed).epoch(0)[0]) >= 40 for seed in range(400))
    assert 150 <= first[True] <= 250  # expected 200, with a standard deviation of 10


def test_every_pair_of_a_source_is_equally_likely_to_be_drawn() -> None:
    drawn = Counter(i for seed in range(400) for i in by_source(mixed([10, 2], [1, 1], seed), 0)[0])
    assert sum(drawn.values()) == 800
    assert all(48 <= drawn[i] <= 112 for i in range(10))


def test_which_pairs_are_drawn_does_not_decide_where_they_come() -> None:
    """The generators of a source's pairs and of an epoch's order are not the same one."""
    ranks = []
    for seed in range(300):
        order = mixed([4, 4], [1, 1], seed)
        drawn = np.random.default_rng([seed, 0]).permutation(4)
        ranks.append(int(np.flatnonzero(order._block(0, 4, 0) == drawn[0])[0]))
    assert max(Counter(ranks).values()) < 120  # of 300; always 0 with one generator


def test_without_weights_every_pair_of_every_source_is_taken() -> None:
    order = mixed([5, 3, 4], None)
    assert order.counts == [5, 3, 4]
    assert order.epoch(2).tolist() == np.random.default_rng([1, 2]).permutation(12).tolist()


@given(st.integers(1, 200), st.data())
@settings(deadline=None, max_examples=60)
def test_a_sample_is_ascending_and_without_repetition(count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, count))
    sample = draw_sample(count, size, 5).tolist()
    assert len(set(sample)) == size
    assert sample == sorted(sample) == draw_sample(count, size, 5).tolist()
    assert set(sample) <= set(range(count))


def test_samples_depend_on_the_seed_and_take_all_alike() -> None:
    drawn = Counter(i for seed in range(400) for i in draw_sample(10, 2, seed).tolist())
    assert all(48 <= drawn[i] <= 112 for i in range(10))


def test_sources_of_one_size_are_not_drawn_alike() -> None:
    """Parallel sources, the same prompts with other responses, would be drawn in pairs."""
    order = EpochOrder([np.arange(100), np.arange(100, 200)], [1.0, 1.0], 3)
    first, second = (order._block(source, 100, 0) for source in (0, 1))
    assert (first != second - 100).any()


@pytest.mark.parametrize("sizes", [(7,), (3, 8), (1, 9, 40)])
@pytest.mark.parametrize("weights", [(1e-6, 1.0, 1e6), (1e6, 1e6, 1e-6), (3.0, 1.0, 2.0)])
def test_a_weighted_run_goes_on_at_any_step(
    sizes: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    """Two epochs and a bit, resumed after each of their steps; shares of any size."""
    starts = np.cumsum([0, *sizes])
    groups = [np.arange(a, b) for a, b in pairwise(starts.tolist())]
    order = EpochOrder(groups, weights[: len(sizes)], 5)
    assert all(1 <= n <= size for n, size in zip(order.counts, sizes, strict=True))
    total = 2 * steps_per_epoch(order.num_pairs, 3) + 1
    whole = [step.tolist() for step in islice(order.steps(3), total)]
    for done in range(total):
        rest = islice(order.steps(3, done), total - done)
        assert [step.tolist() for step in rest] == whole[done:]
    for number in (0, 1):
        epoch = order.epoch(number).tolist()
        assert [len(set(epoch) & set(group.tolist())) for group in groups] == order.counts


def test_a_sample_stays_the_same_and_is_not_the_beginning_of_an_epoch() -> None:
    """Recorded: a resumed run draws it again, perhaps with a later version."""
    assert draw_sample(20, 5, 42).tolist() == SAMPLE
    epoch = EpochOrder([np.arange(20)], None, 42).epoch(0)
    assert set(SAMPLE) != set(epoch[:5].tolist())
