"""Pairs in rows whose padding is never scored."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.engine.collate_stacked import collate_stacked
from mlx_simpo.engine.plan import PAD_MULTIPLE
from mlx_simpo.engine.reference import average_logps


def pair(prompt: int, chosen: int, rejected: int, index: int = 0) -> EncodedPair:
    """A pair of so many tokens, none of which is 0 (what padding is)."""
    rng = np.random.default_rng([prompt, chosen, rejected, index])
    sequences = (
        TokenizedSequence(rng.integers(1, 500, prompt + response).astype(np.int32), prompt)
        for response in (chosen, rejected)
    )
    return EncodedPair(*sequences, index=index)


def some_pairs(count: int) -> list[EncodedPair]:
    return [pair(1 + i % 5, 1 + (7 * i) % 23, 1 + (5 * i) % 19, i) for i in range(count)]


SIZE = st.integers(1, 40)
PAIRS = st.lists(st.builds(pair, SIZE, SIZE, SIZE), min_size=1, max_size=6)


@given(PAIRS)
@settings(deadline=None, max_examples=60)
def test_rows_are_all_chosen_then_all_rejected(pairs: list[EncodedPair]) -> None:
    batch = collate_stacked(pairs)
    assert batch.pairs == tuple(pairs)
    sequences = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    arrays = (batch.tokens, batch.score_start, batch.score_end)
    rows, starts, ends = (np.array(array).tolist() for array in arrays)
    for row, start, end, sequence in zip(rows, starts, ends, sequences, strict=True):
        assert row[:end] == sequence.tokens.tolist()
        assert row[start:end] == sequence.tokens[sequence.score_start :].tolist()
        assert not any(row[end:])


@given(PAIRS)
@settings(deadline=None, max_examples=60)
def test_padding_goes_to_the_next_multiple(pairs: list[EncodedPair]) -> None:
    width = collate_stacked(pairs).tokens.shape[1]
    longest = max(max(len(p.chosen.tokens), len(p.rejected.tokens)) for p in pairs)
    assert width % PAD_MULTIPLE == 0
    assert 0 <= width - longest < PAD_MULTIPLE


@pytest.mark.parametrize(("longest", "width"), [(15, 16), (16, 16), (17, 32), (32, 32)])
def test_width(longest: int, width: int) -> None:
    assert collate_stacked([pair(1, longest - 1, 1)]).tokens.shape == (2, width)
    assert collate_stacked([pair(1, 1, 1), pair(1, 1, longest - 1)]).tokens.shape == (4, width)


def test_everything_is_int32() -> None:
    assert {array.dtype for array in collate_stacked(some_pairs(2)).arrays} == {mx.int32}


def test_padding_is_never_scored() -> None:
    """Whatever stands there, and however much of it."""
    model, batch = tiny_model(), collate_stacked(some_pairs(3))
    expected = average_logps(model, *batch.arrays).tolist()
    padding = mx.arange(batch.tokens.shape[1])[None] >= batch.score_end[:, None]
    wider = mx.pad(
        mx.where(padding, 7, batch.tokens), [(0, 0), (0, PAD_MULTIPLE)], constant_values=9
    )
    actual = average_logps(model, wider, batch.score_start, batch.score_end).tolist()
    assert actual == pytest.approx(expected, abs=1e-5)
