"""Random pairs; and micro-batches to time, of a run's lengths and of the passes that they name."""

import numpy as np
import pytest
from helpers.tiny import token_pair as pair
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.tokens import largest_token_ids
from mlx_simpo.engine.collate_shared import collate_shared
from mlx_simpo.engine.trial_shapes import (
    Lengths,
    Shape,
    pairs_of,
    random_pairs,
    shape_of,
    typical_lengths,
)

TYPICAL = Lengths(64, 128)
LENGTHS = st.builds(Lengths, st.integers(2, 300), st.integers(2, 300))


@given(st.integers(4, 4096), LENGTHS, st.sampled_from([2, 3]), st.sampled_from([2, 3, 50, 50_000]))
@settings(deadline=None, max_examples=60)
def test_pairs_of_a_shape_run_in_its_passes_and_positions(
    positions: int, lengths: Lengths, passes: int, vocabulary: int
) -> None:
    shape = shape_of(positions, lengths)._replace(passes=passes)
    pairs = pairs_of(shape, vocabulary)
    assert largest_token_ids(pairs).max() < vocabulary
    batch = collate_shared(pairs, 0)
    assert (batch.passes, batch.positions, batch.padding) == (passes, shape.positions, 0)
    assert batch.prefix_tokens.shape == (shape.pairs, shape.lengths.prefix)
    assert batch.hidden_indices.size == 2 * shape.pairs  # next to nothing for the head


@pytest.mark.parametrize(
    ("positions", "shape"),
    [
        (64, Shape(1, Lengths(12, 26))),
        (320, Shape(1, TYPICAL)),
        (1024, Shape(3, TYPICAL)),
    ],
)
def test_sizes_are_whole_pairs_or_a_shorter_one(positions: int, shape: Shape) -> None:
    assert shape_of(positions, TYPICAL) == shape


def test_the_typical_pair_is_the_one_with_the_middle_position() -> None:
    """Most pairs are short, but most of the time goes into the long ones."""
    pairs = [pair(17, 15, 17)] * 9 + [pair(129, 256, 256)] * 2
    assert typical_lengths(pairs) == Lengths(128, 256)
    assert typical_lengths(pairs[:10]) == Lengths(128, 256)
    assert typical_lengths([*pairs[:9], pair(129, 100, 100)]) == Lengths(16, 16)


def test_lengths_that_differ_little_are_the_same() -> None:
    assert typical_lengths([pair(121, 240, 250)]) == typical_lengths([pair(131, 270, 262)])
    assert typical_lengths([pair(1, 1, 1)]) == Lengths(4, 4)


def test_random_tokens_are_not_drawn() -> None:
    """What is measured must not move the run's random numbers."""
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    pairs_of(shape_of(512, TYPICAL), 50)
    assert (np.random.get_state()[1] == state).all()  # type: ignore[union-attr]


def test_random_pairs_share_their_prompt_and_are_the_same_each_time() -> None:
    lengths = [(14, 6, 17), (2, 1, 2)]
    pairs, again = random_pairs(50, lengths), random_pairs(50, lengths)
    assert [pair.index for pair in pairs] == [0, 1]
    for one, two, (prompt, *responses) in zip(pairs, again, lengths, strict=True):
        sequences = one.chosen, one.rejected
        assert [len(s.tokens) - prompt for s in sequences] == responses
        assert {s.score_start for s in sequences} == {prompt}
        before, repeated = (s.tokens[:prompt] for s in sequences)
        np.testing.assert_array_equal(before, repeated)
        assert all(s.tokens.min() >= 0 and s.tokens.max() < 50 for s in sequences)
        for first, second in zip(sequences, (two.chosen, two.rejected), strict=True):
            np.testing.assert_array_equal(first.tokens, second.tokens)
    assert len({tuple(pair.chosen.tokens[:2]) for pair in pairs}) == 2
