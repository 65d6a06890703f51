"""The share of 4-grams that occurred before."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_simpo.sampling.repetition import repeated_share


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([1, 1, 1, 1], 0.0),
        ([1, 1, 1, 1, 1], 0.5),
        ([7] * 103, 0.99),
        (list(range(100)), 0.0),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4], 1 / 6),
        ([1, 2] * 50, 95 / 97),
        (list("abcdabcd"), 1 / 5),
    ],
)
def test_the_share_of_repeated_4_grams(tokens: list, share: float) -> None:
    assert repeated_share(tokens) == pytest.approx(share)


@given(st.lists(st.integers(0, 3), max_size=40))
def test_the_share_is_that_of_a_count_one_by_one(tokens: list[int]) -> None:
    ngrams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    repeated = sum(ngram in ngrams[:i] for i, ngram in enumerate(ngrams))
    assert repeated_share(tokens) == pytest.approx(repeated / max(1, len(ngrams)))
