"""Advice: each piece is given exactly when its condition holds, with the right figure."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import tiny_config, tiny_model
from mlx_lm.models.cache import make_prompt_cache

from mlx_simpo import DataConfig, Evaluation, ObjectiveConfig, simpo_loss
from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.reporting.advice import (
    collapse,
    ignored_window,
    slow_blas,
    slow_on_cpu,
    starting_loss,
    truncation,
)

# --- windows that mlx-lm leaves out -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "max_length", "said"),
    [
        ("mistral", {"sliding_window": 64}, 65, True),
        ("mistral", {"sliding_window": 64}, 64, False),
        ("mistral", {"sliding_window": None}, 65, False),
        ("gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 8}, 65, True),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, 65, False),
        ("gemma3_text", {"sliding_window": 64, "sliding_window_pattern": 2}, 65, False),
    ],
)
def test_a_window_that_is_left_out_matters_beyond_it(
    name: str, settings: dict, max_length: int, said: bool
) -> None:
    caches = make_prompt_cache(tiny_model(name, **settings))
    found = ignored_window(tiny_config(name, **settings), caches, max_length)
    assert (found is not None) is said
    if found:
        assert "sliding window of 64 tokens" in found
        assert "data.max_length is 65" in found


# --- the loss a run starts with --------------------------------------------------------------


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
    return loss.item()


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
    advice = starting_loss(ObjectiveConfig(beta=2.5, gamma_beta_ratio=0.6))
    assert advice is not None
    assert advice.endswith("gamma = beta × gamma_beta_ratio = 1.5")


def test_the_starting_loss_is_one_tidy_sentence() -> None:
    advice = starting_loss(ObjectiveConfig())
    assert advice is not None
    assert advice == " ".join(advice.split())


@pytest.mark.parametrize(
    "objective",
    [ObjectiveConfig(gamma_beta_ratio=0.0), ObjectiveConfig(loss_type="hinge")],
    ids=["no-margin", "hinge"],
)
def test_no_starting_loss_where_none_surprises(objective: ObjectiveConfig) -> None:
    assert starting_loss(objective) is None


# --- what was cut ----------------------------------------------------------------------------


def pair(cut_prompt: int = 0, cut_response: int = 0) -> EncodedPair:
    scored = TokenizedSequence(np.array([1, 2, 3], np.int32), 1)
    return EncodedPair(scored, scored, cut_prompt=cut_prompt, cut_response=cut_response)


@pytest.mark.parametrize("pairs", [[], [pair()], [pair(), pair()]], ids=len)
def test_nothing_cut_is_nothing_said(pairs: list[EncodedPair]) -> None:
    assert truncation(pairs, DataConfig()) is None


@pytest.mark.parametrize(
    ("pairs", "prompts", "answers", "tokens"),
    [
        ([pair(), pair(1)], 1, 0, 1),
        ([pair(), pair(0, 4)], 0, 1, 4),
        ([pair(3, 5), pair(2), pair(0, 7), pair(1, 1), pair()], 3, 3, 19),
    ],
)
def test_what_was_cut_is_counted(
    pairs: list[EncodedPair], prompts: int, answers: int, tokens: int
) -> None:
    assert truncation(pairs, DataConfig(max_length=600)) == (
        f"longer than data.max_length=600: prompts of {prompts} pairs cut on the left, answers of "
        f"{answers} pairs on the right, {tokens} tokens in all"
    )


# --- dtype -----------------------------------------------------------------------------------


def on(monkeypatch: pytest.MonkeyPatch, device: mx.DeviceType) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_slow_on_a_cpu(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, mx.cpu)
    advice = slow_on_cpu(dtype, False)
    assert advice is not None
    assert f"computes in {dtype}" in advice
    assert "dtype=float32" in advice


def test_a_missing_blas_matters_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_simpo.blas.missing", lambda: "none there")
    on(monkeypatch, mx.cpu)
    assert slow_blas() == "no OpenBLAS, this will be slow: none there"
    on(monkeypatch, mx.gpu)
    assert slow_blas() is None


def test_quantized_is_slow_on_a_cpu_whatever_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, mx.cpu)
    assert "quantized" in (slow_on_cpu("float32", True) or "")
    on(monkeypatch, mx.gpu)
    assert slow_on_cpu("float32", True) is None


def test_float32_is_fast_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, mx.cpu)
    assert slow_on_cpu("float32", False) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_is_fast_on_a_gpu(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, mx.gpu)
    assert slow_on_cpu(dtype, False) is None


# --- collapse --------------------------------------------------------------------------------


def evaluated(chosen: float, **metrics: Any) -> Evaluation:
    none = np.zeros(0, np.float32)
    return Evaluation((), {"logps/chosen": chosen, **metrics}, (0.0, 1.0), none, none, none)


@pytest.mark.parametrize("after", [-0.5, -1.0, -1.4, -2.0])
def test_a_small_fall_is_normal(after: float) -> None:
    assert collapse(evaluated(-1.0), evaluated(after)) is None


def test_a_fall_of_the_rejected_answers_is_the_aim() -> None:
    before = evaluated(-1.0, **{"logps/rejected": -1.0})
    assert collapse(before, evaluated(-1.0, **{"logps/rejected": -9.0})) is None


def test_a_fall_of_more_than_a_nat_a_token_is_told() -> None:
    advice = collapse(evaluated(-1.0), evaluated(-3.5))
    assert advice is not None
    assert "2.5 nats a token less likely" in advice
    assert "train.learning_rate" in advice
    assert collapse(evaluated(-1.0), evaluated(-2.01)) is not None
