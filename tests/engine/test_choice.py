"""Which engine a model gets, and what the user is told about it."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.architectures import architecture, architecture_with_lora
from helpers.chunks import recorded_bounds
from helpers.devices import on_stand_in_gpu
from helpers.gradients import run
from helpers.states import no_fork, overwrite
from helpers.tiny import tiny_model
from helpers.tiny import token_pair as pair
from mlx_lm.models import rwkv7
from mlx_lm.models.cache import QuantizedKVCache

from mlx_simpo import SimPOError
from mlx_simpo.engine import choice, prefix_cache, shared_prefix
from mlx_simpo.engine.choice import (
    REFERENCE,
    check_gradient,
    choose_engine,
    disagreement_with_reference,
    shared_prefix_engine,
)
from mlx_simpo.engine.figures import CPU

PAIRS = [pair(40, 20, 7), pair(35, 3, 60)]
NOT_SHARED = "reference (one stacked forward pass): the prefix cannot be shared, "


def test_the_reference_is_chosen_by_name() -> None:
    assert choose_engine("reference", tiny_model()) is REFERENCE


def test_the_note_says_what_runs() -> None:
    engine = choose_engine("shared_prefix", tiny_model(), "mlx")
    assert engine.name == "shared_prefix"
    assert engine.note.startswith(
        "shared_prefix (each prompt runs once, only scored tokens reach the head); attention: "
    )
    assert "; log-probabilities: MLX's own operations, as logps.impl=mlx asks; " in engine.note
    assert not engine.compiled
    assert REFERENCE.compiled


def test_an_implementation_that_cannot_run_is_an_error_and_not_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    with pytest.raises(SimPOError, match=r"logps\.impl is kernel, but MLX runs on the CPU"):
        choose_engine("shared_prefix", tiny_model(), "kernel")


def test_a_state_that_cannot_be_forked_takes_the_reference_and_says_so() -> None:
    model = architecture_with_lora()
    quantized = [QuantizedKVCache() for _ in model.layers]
    object.__setattr__(model, "make_cache", lambda: quantized)
    engine = choose_engine("shared_prefix", model)
    assert engine.name == "reference"
    assert engine.note == NOT_SHARED + (
        "its layers keep a state that this engine does not know how to fork (QuantizedKVCache)"
    )
    values = run(model, engine, PAIRS[:1])
    assert all(np.isfinite(value).all() for value in values.values())


@pytest.mark.parametrize("vocabulary", [2, 3, 7, 49])
def test_a_small_vocabulary_shares_too_and_has_the_kernel_that_was_asked_for(
    vocabulary: int,
) -> None:
    """The trial's tokens are all within it."""
    with on_stand_in_gpu():
        engine = choose_engine("shared_prefix", tiny_model(vocab_size=vocabulary), "kernel")
    assert engine.name == "shared_prefix", engine.note
    assert "; log-probabilities: the Metal kernel, which agrees with " in engine.note


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "plamo2", "recurrent_gemma"])
def test_rounding_of_half_precision_is_no_disagreement(name: str, dtype: mx.Dtype) -> None:
    """Recurrences round differently where they begin from a state."""
    model = architecture(name)
    model.set_dtype(dtype)
    engine = choose_engine("shared_prefix", model)
    assert engine.name == "shared_prefix", engine.note


# --- what the trial notices ------------------------------------------------------------------


def padded(model: Any, tokens: mx.array) -> list:
    """The states after a prefix with a token of padding behind it."""
    return prefix_cache.run_prefix(model, mx.pad(tokens, [(0, 0), (0, 1)]))


@pytest.mark.parametrize(
    ("defect", "name"),
    [
        (defect, name)
        for defect in ("leak", "alias", "padding", "order")
        for name in ("mamba", "qwen3_5", "falcon_h1")
    ]
    + [("leak", "llama"), ("padding", "llama"), ("order", "llama")],
)
def test_the_trial_notices(defect: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = architecture(name)
    if defect == "leak":
        monkeypatch.setattr(prefix_cache, "with_arrays", no_fork)
    elif defect == "alias":
        monkeypatch.setattr(prefix_cache.PrefixStates, "__setitem__", overwrite)
        assert choose_engine("shared_prefix", model).name == "shared_prefix"
        original, forks = prefix_cache.with_arrays, {}

        def one_fork(cache: Any, arrays: Any) -> Any:
            """A new cache for each pass, which holds the arrays of the first."""
            forked = prefix_cache.cache_arrays(original(cache, arrays))
            # With the cache, so that no later one gets its id.
            return original(cache, forks.setdefault(id(cache), (cache, forked))[1])

        monkeypatch.setattr(prefix_cache, "with_arrays", one_fork)
    elif defect == "padding":
        monkeypatch.setattr(shared_prefix, "run_prefix", padded)
    else:  # every continuation follows the first prefix
        continuations = shared_prefix.run_continuations

        def misdirected(model: Any, tokens: mx.array, prefix: Any, index: Any) -> mx.array:
            return continuations(model, tokens, prefix, mx.zeros(len(tokens), mx.int32))

        monkeypatch.setattr(shared_prefix, "run_continuations", misdirected)
    engine = choose_engine("shared_prefix", model)
    assert engine.name == "reference"
    assert "the prefix cannot be shared, its log-probabilities differ by" in engine.note


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


# --- a gradient on this device ---------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("engine", ["reference", "shared_prefix"])
def test_a_model_that_can_be_trained_passes(engine: str, training: bool) -> None:
    model = architecture_with_lora("qwen3_5").train(training)
    check_gradient(model, choose_engine(engine, model))
    assert model.training == training


@pytest.mark.parametrize("engine", ["reference", "shared_prefix"])
@pytest.mark.parametrize("device", [mx.cpu, mx.gpu])
def test_an_operation_without_a_gradient_is_reported(
    engine: str, device: mx.DeviceType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kernel of mlx-lm's on a Mac: an operation that MLX has no gradient of."""
    model = architecture_with_lora("rwkv7")
    chosen = choose_engine(engine, model)
    step = rwkv7._wkv7_step_ops

    def without_gradient(*args: Any) -> Any:
        output, state = step(*args)
        return output, mx.linalg.qr(state, stream=mx.cpu)[0]

    monkeypatch.setattr(rwkv7, "_wkv7_step_ops", without_gradient)
    monkeypatch.setattr(choice, "is_gpu", lambda: device == mx.gpu)
    with pytest.raises(SimPOError) as error:
        check_gradient(model, chosen)
    where = "a GPU" if device == mx.gpu else "the CPU"
    remedy = "; train another model"
    if device == mx.gpu:
        remedy += ", or this one on the CPU: from Python, after mx.set_default_device(mx.cpu)"
    assert str(error.value) == (
        f"the model cannot be trained here: mlx-lm computes a part of it on {where} with an "
        f"operation that has no gradient ([Primitive::vjp] Not implemented for QRF.){remedy}"
    )


def test_other_errors_are_not_taken_for_a_missing_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architecture_with_lora()
    engine = shared_prefix_engine(model)

    def failing(*args: Any, **kwargs: Any) -> None:
        raise ValueError("shapes")

    with pytest.raises(ValueError, match="shapes"):
        check_gradient(model, engine._replace(logps=failing))


# --- in which ways the trial and the engine compute --------------------------------------------


def test_the_trial_forks_prefixes_with_an_index_and_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    indices = []
    original = shared_prefix.run_continuations

    def recording(model: Any, tokens: mx.array, prefix: Any, index: Any) -> mx.array:
        indices.append(index if index is None else index.tolist())
        return original(model, tokens, prefix, index)

    monkeypatch.setattr(shared_prefix, "run_continuations", recording)
    for name in ("mamba", "llama"):
        choose_engine("shared_prefix", architecture(name))
        separate, extended = [None, None, [1], [0], [1], [0]], [None]
        assert indices == separate + (extended if name == "llama" else [])
        indices.clear()


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
@pytest.mark.parametrize("where", ["training", "evaluation", "one pass for prefix and sequence"])
def test_the_trial_notices_what_is_wrong_in_one_way_to_compute(where: str, wrong: float) -> None:
    model = architecture("llama")
    engine, kinds = shared_prefix_engine(model), set()

    def logps(model: Any, arrays: tuple, training: bool) -> mx.array:
        tokens, prefix_length = arrays[0], arrays[-1]
        kind = "training" if training else "evaluation"
        if tokens.shape[1] > prefix_length:
            kind = "one pass for prefix and sequence"
        kinds.add(kind)
        return engine.logps(model, arrays, training=training) + (wrong if kind == where else 0)

    reason = disagreement_with_reference(model, engine._replace(logps=logps))
    assert reason == f"its log-probabilities differ by {wrong:.3g} in a trial"
    assert len(kinds) == 3


@pytest.mark.parametrize("extends", [True, False])
def test_an_engine_runs_prefixes_with_a_sequence_where_the_model_allows_it(extends: bool) -> None:
    engine = shared_prefix_engine(architecture("llama" if extends else "qwen3_5"))
    arrays = engine.collate(PAIRS[:1]).arrays
    tokens, prefix_length = arrays[0], arrays[-1]
    assert tokens.shape[1] == prefix_length + (20 if extends else 0)


def test_an_engine_computes_as_many_logits_at_once_as_its_figures_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounds = recorded_bounds(monkeypatch)
    model = tiny_model()
    engine = shared_prefix_engine(model, figures=replace(CPU, chunk_logits=777))
    engine.logps(model, engine.collate(PAIRS).arrays, training=True)
    assert bounds == [777]
