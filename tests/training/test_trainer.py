"""Whole trainings: any micro-batches, epochs and steps, the seed, NaN, the metrics."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.steps import (
    encoded_pairs,
    loss_and_gradients,
    model_with_lora,
    step_config,
    weights,
)
from helpers.stored import make_pairs, write_and_open
from helpers.tiny import tiny_model

from mlx_simpo import LoRAConfig, SimPOError
from mlx_simpo.data.encode import EncodedPair
from mlx_simpo.data.mixing import Mixture, epoch_order
from mlx_simpo.device import memory_metrics
from mlx_simpo.engine.choice import REFERENCE, Engine
from mlx_simpo.engine.gradient_checkpointing import is_checkpointed
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.training.state import TrainingState
from mlx_simpo.training.step import NonFiniteError
from mlx_simpo.training.trainer import total_steps, train_steps

PAIRS = encoded_pairs()


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (3, 3)])
def test_training_does_not_depend_on_the_micro_batches(batch_size: int, accumulation: int) -> None:
    """Whole runs over two epochs, the last step of each with the remaining pairs."""
    size = batch_size * accumulation
    plain, split = model_with_lora(), model_with_lora()
    whole = list(train_steps(plain, PAIRS, step_config(batch_size=size, epochs=2.0)))
    parts = list(
        train_steps(
            split,
            PAIRS,
            step_config(
                batch_size=batch_size, gradient_accumulation_steps=accumulation, epochs=2.0
            ),
        )
    )
    assert [s.metrics["pairs"] for s in parts] == [size, 11 - size] * 2
    for a, b in zip(whole, parts, strict=True):
        assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-4)
    for name, value in weights(plain).items():
        np.testing.assert_allclose(weights(split)[name], value, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("train", "pairs", "expected"),
    [
        ({}, 11, 3),
        ({"epochs": 2.0}, 11, 6),
        ({"epochs": 0.5}, 11, 2),
        ({"steps": 7}, 11, 7),
        ({"batch_size": 4, "gradient_accumulation_steps": 2}, 16, 2),
    ],
)
def test_the_number_of_steps(train: dict, pairs: int, expected: int) -> None:
    config = step_config(**train)
    assert total_steps(config, encoded_pairs(pairs)) == expected
    steps = train_steps(model_with_lora(), encoded_pairs(pairs), config)
    assert [step.step for step in steps] == list(range(1, expected + 1))


def test_a_training_that_is_done_has_no_steps() -> None:
    model, config = model_with_lora(), step_config(steps=3)
    for done in (3, 4):
        state = TrainingState(model, config, 3)
        state.step = done
        assert list(train_steps(model, PAIRS, config, None, state)) == []


def test_each_epoch_takes_every_pair_once_in_another_order() -> None:
    seen: list[int] = []

    def recording(pairs: Sequence[EncodedPair]) -> tuple:
        seen.extend(p.index for p in pairs)
        return REFERENCE.collate(pairs)

    engine = REFERENCE._replace(collate=recording)
    list(train_steps(model_with_lora(), PAIRS, step_config(epochs=2.0), engine))
    first, second = seen[:11], seen[11:]
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second


def test_the_same_seed_gives_the_same_weights() -> None:
    def run(seed: int) -> dict[str, np.ndarray]:
        model = model_with_lora(dropout=0.3)
        list(train_steps(model, PAIRS, replace(step_config(steps=3), seed=seed)))
        return weights(model)

    first, same, other = run(1), run(1), run(2)
    assert all((first[n] == same[n]).all() for n in first)
    assert any((first[n] != other[n]).any() for n in first)


@pytest.mark.parametrize("compiled", [False, True])
def test_nan_stops_with_an_error_and_the_weights_of_the_step_before(compiled: bool) -> None:
    """NaN in the embedding of a token that every pair has, from the second step on."""
    model = model_with_lora()
    steps = train_steps(model, PAIRS, step_config(engine="reference", compile=compiled))
    next(steps)
    before = weights(model)
    embedding = np.array(model.model.embed_tokens.weight)
    embedding[PAIRS[0].chosen.tokens[0]] = np.nan  # every pair begins with this token
    model.model.embed_tokens.weight = mx.array(embedding)
    message = r"loss of step 2 .*pairs:\d+, pairs:\d+.*rate.*; train\.on_nonfinite=skip omits such"
    with pytest.raises(SimPOError, match=message):
        next(steps)
    assert all((before[n] == w).all() for n, w in weights(model).items())


def test_training_prefers_the_chosen_responses() -> None:
    config = step_config(steps=25, batch_size=11, learning_rate=1e-2)
    steps = list(train_steps(model_with_lora(), PAIRS, config))
    assert steps[-1].metrics["loss"] < 0.5 * steps[0].metrics["loss"]
    assert steps[-1].metrics["rewards/accuracies"] == 1


def test_dropout_is_on_in_a_step_and_off_between_two() -> None:
    losses = []
    for dropout in (0.0, 0.5):
        model = model_with_lora(dropout=dropout)
        model.eval()
        for step in train_steps(model, PAIRS, step_config(steps=2)):
            assert not model.training
            losses.append(step.metrics["loss"])
    assert losses[0] != losses[2]  # of the first step, whose weights are the same


@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_gradient_is_clipped_to_the_limit_if_there_is_one(limit: float | None) -> None:
    """Adam's first moment is 0.1 times the gradient, by which an update cannot be told."""
    model, config = model_with_lora(), step_config(batch_size=11, max_grad_norm=limit)
    expected = loss_and_gradients(model, [PAIRS])
    state = TrainingState(model, config, 1)
    step = next(train_steps(model, PAIRS, config, None, state))
    norm = step.metrics["grad_norm"]
    assert norm > 1.0
    moments = state.arrays()
    for name in weights(model):
        gradient = expected[name] * (1.0 if limit is None else limit / norm)
        moment = np.array(moments[f"optimizer.{name}.m"])
        np.testing.assert_allclose(moment, 0.1 * gradient, rtol=1e-3, atol=1e-6)


def reference_with(change: Callable[[mx.array], mx.array]) -> Engine:
    """The reference engine with other log-probabilities."""

    def logps(model: Any, arrays: tuple, training: bool) -> mx.array:
        return change(REFERENCE.logps(model, arrays, training))

    return REFERENCE._replace(logps=logps)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_that_is_not_finite_is_an_error_though_the_loss_is_finite(
    compiled: bool,
) -> None:
    engine = reference_with(lambda logps: logps + mx.sqrt(0.0 * logps))  # whose slope is 0 · inf
    model = model_with_lora()
    before = weights(model)
    with pytest.raises(NonFiniteError, match="the gradient of step 1 is not a finite number"):
        next(train_steps(model, PAIRS, step_config(engine="reference", compile=compiled), engine))
    assert all((before[n] == w).all() for n, w in weights(model).items())


def test_the_metrics_of_a_step() -> None:
    model, config = model_with_lora(), step_config(engine="reference", epochs=2.0)
    pairs = [PAIRS[index] for index in epoch_order(PAIRS, config.seed).epoch(0)[:4]]
    loss = loss_and_gradients(model, [pairs])["loss"]
    started = time.perf_counter()
    step = next(train_steps(model, PAIRS, config))
    metrics = step.metrics
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["pairs"] == 4
    assert metrics["tokens"] == sum(len(p.chosen.tokens) + len(p.rejected.tokens) for p in pairs)
    assert metrics["positions"] == REFERENCE.collate(pairs).positions
    assert 0 < metrics["seconds"] < time.perf_counter() - started
    assert metrics.keys() >= memory_metrics().keys()
    assert (step.step, step.total_steps, step.epoch, step.nonfinite) == (1, 6, 4 / 12, None)
    assert step.as_dict() == {"step": 1, "epoch": 0.3333, **metrics}


def test_the_metrics_are_means_in_float64() -> None:
    values = np.array([-1.0, -1e-8, -1e-8, -1e-8] * 2, np.float32)
    engine = reference_with(lambda logps: mx.array(values) + 0.0 * logps)
    step = next(train_steps(model_with_lora(), PAIRS, step_config(), engine))
    assert step.metrics["logps/chosen"] == values[:4].mean(dtype=np.float64)


@pytest.mark.parametrize(
    ("setting", "by_itself", "traces"),
    [(None, True, 1), (None, False, 0), (True, False, 1), (False, True, 0)],
)
def test_a_step_is_compiled_if_the_setting_or_else_the_engine_says_so(
    setting: bool | None, by_itself: bool, traces: int
) -> None:
    config = step_config(engine="reference", compile=setting)
    engine = REFERENCE._replace(compiled=by_itself)
    step = next(train_steps(model_with_lora(), PAIRS, config, engine))
    assert step.metrics["traces"] == traces


@pytest.mark.parametrize("setting", [True, False])
def test_layers_are_recomputed_if_the_setting_says_so(setting: bool) -> None:
    model, seen = model_with_lora(), []

    def note(logps: mx.array) -> mx.array:
        seen.append(is_checkpointed(model))
        return logps

    config = step_config(gradient_checkpointing=setting, compile=False)
    next(train_steps(model, PAIRS, config, reference_with(note)))
    assert seen == [setting]


def test_the_next_pairs_are_collated_while_the_device_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient and the update are submitted, then come the next pairs, and then the results."""
    events: list[str] = []
    submit, wait = mx.async_eval, mx.eval
    monkeypatch.setattr(mx, "async_eval", lambda *a: events.append("submit") or submit(*a))
    monkeypatch.setattr(mx, "eval", lambda *a: events.append("wait") or wait(*a))
    engine = REFERENCE._replace(
        collate=lambda pairs: events.append("collate") or REFERENCE.collate(pairs)
    )
    steps = train_steps(model_with_lora(), PAIRS, step_config(compile=False), engine)
    events.clear()  # of the model
    next(steps)
    assert events == ["collate", "submit", "submit", "collate", "wait"]


@pytest.mark.parametrize("names", [("a", "b"), ("a",)])
def test_the_pairs_of_each_source_are_counted_if_there_are_several(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    pairs = make_pairs(6)
    stored = {name: write_and_open(tmp_path / name, pairs, [b""] * 6) for name in names}
    config = step_config(batch_size=6 * len(names))
    step = next(train_steps(model_with_lora(), Mixture(stored), config))
    counts = {name: count for name, count in step.metrics.items() if name.startswith("pairs")}
    each = {f"pairs/{name}": 6 for name in names} if len(names) > 1 else {}
    assert counts == {"pairs": 6 * len(names), **each}


def test_no_pairs_are_an_error() -> None:
    with pytest.raises(SimPOError, match="there are no pairs to train on"):
        next(train_steps(model_with_lora(), [], step_config()))


def untied_model() -> Any:
    """A model whose head does not see the embeddings, so that NaN in one stays in its pairs."""
    model = tiny_model(tie_word_embeddings=False)
    attach_lora(model, LoRAConfig(rank=4), seed=1)
    return model


def poisoned(model: Any, token: int) -> None:
    """Write NaN into the embedding of a token."""
    embedding = np.array(model.model.embed_tokens.weight)
    embedding[token] = np.nan
    model.model.embed_tokens.weight = mx.array(embedding)


def token_of_one_step(order: Sequence[int], step: int) -> int:
    """Return a token that only pairs of this step (from 0, four pairs each) have."""
    tokens = [
        {int(t) for i in order[start : start + 4] for t in PAIRS[i].chosen.tokens}
        for start in range(0, len(order), 4)
    ]
    others = set().union(*(t for i, t in enumerate(tokens) if i != step))
    others |= {
        int(t)
        for i, p in enumerate(PAIRS)
        if i not in order[4 * step : 4 * step + 4]
        for t in p.rejected.tokens
    }
    return min(tokens[step] - others)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_is_not_finite_can_be_skipped(compiled: bool) -> None:
    """Weights and moments stay as they were, and the learning rate follows its schedule."""
    config = step_config(engine="reference", compile=compiled, epochs=1.0, on_nonfinite="skip")
    order = epoch_order(PAIRS, config.seed).epoch(0).tolist()
    model, plain = untied_model(), untied_model()
    rates = [s.metrics["learning_rate"] for s in train_steps(plain, PAIRS, config)]
    poisoned(model, token_of_one_step(order, 1))
    state = TrainingState(model, config, 3)
    steps = train_steps(model, PAIRS, config, None, state)
    next(steps)
    before, moments = weights(model), {n: np.array(a) for n, a in state.arrays().items()}
    skipped = next(steps)
    assert (skipped.step, state.skipped) == (2, 1)
    assert skipped.nonfinite is not None
    assert skipped.nonfinite["what"] == "loss"
    assert len(skipped.nonfinite["pairs"]) == 4
    assert skipped.as_dict()["skipped"] == "loss"
    assert "loss" not in skipped.metrics
    assert all((before[n] == w).all() for n, w in weights(model).items())
    for name, array in state.arrays().items():
        if name.endswith((".m", ".v")):
            np.testing.assert_array_equal(array, moments[name], err_msg=name)
    third = next(steps)
    assert third.nonfinite is None
    assert third.metrics["learning_rate"] == rates[2]
    assert any((before[n] != w).any() for n, w in weights(model).items())


def test_too_many_skipped_steps_are_an_error() -> None:
    config = step_config(steps=5, on_nonfinite="skip", max_skipped=2)
    model = model_with_lora()
    poisoned(model, int(PAIRS[0].chosen.tokens[0]))  # every pair begins with this token
    steps = train_steps(model, PAIRS, config)
    assert [next(steps).step, next(steps).step] == [1, 2]
    message = (
        "the loss of step 3 is not .*; 2 were skipped before, and train.max_skipped is no higher"
    )
    with pytest.raises(NonFiniteError, match=message) as error:
        next(steps)
    assert error.value.record["step"] == 3
