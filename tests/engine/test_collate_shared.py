"""What the shared-prefix engine runs: every scored token once, padding only where it pays."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import token_pair as pair
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.engine import plan
from mlx_simpo.engine.collate_shared import collate_shared
from mlx_simpo.engine.plan import like_lengths, pass_cost, plan_shared_prefix, shared_length

SIZE = st.integers(1, 60)
PAIRS = st.lists(st.builds(pair, SIZE, SIZE, SIZE), min_size=1, max_size=9)


def read_back(pairs: list[EncodedPair]) -> list[tuple[list[int], list[int]]]:
    """Of each sequence: the tokens before its scored ones as the batch runs them, and what it
    scores; by following the indices alone."""
    batch = collate_shared(pairs)
    prefix, rows, targets_of = (np.array(a) for a in (batch.prefix, batch.rows, batch.targets))
    flat = []  # per hidden row: the tokens that the model has read there
    for tokens, owner in batch.groups:
        for row, who in zip(np.array(tokens), np.array(owner), strict=True):
            flat += [(*prefix[who], *row[: t + 1]) for t in range(len(row))]
    found = []
    for places, n in zip(np.array(batch.places), np.array(batch.lengths), strict=True):
        contexts = [flat[rows[i]] for i in places[:n]]
        targets = [int(targets_of[i]) for i in places[:n]]
        for i, context in enumerate(contexts):  # each reads what was scored before it
            assert list(context) == [*contexts[0], *targets[:i]]
        found.append((list(contexts[0]), targets))
    return found


@given(PAIRS)
@settings(deadline=None, max_examples=40)
def test_each_scored_token_once_behind_all_that_precedes_it(pairs: list[EncodedPair]) -> None:
    sequences = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    for (context, targets), s in zip(read_back(pairs), sequences, strict=True):
        assert context == s.tokens[: s.score_start].tolist()
        assert targets == s.tokens[s.score_start :].tolist()


@given(SIZE, SIZE, SIZE)
@settings(deadline=None)
def test_a_pair_alone_runs_its_prompt_once_and_hardly_any_padding(p: int, c: int, r: int) -> None:
    batch = collate_shared([pair(p, c, r)])
    assert batch.prefix.shape == (1, p - 1)  # the prompt's last token starts both answers
    assert batch.positions - batch.padding == (p - 1) + c + r
    assert batch.padding == (abs(c - r) if abs(c - r) <= pass_cost() else 0)
    assert batch.rows.size == c + r


def test_the_prefix_ends_where_the_sequences_differ() -> None:
    """A prompt may be tokenized differently on the two sides (compat: official)."""
    one = TokenizedSequence(np.array([5, 6, 7, 8, 9, 3], np.int32), 4)
    two = TokenizedSequence(np.array([5, 6, 1, 8, 4, 2], np.int32), 5)
    assert shared_length(EncodedPair(one, two)) == 2
    assert shared_length(EncodedPair(one, one)) == 3
    (chosen, _), (rejected, scored) = read_back([EncodedPair(one, two)])
    assert (chosen, rejected, scored) == ([5, 6, 7, 8], [5, 6, 1, 8, 4], [2])


@given(PAIRS, st.integers(1, 5), st.one_of(st.none(), st.integers(1, 500)))
@settings(deadline=None, max_examples=80)
def test_a_plan_takes_every_pair_once_within_its_bounds(
    pairs: list[EncodedPair], size: int, max_tokens: int | None
) -> None:
    plan = plan_shared_prefix(pairs, size, max_tokens)
    assert sorted(i for batch in plan for i in batch) == list(range(len(pairs)))
    for batch in plan:
        positions = collate_shared([pairs[i] for i in batch]).positions
        assert len(batch) <= size
        assert max_tokens is None or positions <= max_tokens or len(batch) == 1


@given(PAIRS)
@settings(deadline=None, max_examples=80)
def test_a_plan_costs_no_more_than_each_pair_alone(pairs: list[EncodedPair]) -> None:
    def total(plan: list[list[int]]) -> int:
        batches = [collate_shared([pairs[i] for i in batch]) for batch in plan]
        passes = sum(len(b.groups) + (b.prefix.shape[1] > 0) for b in batches)
        return sum(b.positions for b in batches) + pass_cost() * passes

    assert total(plan_shared_prefix(pairs, 4)) <= total([[i] for i in range(len(pairs))])


def test_what_a_pass_costs_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert like_lengths([100, 70, 40]) == [[0, 1], [2]]
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert like_lengths([100, 96, 40, 99]) == [[0, 3, 1], [2]]
    monkeypatch.setattr(plan, "PASS_COST_CPU", 0)
    assert like_lengths([100, 95, 95, 40]) == [[0], [1, 2], [3]]
    monkeypatch.setattr(plan, "PASS_COST_CPU", 1000)
    assert like_lengths([100, 95, 40, 99]) == [[0, 3, 1, 2]]
    alike = [pair(9, 50, 3), pair(30, 3, 40)]
    assert plan_shared_prefix(alike, 2) == [[0, 1]]
    monkeypatch.setattr(plan, "ENOUGH_CPU", 100)  # more would only take more memory
    assert plan_shared_prefix(alike, 2) == [[0], [1]]
