"""The average log-probabilities of a shared-prefix batch, against a model that runs each sequence
alone; that the two engines agree, gradients included, is in test_equality.py."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from helpers.chunks import recorded_bounds
from helpers.tiny import tiny_model
from helpers.tiny import token_pair as pair

from mlx_simpo.data.encode import TokenizedSequence
from mlx_simpo.engine import shared_prefix
from mlx_simpo.engine.collate_shared import collate_shared
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
from mlx_simpo.engine.head import resolve_head
from mlx_simpo.engine.shared_prefix import shared_prefix_logps
from mlx_simpo.engine.token_logps import chunk_logits_beside_trunk

MODEL = tiny_model()
PAIRS = [pair(40, 20, 7), pair(35, 3, 60), pair(1, 11, 12)]
PASS_COSTS = (0, 16, 100)  # each sequence in a pass of its own, some in one, all in one


def alone(sequence: TokenizedSequence) -> float:
    """The mean log-probability of the scored tokens, in float64 after the model."""
    logits = np.array(MODEL(mx.array(sequence.tokens)[None]), np.float64)[0, :-1]
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    own = logps[np.arange(len(logps)), sequence.tokens[1:]]
    return float(own[sequence.score_start - 1 :].mean())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pass_cost", PASS_COSTS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_chosen_then_rejected_each_as_if_alone(count: int, pass_cost: int, training: bool) -> None:
    """With a prefix, and (pair 3 has a prompt of one token) without any."""
    pairs = PAIRS[:count]
    arrays = collate_shared(pairs, pass_cost).arrays
    actual = shared_prefix_logps(MODEL, resolve_head(MODEL), *arrays, training=training)
    assert actual.dtype == mx.float32
    expected = [alone(p.chosen) for p in pairs] + [alone(p.rejected) for p in pairs]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_only_hidden_states_of_scored_tokens_reach_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = []
    original = shared_prefix.token_logps

    def recording(model, head, hidden, targets, **options):
        shapes.append((hidden.shape, targets.shape))
        return original(model, head, hidden, targets, **options)

    monkeypatch.setattr(shared_prefix, "token_logps", recording)
    arrays = collate_shared(PAIRS, 16).arrays
    shared_prefix_logps(MODEL, resolve_head(MODEL), *arrays, training=False)
    count = sum(p.chosen.num_scored + p.rejected.num_scored for p in PAIRS)
    assert shapes == [((count, 32), (count,))]


@pytest.mark.parametrize(
    ("training", "checkpointed"), [(True, False), (True, True), (False, False)]
)
@pytest.mark.parametrize("most", [1, 2**24])
def test_the_head_takes_no_more_than_the_trunk_lets_it(
    training: bool, checkpointed: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer's activations are in memory beside it, or those of one; and never more than the
    caller allows."""
    bounds = recorded_bounds(monkeypatch)
    model = tiny_model(num_hidden_layers=6)
    batch = collate_shared(PAIRS, 16)
    with gradient_checkpointing(model) if checkpointed else nullcontext():
        shared_prefix_logps(
            model, resolve_head(model), *batch.arrays, training=training, chunk_logits=most
        )
    layers = 6 if training and not checkpointed else 1
    assert bounds == [min(most, chunk_logits_beside_trunk(batch.positions, 32, layers))]
