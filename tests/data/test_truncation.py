"""Sequences whose scoring starts apart are cut alike; the rule itself is tested in test_encode."""

from hypothesis import given
from hypothesis import strategies as st

from mlx_simpo.data.truncation import truncate

BOS = 0
SIZES = st.tuples(*[st.integers(1, 9)] * 4)


def pair(sizes: tuple[int, int, int, int]) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
    """A shared prompt of so many tokens, then so many of a template's own, then responses."""
    prompt, own, chosen, rejected = sizes
    shared = [BOS, *range(1, prompt)]
    return (
        (shared + [100 + i for i in range(chosen)], prompt),
        (shared + [200] * own + [300 + i for i in range(rejected)], prompt + own),
    )


@given(SIZES, st.integers(1, 30), st.integers(1, 30))
def test_prompts_stay_alike_and_as_long_as_they_can(
    sizes: tuple[int, int, int, int], max_prompt: int, more: int
) -> None:
    before = pair(sizes)
    after = truncate(before, max_prompt + more, max_prompt, BOS)
    cut, cut_response = after.cuts
    longest = max(len(tokens) for tokens, _ in before)
    assert cut == min(max(0, longest - max_prompt - more), max(0, sizes[0] - max_prompt))
    for (tokens, start), (shorter, new_start) in zip(before, after.sequences, strict=True):
        assert new_start == start - cut
        assert len(shorter) == min(max_prompt + more, len(tokens) - cut)
        assert shorter[new_start:] == tokens[start:][: max(0, len(shorter) - new_start)]
        assert not cut or shorter[0] == BOS
    assert cut_response == sum(
        len(tokens) - cut - len(shorter)
        for (tokens, _), (shorter, _) in zip(before, after.sequences, strict=True)
    )


def test_a_first_token_that_is_not_bos_is_cut() -> None:
    sequences = (([1, 2, 3, 4], 3), ([1, 2, 3, 5], 3))
    assert truncate(sequences, 3, 1, BOS) == ((([2, 3, 4], 2), ([2, 3, 5], 2)), (1, 0))
    assert truncate(sequences, 3, 1, None) == ((([2, 3, 4], 2), ([2, 3, 5], 2)), (1, 0))
    assert truncate(sequences, 3, 1, 1) == ((([1, 3, 4], 2), ([1, 3, 5], 2)), (1, 0))
