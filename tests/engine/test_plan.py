"""A step's pairs as micro-batches: every pair once, within the bounds, at the least cost."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.tiny import token_pair as pair
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.engine.collate_shared import collate_shared
from mlx_simpo.engine.collate_stacked import collate_stacked
from mlx_simpo.engine.figures import CPU, GPU, Figures
from mlx_simpo.engine.plan import (
    PAD_MULTIPLE,
    cost,
    group_by_length,
    input_length,
    padded_length,
    plan_shared_prefix,
    plan_stacked,
    shared_prefix_length,
)

SIZE = st.integers(1, 60)
FIGURES = st.builds(
    lambda pass_cost, positions: replace(CPU, pass_cost=pass_cost, max_positions=positions),
    st.integers(1, 100),
    st.integers(1, 2000),
)
PAIRS = st.lists(st.builds(pair, SIZE, SIZE, SIZE), min_size=1, max_size=9)


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


@given(PAIRS, st.integers(1, 4), st.integers(1, 400))
@settings(deadline=None, max_examples=80)
def test_pairs_of_similar_length_are_stacked_together(
    pairs: list[EncodedPair], size: int, max_tokens: int
) -> None:
    batches = plan_stacked(pairs, size)
    assert sorted(flat(batches)) == list(range(len(pairs)))
    lengths = [pairs[i].length for i in flat(batches)]
    assert lengths == sorted(lengths)
    assert all(len(batch) == size for batch in batches[:-1])
    bounded = plan_stacked(pairs, size, max_tokens)
    assert flat(bounded) == flat(batches)
    for batch in bounded:
        positions = collate_stacked([pairs[i] for i in batch]).tokens.size
        assert len(batch) <= size
        assert positions <= max_tokens or len(batch) == 1


def test_no_pairs_no_micro_batches() -> None:
    assert plan_stacked([], 4) == []
    assert plan_shared_prefix([], 4, figures=CPU) == []


@given(
    PAIRS, st.integers(1, 5), st.one_of(st.none(), st.integers(1, 500)), FIGURES, st.booleans()
)
@settings(deadline=None, max_examples=80)
def test_a_shared_plan_takes_every_pair_once_within_its_bounds(
    pairs: list[EncodedPair], size: int, max_tokens: int | None, figures: Figures, extends: bool
) -> None:
    batches = plan_shared_prefix(pairs, size, max_tokens, figures=figures, extends_prefix=extends)
    assert sorted(flat(batches)) == list(range(len(pairs)))
    for batch in batches:
        members = [pairs[i] for i in batch]
        positions = collate_shared(
            members, figures.pass_cost, extends_prefix=extends
        ).positions
        assert len(batch) <= size
        assert positions <= figures.max_positions or len(batch) == 1
        assert max_tokens is None or positions <= max_tokens or len(batch) == 1


@given(PAIRS, st.integers(0, 100), st.booleans())
@settings(deadline=None, max_examples=80)
def test_the_cost_is_that_of_the_batch_that_is_collated(
    pairs: list[EncodedPair], pass_cost: int, extends: bool
) -> None:
    batch = collate_shared(pairs, pass_cost, extends_prefix=extends)
    expected = cost(pairs, batch.prefix_length, pass_cost, extends)
    assert expected.positions == batch.positions
    assert expected.passes == batch.passes
    assert expected.total == expected.positions + pass_cost * expected.passes


@given(PAIRS, st.integers(0, 100))
@settings(deadline=None, max_examples=80)
def test_an_extended_prefix_never_costs_more(pairs: list[EncodedPair], pass_cost: int) -> None:
    length = min(map(shared_prefix_length, pairs))
    extended, separate = (cost(pairs, length, pass_cost, extends) for extends in (True, False))
    assert extended.total <= separate.total
    if len(pairs) == 1 and length and separate.passes == 3:
        assert extended.passes == 2
        assert extended.positions == separate.positions


@given(PAIRS, FIGURES, st.booleans())
@settings(deadline=None, max_examples=80)
def test_a_shared_plan_costs_no_more_than_each_pair_alone(
    pairs: list[EncodedPair], figures: Figures, extends: bool
) -> None:
    def total(batches: list[list[int]]) -> int:
        parts = [[pairs[i] for i in batch] for batch in batches]
        prefixes = [min(map(shared_prefix_length, part)) for part in parts]
        return sum(
            cost(part, prefix, figures.pass_cost, extends).total
            for part, prefix in zip(parts, prefixes, strict=True)
        )

    plan = plan_shared_prefix(pairs, 4, figures=figures, extends_prefix=extends)
    assert total(plan) <= total([[i] for i in range(len(pairs))])


@pytest.mark.parametrize(
    ("pass_cost", "lengths", "groups"),
    [
        (0, [100, 95, 95, 40], [[0], [1, 2], [3]]),
        (CPU.pass_cost, [100, 96, 40, 99], [[0, 3, 1], [2]]),
        (GPU.pass_cost, [100, 70, 40], [[0, 1], [2]]),
        (1000, [100, 95, 40, 99], [[0, 3, 1, 2]]),
    ],
)
def test_the_cost_of_a_pass_decides_who_shares_one(
    pass_cost: int, lengths: list[int], groups: list[list[int]]
) -> None:
    assert group_by_length(lengths, pass_cost) == groups


def test_a_full_device_takes_no_more_pairs() -> None:
    pairs = [pair(9, 50, 3), pair(30, 3, 40)]
    figures = replace(CPU, pass_cost=1000)
    assert plan_shared_prefix(pairs, 2, figures=figures) == [[0, 1]]
    full = replace(figures, max_positions=100)  # more would only take more memory
    assert plan_shared_prefix(pairs, 2, figures=full) == [[0], [1]]


def test_the_prefix_ends_where_the_sequences_differ() -> None:
    """A prompt may be tokenized differently for the two responses (compat: official)."""
    one = TokenizedSequence(np.array([5, 6, 7, 8, 9, 3], np.int32), 4)
    two = TokenizedSequence(np.array([5, 6, 1, 8, 4, 2], np.int32), 5)
    assert shared_prefix_length(EncodedPair(one, two)) == 2
    assert shared_prefix_length(EncodedPair(one, one)) == 3
    assert input_length(one) == 5


@pytest.mark.parametrize(
    ("length", "padded"), [(1, 16), (15, 16), (16, 16), (17, 32), (32, 32), (33, 48)]
)
def test_lengths_are_padded_to_the_next_multiple(length: int, padded: int) -> None:
    assert PAD_MULTIPLE == 16
    assert padded_length(length) == padded
