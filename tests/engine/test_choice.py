"""Which engine a model gets, and what the user is told about it."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.architectures import RECURRENT, architecture_with_lora
from helpers.gradients import run
from helpers.tiny import tiny_model
from helpers.tiny import token_pair as pair

from mlx_simpo import SimPOError
from mlx_simpo.engine import choice, prefix_cache
from mlx_simpo.engine.choice import REFERENCE, choose_engine, shared_prefix_engine

PAIRS = [pair(40, 20, 7), pair(35, 3, 60)]
NOT_SHARED = "reference (one stacked forward pass): the prefix cannot be shared, "


def test_the_reference_is_chosen_by_name() -> None:
    assert choose_engine("reference", tiny_model()) is REFERENCE


def test_the_note_says_what_runs() -> None:
    engine = choose_engine("shared_prefix", tiny_model(), "mlx")
    assert engine.name == "shared_prefix"
    assert engine.note == (
        "shared_prefix (each prompt runs once, only scored tokens reach the head); "
        "log-probabilities: MLX's own operations, as logps.impl=mlx asks"
    )
    assert not engine.compiled
    assert REFERENCE.compiled


def test_an_implementation_that_cannot_run_is_an_error_and_not_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    with pytest.raises(SimPOError, match=r"logps\.impl is kernel, but MLX runs on the CPU"):
        choose_engine("shared_prefix", tiny_model(), "kernel")


@pytest.mark.parametrize("name", RECURRENT)
def test_a_state_that_cannot_be_forked_takes_the_reference_and_says_so(name: str) -> None:
    model = architecture_with_lora(name)
    engine = choose_engine("shared_prefix", model)
    assert engine.name == "reference"
    reason = "its layers keep a state that cannot be forked (ArraysCache)"
    assert engine.note == NOT_SHARED + reason
    values = run(model, engine, PAIRS[:1])
    assert all(np.isfinite(value).all() for value in values.values())
    assert any(value.any() for key, value in values.items() if key != "logps")


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_computes_otherwise_takes_the_reference_and_says_so(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache.PrefixKVCache, "make_mask", lambda *args, **kwargs: None)
    model = tiny_model().train(training)
    engine = choose_engine("shared_prefix", model)
    assert engine.name == "reference"
    assert engine.note.startswith(NOT_SHARED + "its log-probabilities differ by ")
    assert engine.note.endswith(" in a trial")
    assert model.training == training


@pytest.mark.parametrize("error", [TypeError, ValueError, AttributeError, KeyError])
def test_a_model_that_cannot_run_it_takes_the_reference_and_says_so(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise error("no cache here")

    monkeypatch.setattr(choice, "shared_prefix_logps", failing)
    model = tiny_model().train()
    engine = choose_engine("shared_prefix", model)
    assert engine.name == "reference"
    assert (
        engine.note == f"{NOT_SHARED}this architecture fails in a trial ({error('no cache here')})"
    )
    assert model.training


def test_dropout_does_not_disturb_the_trial() -> None:
    model = architecture_with_lora(dropout=0.5).train()
    assert choose_engine("shared_prefix", model).name == "shared_prefix"


def test_the_head_is_resolved_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = architecture_with_lora(), []
    original = choice.resolve_head
    monkeypatch.setattr(choice, "resolve_head", lambda m: calls.append(m) or original(m))
    engine = shared_prefix_engine(model)
    for _ in range(2):
        run(model, engine, PAIRS)
    assert calls == [model]


def test_a_micro_batch_counts_what_runs() -> None:
    pairs = [pair(20, 5, 5)]
    stacked = REFERENCE.collate(pairs)
    assert (stacked.positions, stacked.head_positions) == (2 * 31, 2 * 31)  # padded to 32
    shared = shared_prefix_engine(tiny_model()).collate(pairs)
    assert (shared.positions, shared.head_positions) == (19 + 5 + 5, 5 + 5)
