"""Pairs as stacked rows: all chosen, then all rejected, with padding that is never scored."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.engine.collate_stacked import collate_stacked
from mlx_simpo.engine.plan import PAD_MULTIPLE, plan_stacked
from mlx_simpo.engine.reference import average_logps


def pair(prompt: int, chosen: int, rejected: int, index: int = 0) -> EncodedPair:
    """A pair of so many tokens, none of which is 0 (what padding is)."""
    rng = np.random.default_rng([prompt, chosen, rejected, index])
    sides = (
        TokenizedSequence(rng.integers(1, 500, prompt + answer).astype(np.int32), prompt)
        for answer in (chosen, rejected)
    )
    return EncodedPair(*sides, index=index)


def pairs(count: int) -> list[EncodedPair]:
    return [pair(1 + i % 5, 1 + (7 * i) % 23, 1 + (5 * i) % 19, i) for i in range(count)]


def flat(steps: list) -> list[int]:
    return [index for step in steps for index in step]


SIZE = st.integers(1, 40)
PAIRS = st.lists(st.builds(pair, SIZE, SIZE, SIZE), min_size=1, max_size=6)


@given(PAIRS)
@settings(deadline=None, max_examples=60)
def test_rows_are_all_chosen_then_all_rejected(given_pairs: list[EncodedPair]) -> None:
    batch = collate_stacked(given_pairs)
    assert batch.pairs == tuple(given_pairs)
    sides = [p.chosen for p in given_pairs] + [p.rejected for p in given_pairs]
    rows, starts, ends = batch.tokens.tolist(), batch.score_start.tolist(), batch.score_end.tolist()
    assert len(rows) == len(starts) == len(ends) == len(sides)
    for row, start, end, side in zip(rows, starts, ends, sides, strict=True):
        assert row[:end] == side.tokens.tolist()
        assert row[start:end] == side.tokens[side.score_start :].tolist()
        assert not any(row[end:])


@given(PAIRS)
@settings(deadline=None, max_examples=60)
def test_padding_goes_to_the_next_multiple(given_pairs: list[EncodedPair]) -> None:
    width = collate_stacked(given_pairs).tokens.shape[1]
    longest = max(max(len(p.chosen.tokens), len(p.rejected.tokens)) for p in given_pairs)
    assert width % PAD_MULTIPLE == 0
    assert 0 <= width - longest < PAD_MULTIPLE


@pytest.mark.parametrize(("longest", "width"), [(15, 16), (16, 16), (17, 32), (32, 32)])
def test_width(longest: int, width: int) -> None:
    assert collate_stacked([pair(1, longest - 1, 1)]).tokens.shape == (2, width)
    assert collate_stacked([pair(1, 1, 1), pair(1, 1, longest - 1)]).tokens.shape == (4, width)


def test_everything_is_int32() -> None:
    batch = collate_stacked(pairs(2))
    assert {batch.tokens.dtype, batch.score_start.dtype, batch.score_end.dtype} == {mx.int32}


def test_padding_is_never_scored() -> None:
    """Whatever stands there, and however much of it."""
    model, batch = tiny_model(), collate_stacked(pairs(3))
    expected = average_logps(model, batch.tokens, batch.score_start, batch.score_end).tolist()
    padding = mx.arange(batch.tokens.shape[1])[None] >= batch.score_end[:, None]
    wider = mx.pad(
        mx.where(padding, 7, batch.tokens), [(0, 0), (0, PAD_MULTIPLE)], constant_values=9
    )
    found = average_logps(model, wider, batch.score_start, batch.score_end).tolist()
    assert found == pytest.approx(expected, abs=1e-5)


@given(PAIRS, st.integers(1, 4), st.integers(1, 400))
@settings(deadline=None, max_examples=80)
def test_pairs_of_like_length_share_a_micro_batch(
    given_pairs: list[EncodedPair], size: int, max_tokens: int
) -> None:
    batches = plan_stacked(given_pairs, size)
    assert sorted(flat(batches)) == list(range(len(given_pairs)))
    lengths = [given_pairs[place].length for place in flat(batches)]
    assert lengths == sorted(lengths)
    assert all(len(batch) == size for batch in batches[:-1])
    bounded = plan_stacked(given_pairs, size, max_tokens)
    assert flat(bounded) == flat(batches)
    for batch in bounded:
        positions = collate_stacked([given_pairs[place] for place in batch]).tokens.size
        assert len(batch) <= size
        assert positions <= max_tokens or len(batch) == 1


def test_no_pairs_no_micro_batches() -> None:
    assert plan_stacked([], 4) == []
