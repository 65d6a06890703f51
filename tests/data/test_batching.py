"""Every pair once an epoch, in a seeded order, in rows whose padding is never scored."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from mlx_simpo.data.batching import (
    PAD_MULTIPLE,
    epoch_steps,
    length_sorted,
    stack,
    steps_per_epoch,
)
from mlx_simpo.data.encode import EncodedPair, Scored
from mlx_simpo.logps import average_logps


def pair(prompt: int, chosen: int, rejected: int, index: int = 0) -> EncodedPair:
    """A pair of so many tokens, none of which is 0 (what padding is)."""
    rng = np.random.default_rng([prompt, chosen, rejected, index])
    sides = (
        Scored(rng.integers(1, 500, prompt + answer).astype(np.int32), prompt)
        for answer in (chosen, rejected)
    )
    return EncodedPair(*sides, index=index)


def pairs(count: int) -> list[EncodedPair]:
    return [pair(1 + i % 5, 1 + (7 * i) % 23, 1 + (5 * i) % 19, i) for i in range(count)]


def epoch(count: int, batch_size: int, accumulation: int, seed: int = 1, number: int = 0) -> list:
    """The indices of an epoch's pairs, as [step][micro-batch][place]."""
    steps = epoch_steps(pairs(count), batch_size, accumulation, seed, number)
    return [[[p.index for p in batch] for batch in step] for step in steps]


def flat(steps: list) -> list[int]:
    return [index for step in steps for batch in step for index in batch]


SIZE = st.integers(1, 40)
PAIRS = st.lists(st.builds(pair, SIZE, SIZE, SIZE), min_size=1, max_size=6)
EPOCH = (st.integers(0, 50), st.integers(1, 7), st.integers(1, 5))


@given(PAIRS)
@settings(deadline=None, max_examples=60)
def test_rows_are_all_chosen_then_all_rejected(given_pairs: list[EncodedPair]) -> None:
    batch = stack(given_pairs)
    assert batch.pairs == tuple(given_pairs)
    sides = [p.chosen for p in given_pairs] + [p.rejected for p in given_pairs]
    rows, starts, ends = batch.tokens.tolist(), batch.start.tolist(), batch.end.tolist()
    assert len(rows) == len(starts) == len(ends) == len(sides)
    for row, start, end, side in zip(rows, starts, ends, sides, strict=True):
        assert row[:end] == side.tokens.tolist()
        assert row[start:end] == side.tokens[side.start :].tolist()
        assert not any(row[end:])


@given(PAIRS)
@settings(deadline=None, max_examples=60)
def test_padding_goes_to_the_next_multiple(given_pairs: list[EncodedPair]) -> None:
    width = stack(given_pairs).tokens.shape[1]
    longest = max(max(len(p.chosen.tokens), len(p.rejected.tokens)) for p in given_pairs)
    assert width % PAD_MULTIPLE == 0
    assert 0 <= width - longest < PAD_MULTIPLE


@pytest.mark.parametrize(("longest", "width"), [(15, 16), (16, 16), (17, 32), (32, 32)])
def test_width(longest: int, width: int) -> None:
    assert stack([pair(1, longest - 1, 1)]).tokens.shape == (2, width)
    assert stack([pair(1, 1, 1), pair(1, 1, longest - 1)]).tokens.shape == (4, width)


def test_everything_is_int32() -> None:
    batch = stack(pairs(2))
    assert {batch.tokens.dtype, batch.start.dtype, batch.end.dtype} == {mx.int32}


def test_padding_is_never_scored() -> None:
    """Whatever stands there, and however much of it."""
    model, batch = tiny_model(), stack(pairs(3))
    expected = average_logps(model, batch.tokens, batch.start, batch.end).tolist()
    padding = mx.arange(batch.tokens.shape[1])[None] >= batch.end[:, None]
    wider = mx.pad(
        mx.where(padding, 7, batch.tokens), [(0, 0), (0, PAD_MULTIPLE)], constant_values=9
    )
    found = average_logps(model, wider, batch.start, batch.end).tolist()
    assert found == pytest.approx(expected, abs=1e-5)


@given(*EPOCH, st.integers(0, 5))
@settings(deadline=None, max_examples=80)
def test_every_pair_once_an_epoch(count: int, size: int, accumulation: int, number: int) -> None:
    found = flat(epoch(count, size, accumulation, number=number))
    assert Counter(found) == Counter(range(count))


@given(*EPOCH)
@settings(deadline=None, max_examples=80)
def test_sizes_of_steps_and_micro_batches(count: int, size: int, accumulation: int) -> None:
    """All are full but the last: no pair is dropped and none repeated to fill a step."""
    steps = epoch(count, size, accumulation)
    assert len(steps) == steps_per_epoch(count, size, accumulation)
    left = count
    for step in steps:
        here = min(left, size * accumulation)
        assert [len(batch) for batch in step] == [size] * (here // size) + [here % size] * (
            here % size > 0
        )
        left -= here
    assert left == 0


@given(*EPOCH, st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_the_same_seed_and_epoch_give_the_same_order(
    count: int, size: int, accumulation: int, seed: int
) -> None:
    assert epoch(count, size, accumulation, seed) == epoch(count, size, accumulation, seed)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    # (1, 0) and (0, 1) too: the order does not come from the sum of seed and epoch.
    orders = {tuple(flat(epoch(40, 1, 1, seed, n))) for seed in range(4) for n in range(4)}
    assert len(orders) == 16
    assert tuple(range(40)) not in orders


def test_the_order_does_not_depend_on_numpys_global_state() -> None:
    np.random.seed(0)
    first = epoch(30, 2, 2)
    np.random.seed(1)
    assert epoch(30, 2, 2) == first


@given(st.integers(1, 50), st.integers(1, 8), st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_a_step_has_the_same_pairs_however_it_is_divided(count: int, a: int, b: int) -> None:
    """Accumulation is a matter of memory: 2 × 8 and 8 × 2 train the same."""
    one, other = epoch(count, a, b), epoch(count, b, a)
    assert [sorted(flat([step])) for step in one] == [sorted(flat([step])) for step in other]


def test_every_place_of_the_epoch_is_drawn_alike() -> None:
    """A pair's length has no say in which step it falls."""
    first = Counter(i for seed in range(400) for i in flat(epoch(10, 1, 2, seed)[:1]))
    assert sum(first.values()) == 800
    # 80 expected of each, standard deviation 8.
    assert all(48 <= first[i] <= 112 for i in range(10))


@given(PAIRS, st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_pairs_of_like_length_share_a_micro_batch(given_pairs: list, size: int) -> None:
    batches = length_sorted(given_pairs, size)
    assert sorted(flat([batches])) == list(range(len(given_pairs)))
    parts = [[given_pairs[place] for place in batch] for batch in batches]
    lengths = [[max(len(p.chosen.tokens), len(p.rejected.tokens)) for p in b] for b in parts]
    assert [n for batch in lengths for n in batch] == sorted(p.length for p in given_pairs)
    assert all(len(batch) == size for batch in batches[:-1])


def test_steps_are_sorted_each_by_itself() -> None:
    """Sorting a whole epoch would make it a course from short to long."""
    steps = list(epoch_steps(pairs(40), 2, 4, 1, 0))
    lengths = [[p.length for batch in step for p in batch] for step in steps]
    assert all(step == sorted(step) for step in lengths)
    whole = [n for step in lengths for n in step]
    assert whole != sorted(whole)


def test_no_pairs_no_steps() -> None:
    assert epoch(0, 4, 2) == []
    assert steps_per_epoch(0, 4, 2) == 0
