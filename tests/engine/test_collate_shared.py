"""What the shared-prefix engine runs: every scored token once, padding only where it pays."""

import mlx.core as mx
import numpy as np
from helpers.tiny import token_pair as pair
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.engine.collate_shared import SharedPrefixBatch, collate_shared

SIZE = st.integers(1, 60)
PASS_COST = st.integers(0, 60)
PAIRS = st.lists(st.builds(pair, SIZE, SIZE, SIZE), min_size=1, max_size=9)


def read_back(batch: SharedPrefixBatch) -> list[tuple[list[int], list[int]]]:
    """Of each sequence, by following the indices alone: the tokens before its scored ones as the
    batch runs them, and the tokens that it scores."""
    first = np.array(batch.prefix_tokens)
    prefixes = first[:, : batch.prefix_length]
    hidden_indices, targets = np.array(batch.hidden_indices), np.array(batch.targets)
    inputs = []  # per hidden state: the tokens that the model has read there
    if first.shape[1] > batch.prefix_length:
        inputs += [row[: t + 1] for row in first for t in range(len(row))]
    for tokens, prefix_index in batch.groups:
        every = [*range(len(prefixes))] * (len(tokens) // len(prefixes))
        indices = every if prefix_index is None else np.array(prefix_index)
        for row, index in zip(np.array(tokens), indices, strict=True):
            inputs += [(*prefixes[index], *row[: t + 1]) for t in range(len(row))]
    sequences = []
    for indices, n in zip(
        np.array(batch.logp_indices), np.array(batch.response_lengths), strict=True
    ):
        contexts = [inputs[hidden_indices[i]] for i in indices[:n]]
        response = [int(targets[i]) for i in indices[:n]]
        for i, context in enumerate(contexts):  # each reads what was scored before it
            assert list(context) == [*contexts[0], *response[:i]]
        sequences.append((list(contexts[0]), response))
    return sequences


@given(PAIRS, PASS_COST, st.booleans())
@settings(deadline=None, max_examples=60)
def test_each_scored_token_once_behind_all_that_precedes_it(
    pairs: list[EncodedPair], pass_cost: int, extends_prefix: bool
) -> None:
    sequences = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    batch = collate_shared(pairs, pass_cost, extends_prefix=extends_prefix)
    for (context, response), s in zip(read_back(batch), sequences, strict=True):
        assert context == s.tokens[: s.score_start].tolist()
        assert response == s.tokens[s.score_start :].tolist()
    assert batch.hidden_indices.size == sum(s.num_scored for s in sequences)


@given(PAIRS, PASS_COST, st.booleans())
@settings(deadline=None, max_examples=60)
def test_padding_is_what_holds_no_token(
    pairs: list[EncodedPair], pass_cost: int, extends_prefix: bool
) -> None:
    """No token of these pairs is 0, which is what padding is."""
    batch = collate_shared(pairs, pass_cost, extends_prefix=extends_prefix)
    passes = [batch.prefix_tokens, *(tokens for tokens, _ in batch.groups)]
    assert batch.padding == sum(int((tokens == 0).sum()) for tokens in passes)
    assert (batch.prefix_tokens[:, : batch.prefix_length] != 0).all()
    dtypes = {array.dtype for group in batch.groups for array in group if array is not None}
    dtypes |= {array.dtype for array in batch.arrays if isinstance(array, mx.array)}
    assert dtypes == {mx.int32}


@given(SIZE, SIZE, SIZE, PASS_COST)
@settings(deadline=None)
def test_a_pair_alone_runs_its_prompt_once_and_hardly_any_padding(
    prompt: int, chosen: int, rejected: int, pass_cost: int
) -> None:
    batch = collate_shared([pair(prompt, chosen, rejected)], pass_cost)
    assert batch.prefix_tokens.shape == (1, prompt - 1)  # its last token starts both responses
    assert batch.positions - batch.padding == (prompt - 1) + chosen + rejected
    difference = abs(chosen - rejected)
    assert batch.padding == (difference if difference <= pass_cost else 0)
    assert batch.passes == (prompt > 1) + (1 if difference <= pass_cost else 2)
    assert batch.hidden_indices.size == chosen + rejected


@given(SIZE, SIZE, SIZE, PASS_COST)
@settings(deadline=None)
def test_a_pair_alone_runs_in_two_passes_where_a_prefix_can_be_extended(
    prompt: int, chosen: int, rejected: int, pass_cost: int
) -> None:
    """And its longer sequence in one row with its prefix, so that nothing is padded for it."""
    batch = collate_shared([pair(prompt, chosen, rejected)], pass_cost, extends_prefix=True)
    alone = collate_shared([pair(prompt, chosen, rejected)], pass_cost)
    if prompt == 1 or chosen == rejected:  # there is no prefix, or nothing that would be saved
        assert batch.arrays[0].shape == alone.arrays[0].shape
        return
    assert batch.prefix_tokens.shape == (1, prompt - 1 + max(chosen, rejected))
    assert batch.prefix_length == prompt - 1
    assert [tokens.shape for tokens, _ in batch.groups] == [(1, min(chosen, rejected))]
    assert (batch.passes, batch.padding) == (2, 0)


def test_prefixes_that_all_run_on_in_their_order_need_no_index() -> None:
    pairs = [pair(9, 20, 12), pair(9, 12, 20), pair(9, 20, 12)]
    (tokens, index), *others = collate_shared(pairs, 1, extends_prefix=True).groups
    assert (tokens.shape, index, others) == ((3, 12), None, [])
    (_, index), *others = collate_shared(pairs, 60).groups
    assert (index, others) == (None, [])
    uneven = [pair(9, 20, 12), pair(9, 30, 12), pair(9, 20, 1)]
    indices = [index for _, index in collate_shared(uneven, 2).groups]
    assert [index if index is None else index.tolist() for index in indices] == [
        [1],
        [0, 2],
        [0, 1],
        [2],
    ]


def test_a_response_starts_where_its_own_prompt_ends() -> None:
    """A prompt may be tokenized differently for the two responses (compat: official)."""
    one = TokenizedSequence(np.array([5, 6, 7, 8, 9, 3], np.int32), 4)
    two = TokenizedSequence(np.array([5, 6, 1, 8, 4, 2], np.int32), 5)
    (chosen, _), (rejected, response) = read_back(collate_shared([EncodedPair(one, two)], 16))
    assert (chosen, rejected, response) == ([5, 6, 7, 8], [5, 6, 1, 8, 4], [2])
