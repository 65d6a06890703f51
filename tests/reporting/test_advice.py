"""Advice: each message is there exactly if its condition holds, with the right numbers."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import tiny_config, tiny_model
from mlx_lm.models.cache import make_prompt_cache

from mlx_simpo import DataConfig, Evaluation, ObjectiveConfig, simpo_loss
from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.model.loading import LoadedModel
from mlx_simpo.model.record import base_record
from mlx_simpo.reporting.advice import (
    adapter_mismatch,
    collapse,
    ended_worse,
    ignored_window,
    slow_blas,
    slow_on_cpu,
    starting_loss,
    truncation,
)

# --- sliding windows that mlx-lm ignores -----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "max_length", "warns"),
    [
        ("mistral", {"sliding_window": 64}, 65, True),
        ("mistral", {"sliding_window": 64}, 64, False),
        ("mistral", {"sliding_window": None}, 65, False),
        ("gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 8}, 65, True),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, 65, False),
        ("gemma3_text", {"sliding_window": 64, "sliding_window_pattern": 2}, 65, False),
    ],
)
def test_an_ignored_window_matters_for_longer_sequences(
    name: str, settings: dict, max_length: int, warns: bool
) -> None:
    caches = make_prompt_cache(tiny_model(name, **settings))
    message = ignored_window(tiny_config(name, **settings), caches, max_length)
    assert message == (
        "the model has a sliding window of 64 tokens, which mlx-lm ignores; the log-probabilities "
        "of longer sequences (data.max_length is 65) differ from the original model's: set "
        "data.max_length=64"
        if warns
        else None
    )


# --- the first loss --------------------------------------------------------------------------


def undecided_loss(objective: ObjectiveConfig) -> float:
    """SimPO's loss on a pair that the model finds equally likely."""
    equal = mx.array([-1.5])
    loss, _ = simpo_loss(
        equal,
        equal,
        beta=objective.beta,
        gamma_beta_ratio=objective.gamma_beta_ratio,
        label_smoothing=objective.label_smoothing,
    )
    return float(loss)


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(),
        ObjectiveConfig(beta=10.0, gamma_beta_ratio=0.3),
        ObjectiveConfig(beta=2.5, gamma_beta_ratio=1.0),
        ObjectiveConfig(beta=1000.0, gamma_beta_ratio=2.0),
        ObjectiveConfig(label_smoothing=0.2),
    ],
    ids=str,
)
def test_the_starting_loss_is_that_of_an_undecided_model(objective: ObjectiveConfig) -> None:
    advice = starting_loss(objective)
    assert advice is not None
    assert f"has a loss of {undecided_loss(objective):.2f} here, not 0.69" in advice


def test_the_starting_loss_names_the_margin() -> None:
    assert starting_loss(ObjectiveConfig(beta=2.5, gamma_beta_ratio=0.6)) == (
        "a model without a preference has a loss of 1.70 here, not 0.69: the target margin is "
        "gamma = beta × gamma_beta_ratio = 1.5"
    )


@pytest.mark.parametrize(
    "objective",
    [ObjectiveConfig(gamma_beta_ratio=0.0), ObjectiveConfig(loss_type="hinge")],
    ids=["no-margin", "hinge"],
)
def test_a_starting_loss_without_a_margin_needs_no_advice(objective: ObjectiveConfig) -> None:
    assert starting_loss(objective) is None


# --- truncation ------------------------------------------------------------------------------


def pair(cut_prompt: int = 0, cut_response: int = 0) -> EncodedPair:
    sequence = TokenizedSequence(np.array([1, 2, 3], np.int32), 1)
    return EncodedPair(sequence, sequence, cut_prompt=cut_prompt, cut_response=cut_response)


@pytest.mark.parametrize("pairs", [[], [pair()], [pair(), pair()]], ids=len)
def test_without_truncation_there_is_no_message(pairs: list[EncodedPair]) -> None:
    assert truncation(pairs, DataConfig()) is None


@pytest.mark.parametrize(
    ("pairs", "prompts", "responses", "tokens"),
    [
        ([pair(), pair(1)], 1, 0, 1),
        ([pair(), pair(0, 4)], 0, 1, 4),
        ([pair(3, 5), pair(2), pair(0, 7), pair(1, 1), pair()], 3, 3, 19),
    ],
)
def test_truncated_pairs_and_tokens_are_counted(
    pairs: list[EncodedPair], prompts: int, responses: int, tokens: int
) -> None:
    assert truncation(pairs, DataConfig(max_length=600)) == (
        f"longer than data.max_length=600: prompts cut on the left in {prompts} pairs, responses "
        f"cut on the right in {responses} pairs, {tokens} tokens in all"
    )


# --- slow models -----------------------------------------------------------------------------


def run_on(monkeypatch: pytest.MonkeyPatch, device: mx.DeviceType) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_slow_on_a_cpu(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(monkeypatch, mx.cpu)
    expected = f"the model computes in {dtype}, which is slow on a CPU; set dtype=float32"
    assert slow_on_cpu(dtype, False) == expected


def test_a_missing_blas_matters_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_simpo.blas.missing", lambda: "none there")
    run_on(monkeypatch, mx.cpu)
    assert slow_blas() == "MLX runs without OpenBLAS, which is slow: none there"
    run_on(monkeypatch, mx.gpu)
    assert slow_blas() is None


def test_a_quantized_model_is_slow_on_a_cpu_whatever_its_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_on(monkeypatch, mx.cpu)
    assert "use a model that is not quantized" in (slow_on_cpu("float32", True) or "")
    run_on(monkeypatch, mx.gpu)
    assert slow_on_cpu("float32", True) is None


def test_float32_is_fast_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(monkeypatch, mx.cpu)
    assert slow_on_cpu("float32", False) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_is_fast_on_a_gpu(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(monkeypatch, mx.gpu)
    assert slow_on_cpu(dtype, False) is None


# --- an adapter of another model -------------------------------------------------------------


def loaded(name: str, revision: str | None) -> LoadedModel:
    """A loaded model of which only the record is read."""
    return LoadedModel(None, None, {}, "float32", Path(), name, revision)  # type: ignore[arg-type]


def test_all_differences_of_an_adapters_model_are_in_one_message() -> None:
    record = {"base": base_record(loaded("org/one", "abc"))}
    assert adapter_mismatch(record, loaded("org/one", "abc")) is None
    assert adapter_mismatch({}, loaded("org/two", "def"), "a template") is None
    assert adapter_mismatch(record, loaded("org/two", "def")) == (
        "the adapter might not fit: model was org/one in training and is org/two now; revision was "
        "abc in training and is def now"
    )


REMEDY = "lower train.learning_rate, raise objective.beta, or set objective.sft_weight above 0"

# --- collapse --------------------------------------------------------------------------------


def evaluated(chosen: float, **metrics: Any) -> Evaluation:
    none = np.zeros(0, np.float32)
    values = {"logps/chosen": chosen, "logps/rejected": chosen, "loss": 1.0}
    values |= {"rewards/accuracies": 0.5, **metrics}
    losses = np.full(20, values["loss"], np.float32)
    return Evaluation((), values, (0.0, 1.0), none, none, none, losses)


@pytest.mark.parametrize("after", [-0.5, -1.0, -1.4, -2.0])
def test_a_small_fall_is_normal(after: float) -> None:
    assert collapse(evaluated(-1.0), evaluated(after)) is None


def test_a_fall_of_the_rejected_responses_is_the_aim() -> None:
    before = evaluated(-1.0, **{"logps/rejected": -1.0})
    assert collapse(before, evaluated(-1.0, **{"logps/rejected": -9.0})) is None


def test_a_fall_of_more_than_1_nat_per_token_is_a_warning() -> None:
    assert collapse(evaluated(-1.0), evaluated(-3.5)) == (
        "the chosen responses have become 2.5 nats per token less likely; read some responses of "
        f"the model, and if they repeat themselves, {REMEDY}"
    )
    assert collapse(evaluated(-1.0), evaluated(-2.01)) is not None


# --- a run that ended worse than it began ----------------------------------------------------


def test_a_run_that_ended_better_has_no_message() -> None:
    before = evaluated(-2.0)
    for after in (evaluated(-2.0), evaluated(-4.0, loss=0.5), evaluated(-2.0, loss=1.005)):
        assert ended_worse(before, after, 49152) is None


def test_a_higher_loss_is_explained_with_its_figures() -> None:
    after = evaluated(-2.25, loss=1.5, **{"rewards/accuracies": 0.375})
    assert ended_worse(evaluated(-2.0), after, 49152) == (
        "the run ended worse than it began: loss from 1.00 to 1.50, logps/chosen from -2.00 to "
        f"-2.25, rewards/accuracies from 50.0% to 37.5%; {REMEDY}"
    )


def test_the_uniform_distribution_is_named_although_its_loss_is_lower() -> None:
    after = evaluated(-10.803, loss=0.9, **{"rewards/accuracies": 0.0})
    assert ended_worse(evaluated(-3.27), after, 49152) == (
        "the run ended worse than it began: loss from 1.00 to 0.90, logps/chosen from -3.27 to "
        "-10.80, rewards/accuracies from 50.0% to 0.0%; the model finds every token equally likely "
        f"(-ln 49152 = -10.80): its weights are destroyed; {REMEDY}"
    )


def test_less_likely_than_random_tokens_is_named_although_the_loss_is_0() -> None:
    after = evaluated(-29.8, loss=0.0, **{"rewards/accuracies": 1.0, "logps/rejected": -40.6})
    assert ended_worse(evaluated(-3.27), after, 49152) == (
        "the run ended worse than it began: loss from 1.00 to 0.00, logps/chosen from -3.27 to "
        "-29.80, rewards/accuracies from 50.0% to 100.0%; the model finds the chosen responses "
        f"less likely than random tokens, at -10.80; {REMEDY}"
    )
