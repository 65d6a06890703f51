"""One step: exact accumulation, compiled and eager, and what is not finite."""

import json
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.steps import encoded_pairs, loss_and_gradients, model_with_lora, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from mlx_simpo import TrainConfig
from mlx_simpo.engine.choice import REFERENCE, MicroBatch, choose_engine, shared_prefix_engine
from mlx_simpo.training.step import (
    GradientFunction,
    NonFiniteError,
    StepBatch,
    check_finite,
    collate_step,
    step_gradients,
)

PAIRS = encoded_pairs()


def assert_close(actual: dict, expected: dict, rtol: float = 2e-4) -> None:
    """Relative to each array's largest value."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=rtol * scale, err_msg=name)


# --- the batch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "shared_prefix"])
def test_a_step_batch_has_every_pair_once_and_the_totals_of_the_step(name: str) -> None:
    engine = choose_engine(name, model_with_lora())
    assert engine.name == name
    batch = collate_step(PAIRS, engine, TrainConfig(batch_size=4))
    assert sorted(pair.index for pair in batch.pairs) == list(range(11))
    chosen_tokens = [pair.chosen.num_scored for pair in batch.pairs]
    assert np.concatenate([np.array(c) for c in batch.chosen_tokens]).tolist() == chosen_tokens
    assert [total.item() for total in batch.totals] == [11, sum(chosen_tokens)]
    assert batch.positions == sum(part.positions for part in batch.micro_batches) > 0
    assert len(batch.micro_batches) == len(batch.chosen_tokens) == 3


# --- the gradient ------------------------------------------------------------------------------


@given(
    cuts=st.lists(st.integers(1, 10), max_size=4),
    order=st.permutations(range(11)),
    sft_weight=st.sampled_from([0.0, 0.5]),
)
@settings(deadline=None, max_examples=15)
def test_any_split_of_a_step_gives_the_same_gradient(
    cuts: list[int], order: list[int], sft_weight: float
) -> None:
    """Unequal micro-batches in any order: loss and gradient are those of the one large batch."""
    model = model_with_lora()
    shuffled = [PAIRS[i] for i in order]
    edges = [0, *sorted(set(cuts)), 11]
    parts = [shuffled[a:b] for a, b in pairwise(edges)]
    expected = loss_and_gradients(model, [PAIRS], sft_weight=sft_weight)
    for engine in (REFERENCE, shared_prefix_engine(model)):
        actual = loss_and_gradients(model, parts, engine, sft_weight=sft_weight)
        assert_close(actual, expected)


def test_an_unweighted_mean_over_unequal_parts_would_be_noticed() -> None:
    """The planted bug, and TRL's at the time: the mean of the micro-batches' means."""
    model = model_with_lora()
    expected = loss_and_gradients(model, [PAIRS])
    means = [loss_and_gradients(model, [part]) for part in (PAIRS[:8], PAIRS[8:])]
    wrong = {name: (means[0][name] + means[1][name]) / 2 for name in expected}
    with pytest.raises(AssertionError):
        assert_close(wrong, expected)


@pytest.mark.parametrize(
    ("loss_type", "dropout"), [("sigmoid", 0.0), ("hinge", 0.0), ("sigmoid", 0.4)]
)
def test_compiled_equals_eager(loss_type: str, dropout: float) -> None:
    """Of two parts with the same pairs, each draws its own dropout, though one trace serves both;
    and what is drawn afterwards is the same, too."""
    model, parts = model_with_lora(dropout=dropout), [PAIRS[:4], PAIRS[:4], PAIRS[8:]]
    results = []
    for compiled in (False, True):
        mx.random.seed(3)
        result = loss_and_gradients(model, parts, compiled=compiled, loss_type=loss_type)
        results.append(result | {"drawn later": np.array(mx.random.normal((3,)))})
    assert_close(results[1], results[0], 1e-5)


@pytest.mark.parametrize(("compiled", "expected"), [(True, [1, 1, 2]), (False, [1, 2, 3])])
def test_a_compiled_step_is_traced_once_for_each_shape(compiled: bool, expected: list[int]) -> None:
    """An eager one calls the engine each time; both say that a gradient follows."""
    calls: list[bool] = []

    def logps(model: Any, arrays: tuple, training: bool) -> mx.array:
        calls.append(training)
        return REFERENCE.logps(model, arrays, training)

    engine, options = REFERENCE._replace(logps=logps), {"beta": 2.0, "gamma_beta_ratio": 0.5}
    function = GradientFunction(model_with_lora(), options, engine, compiled=compiled)
    counts, traces = [], []
    for part in (PAIRS[:4], PAIRS[:4], PAIRS[:3]):
        step_gradients(function, collate_step(part, engine, TrainConfig(batch_size=4)))
        counts.append(len(calls))
        traces.append(function.traces)
    assert counts == expected
    assert traces == (expected if compiled else [0, 0, 0])
    assert all(calls)


def test_a_compiled_step_sees_the_weights_of_its_time() -> None:
    model, options = model_with_lora(), {"beta": 2.0, "gamma_beta_ratio": 0.5}
    function = GradientFunction(model, options, REFERENCE, compiled=True)
    batch = collate_step(PAIRS[:4], REFERENCE, TrainConfig(batch_size=4))
    for _ in range(2):
        gradients = dict(tree_flatten(step_gradients(function, batch)[1]))
        expected = loss_and_gradients(model, [PAIRS[:4]])
        del expected["loss"]
        assert_close({name: np.array(g) for name, g in gradients.items()}, expected, 1e-5)
        model.update(tree_map(lambda p: 1.5 * p, model.trainable_parameters()))


def test_the_graph_of_a_micro_batch_is_built_while_the_one_before_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not before the one before that is done, whose activations would be in memory, too."""
    events: list[str] = []

    def gradients_of_one(*batch: Any) -> tuple[dict, dict]:
        events.append("build")
        return {}, {"weight": mx.array(float(len(events)))}

    monkeypatch.setattr(mx, "async_eval", lambda *_: events.append("submit"))
    monkeypatch.setattr(mx, "eval", lambda *_: events.append("wait"))
    totals = (mx.array(3.0), mx.array(3.0))
    batch = StepBatch(PAIRS[:3], [MicroBatch((), 1, 1)] * 3, [mx.array([1])] * 3, totals)
    step_gradients(gradients_of_one, batch)  # type: ignore[arg-type]
    assert events == ["build", "submit", *["build", "submit", "wait"] * 2]


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    """Against a central difference, at the weight with the largest gradient."""
    model = model_with_lora()
    name = "model.layers.1.self_attn.v_proj.lora_a"
    gradient = loss_and_gradients(model, [PAIRS])[name]
    start = weights(model)[name]
    index = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
    losses = []
    for step in (5e-3, -5e-3):
        moved = start.copy()
        moved[index] += step
        model.load_weights([(name, mx.array(moved))], strict=False)
        losses.append(float(loss_and_gradients(model, [PAIRS])["loss"]))
    assert gradient[index] == pytest.approx((losses[0] - losses[1]) / 1e-2, rel=2e-2)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_an_error_that_names_its_pairs(bad: float) -> None:
    losses = np.array([1.0, bad, 2.0, bad])
    with pytest.raises(NonFiniteError) as error:
        check_finite(7, losses, 1.0, PAIRS[:4])
    assert str(error.value) == (
        "the loss of step 7 is not a finite number (pairs: pairs:2, pairs:4). A lower "
        "train.learning_rate, or dtype=float32 for a float16 model, usually fixes this"
    )
    record = json.loads(json.dumps(error.value.record, allow_nan=False))
    assert (record["step"], record["what"], record["grad_norm"]) == (7, "loss", 1.0)
    assert record["pairs"][1] == {"source": "pairs:2", "index": 1, "loss": str(bad)}
    assert [pair["loss"] for pair in record["pairs"]] == [1.0, str(bad), 2.0, str(bad)]


def test_a_gradient_that_is_not_finite_is_an_error_that_names_all_pairs() -> None:
    with pytest.raises(
        NonFiniteError, match=r"the gradient of step 3 .*pairs:1, pairs:2\)"
    ) as error:
        check_finite(3, np.ones(2), float("nan"), PAIRS[:2])
    assert (error.value.record["what"], error.value.record["grad_norm"]) == ("gradient", "nan")
    check_finite(3, np.ones(2), 1.0, PAIRS[:2])
