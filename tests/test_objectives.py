"""SimPO's loss against TRL's and Liger's recorded values, closed forms and properties."""

import inspect
import json
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from golden.objective_cases import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import ObjectiveConfig, simpo_loss

GOLDEN = json.loads((Path(__file__).parent / "golden" / "objective.json").read_text())
LOGPS = st.lists(st.floats(-20, -0.0078125, width=32), min_size=2, max_size=8)


def loss_and_gradients(case: Case) -> dict:
    def loss(chosen: mx.array, rejected: mx.array) -> mx.array:
        return simpo_loss(
            chosen,
            rejected,
            beta=case.beta,
            gamma_beta_ratio=case.gamma_beta_ratio,
            loss_type=case.loss_type,
            label_smoothing=case.label_smoothing,
        )[0]

    chosen, rejected = map(mx.array, case.inputs())
    value, (d_chosen, d_rejected) = mx.value_and_grad(loss, argnums=(0, 1))(chosen, rejected)
    return {"loss": value.item(), "d_chosen": d_chosen, "d_rejected": d_rejected}


@pytest.mark.parametrize("library", ["trl", "liger"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_trl_and_liger(case: Case, library: str) -> None:
    expected = GOLDEN[library].get(case.name)
    if expected is None:
        assert (library, case.loss_type) == ("liger", "hinge")  # Liger has none
        return
    actual = loss_and_gradients(case)
    for name in ("loss", "d_chosen", "d_rejected"):
        np.testing.assert_allclose(np.array(actual[name]), expected[name], rtol=1e-6, atol=1e-6)


def test_the_gradient_is_the_published_one() -> None:
    """∂loss/∂c̄ = −beta · σ(−z) / B, and the opposite for r̄."""
    case = CASES[0]
    actual = loss_and_gradients(case)
    chosen, rejected = (x.astype(np.float64) for x in case.inputs())
    z = case.beta * (chosen - rejected - case.gamma_beta_ratio)
    expected = -case.beta / (1 + np.exp(z)) / case.pairs
    np.testing.assert_allclose(np.array(actual["d_chosen"]), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.array(actual["d_rejected"]), -expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("beta", "ratio", "expected"), [(2.5, 0.55, 1.60), (10.0, 0.5, 5.01), (2.0, 0.0, math.log(2))]
)
def test_the_loss_without_a_preference(beta: float, ratio: float, expected: float) -> None:
    """−log σ(−gamma), as in the authors' recipes."""
    loss, _ = simpo_loss(mx.array([-1.5]), mx.array([-1.5]), beta=beta, gamma_beta_ratio=ratio)
    assert loss.item() == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
@given(chosen=LOGPS, rejected=LOGPS)
@settings(deadline=None, max_examples=40)
def test_swapping_the_responses_flips_the_margins(
    chosen: list[float], rejected: list[float], loss_type: str
) -> None:
    n = min(len(chosen), len(rejected))
    c, r = mx.array(chosen[:n]), mx.array(rejected[:n])
    _, metrics = simpo_loss(c, r, loss_type=loss_type)
    _, swapped = simpo_loss(r, c, loss_type=loss_type)
    assert (metrics["rewards/margins"] == -swapped["rewards/margins"]).all()
    assert (metrics["rewards/chosen"] == swapped["rewards/rejected"]).all()
    both = metrics["rewards/accuracies"] + swapped["rewards/accuracies"]
    assert ((both == 1) | (c == r)).all()


@given(values=LOGPS, parts=st.integers(1, 4), weight=st.sampled_from([0.0, 0.7]))
@settings(deadline=None, max_examples=40)
def test_parts_add_up_to_the_whole_batch(values: list[float], parts: int, weight: float) -> None:
    """Gradient accumulation: unequal parts with the whole batch's totals, the SFT term included."""
    chosen, rejected = mx.array(values), mx.array(values[::-1])
    tokens = mx.arange(3, 3 + len(values))

    def total(chosen: mx.array, edges: list[int]) -> mx.array:
        losses = (
            simpo_loss(
                chosen[a:b],
                rejected[a:b],
                tokens[a:b],
                sft_weight=weight,
                total_pairs=len(values),
                total_chosen_tokens=tokens.sum(),
            )[0]
            for a, b in pairwise(edges)
            if b > a
        )
        return sum(losses, start=mx.array(0.0))

    edges = [0, *sorted({min(len(values), 1 + 2 * i) for i in range(parts)}), len(values)]
    whole, whole_gradient = mx.value_and_grad(total)(chosen, [0, len(values)])
    split, split_gradient = mx.value_and_grad(total)(chosen, edges)
    np.testing.assert_allclose(split.item(), whole.item(), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(np.array(split_gradient), np.array(whole_gradient), atol=1e-6)


def test_the_sft_term_is_the_token_mean_cross_entropy() -> None:
    chosen, rejected = mx.array([-1.0, -3.0]), mx.array([-2.0, -2.0])
    tokens = mx.array([1, 3])
    plain, _ = simpo_loss(chosen, rejected)
    loss, metrics = simpo_loss(chosen, rejected, tokens, sft_weight=0.5)
    # Summed log-probabilities −1 and −9 over 4 tokens: 2.5, not the mean of the averages, 2.
    assert (loss - plain).item() == pytest.approx(0.5 * 2.5)
    assert metrics["sft_loss"].mean().item() == pytest.approx(2.5)
    assert metrics["loss"].mean().item() == pytest.approx(loss.item())


def test_accuracy_is_per_pair_and_strict() -> None:
    """Three of four pairs are right although the batch means are not; a tie is not right."""
    chosen, rejected = mx.array([-1.0, -1.0, -1.0, -9.0]), mx.array([-2.0, -2.0, -2.0, -1.0])
    _, metrics = simpo_loss(chosen, rejected)
    assert metrics["rewards/accuracies"].mean().item() == 0.75
    _, tie = simpo_loss(mx.array([-1.0]), mx.array([-1.0]))
    assert tie["rewards/accuracies"].item() == 0


def test_the_metrics_of_a_pair() -> None:
    """Rewards are beta · log-probability, without gamma."""
    _, metrics = simpo_loss(mx.array([-1.5]), mx.array([-2.0]), beta=10.0, gamma_beta_ratio=0.3)
    assert {name: value.item() for name, value in metrics.items()} == {
        "loss": pytest.approx(math.log1p(math.exp(-2.0)), rel=1e-6),
        "rewards/chosen": -15.0,
        "rewards/rejected": -20.0,
        "rewards/margins": 5.0,
        "rewards/accuracies": 1.0,
        "logps/chosen": -1.5,
        "logps/rejected": -2.0,
    }
    assert {value.dtype for value in metrics.values()} == {mx.float32}


def test_the_defaults_are_those_of_the_configuration() -> None:
    parameters = inspect.signature(simpo_loss).parameters
    expected = asdict(ObjectiveConfig())
    assert {name: parameters[name].default for name in expected} == expected


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite(margin: float) -> None:
    loss, gradient = mx.value_and_grad(lambda c: simpo_loss(c, mx.array([0.0]), beta=10.0)[0])(
        mx.array([margin])
    )
    assert math.isfinite(float(loss))
    assert math.isfinite(gradient.item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, "loss_type is 'ipo'; it must be 'sigmoid' or 'hinge'"),
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "label_smoothing has no meaning for the hinge loss; set it to 0",
        ),
        (
            {"sft_weight": 1.0},
            "sft_weight needs chosen_tokens, the lengths of the chosen responses",
        ),
    ],
)
def test_options_that_exclude_each_other_are_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simpo_loss(mx.array([-1.0]), mx.array([-2.0]), **options)
