"""Evaluation: per-pair results in input order, whatever the batches; the bootstrap interval."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.stored import make_pairs
from helpers.tiny import some_pairs, tiny_model, tiny_tokenizer

from mlx_simpo import (
    DataConfig,
    Evaluation,
    LoRAConfig,
    ObjectiveConfig,
    SimPOError,
    evaluate_pairs,
    evaluation,
)
from mlx_simpo.data.encode import EncodedPair, Encoder, TokenizedSequence, encode_pairs
from mlx_simpo.data.records import Pair
from mlx_simpo.engine.choice import REFERENCE
from mlx_simpo.engine.collate_stacked import collate_stacked
from mlx_simpo.engine.reference import average_logps
from mlx_simpo.evaluation import bootstrap_interval, has_collapsed, is_worse, summarize_logps
from mlx_simpo.model.lora import attach_lora

MODEL = tiny_model()
PAIRS, _ = encode_pairs(
    Encoder(tiny_tokenizer(), DataConfig()),
    [Pair(**record, index=10 * i) for i, record in enumerate(some_pairs(9))],
)


def test_per_pair_results_are_in_input_order_whatever_the_batches() -> None:
    result = evaluate_pairs(MODEL, PAIRS, ObjectiveConfig(beta=10.0), batch_size=2)
    for record, pair in zip(result.per_pair(), PAIRS, strict=True):
        batch = collate_stacked([pair])
        alone = np.array(average_logps(MODEL, batch.tokens, batch.score_start, batch.score_end))
        assert record["index"] == pair.index
        assert [record["chosen_logp"], record["rejected_logp"]] == pytest.approx(alone, abs=2e-5)
        assert record["margin"] == pytest.approx(10 * (alone[0] - alone[1]), abs=5e-4)
        assert record["chosen_tokens"] == len(pair.chosen.tokens) - pair.chosen.score_start
        assert record["rejected_tokens"] == len(pair.rejected.tokens) - pair.rejected.score_start
    other = evaluate_pairs(MODEL, PAIRS, ObjectiveConfig(beta=10.0), batch_size=9)
    np.testing.assert_allclose(other.margins, result.margins, atol=5e-4)


def test_metrics_are_means_over_pairs() -> None:
    result = evaluate_pairs(MODEL, PAIRS, ObjectiveConfig(sft_weight=0.3))
    metrics = result.metrics
    assert metrics["rewards/accuracies"] == np.mean(result.margins > 0)
    assert metrics["logps/chosen"] == result.chosen_logps.mean(dtype=np.float64)
    assert metrics["rewards/rejected"] == pytest.approx(2 * result.rejected_logps.mean())
    tokens = np.array([p.chosen.num_scored for p in PAIRS])
    nll = -(result.chosen_logps * tokens).sum() / tokens.sum()
    simpo = np.log1p(np.exp(-(result.margins - 1.0))).mean()
    assert metrics["loss"] == pytest.approx(simpo + 0.3 * nll, rel=1e-5)
    bounds = bootstrap_interval((result.margins > 0).astype(np.float32))
    assert result.accuracy_interval == bounds
    interval = {"rewards/accuracies_interval": [round(bound, 4) for bound in bounds]}
    assert result.as_dict() == {"pairs": 9, **metrics, **interval}


def test_the_tokens_of_a_response_are_counted_from_its_own_start() -> None:
    sequences = [TokenizedSequence(np.arange(8, dtype=np.int32), start) for start in (2, 3, 5)]
    pairs = [EncodedPair(sequences[0], sequences[1]), EncodedPair(sequences[1], sequences[2])]
    logps = np.array([-1.0, -3.0], np.float32)
    metrics = summarize_logps(pairs, logps, logps, ObjectiveConfig(sft_weight=1.0)).metrics
    assert (metrics["chosen_tokens"], metrics["rejected_tokens"]) == (5.5, 4.0)
    assert metrics["sft_loss"] == pytest.approx((6 * 1.0 + 5 * 3.0) / 11)


def test_dropout_is_off_and_the_mode_restored() -> None:
    model = tiny_model()
    attach_lora(model, LoRAConfig(rank=4, dropout=0.5), seed=0)
    model.layers[0].mlp.up_proj.lora_b += 1.0
    for training in (True, False):
        model.train(training)
        first, second = (evaluate_pairs(model, PAIRS, ObjectiveConfig()) for _ in range(2))
        assert (first.margins == second.margins).all()
        assert model.training == training


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [4, 4, 1]), ({"batch_size": 5}, [5, 4]), ({"max_tokens": 1}, [1] * 9)],
)
def test_batches_are_of_the_size_that_is_asked_for(options: dict, expected: list[int]) -> None:
    seen: list[int] = []
    evaluate_pairs(MODEL, PAIRS, ObjectiveConfig(), advance=seen.append, **options)
    assert seen == expected


def test_an_engine_is_told_that_no_gradient_follows() -> None:
    seen: list[bool] = []

    def logps(model: Any, arrays: tuple, training: bool) -> mx.array:
        seen.append(training)
        return REFERENCE.logps(model, arrays, training)

    engine = REFERENCE._replace(logps=logps)
    evaluate_pairs(MODEL, PAIRS[:1], ObjectiveConfig(), engine=engine)
    assert seen == [False]


def test_swapped_pairs_have_opposite_margins() -> None:
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in PAIRS]
    result = evaluate_pairs(MODEL, PAIRS, ObjectiveConfig())
    other = evaluate_pairs(MODEL, swapped, ObjectiveConfig())
    np.testing.assert_allclose(other.margins, -result.margins, atol=5e-4)


@pytest.mark.parametrize(("right", "total"), [(2, 4), (50, 100), (180, 200), (3, 40)])
def test_the_bootstrap_interval_of_zeros_and_ones_is_the_binomial_one(
    right: int, total: int
) -> None:
    """Quantiles of 10,000 resamples have a standard error of 0.16 %."""
    values = np.array([1.0] * right + [0.0] * (total - right))
    low, high = bootstrap_interval(values)
    counts = range(total + 1)
    shares = [math.comb(total, n) * right**n * (total - right) ** (total - n) for n in counts]
    cumulative = np.cumsum(shares) / total**total
    for tail, bound in ((0.025, low), (0.975, high)):
        least, most = np.searchsorted(cumulative, [tail - 0.004, tail + 0.004])
        assert least <= bound * total <= most
    assert bootstrap_interval(values) == (low, high)  # repeatable


def test_the_bootstrap_interval_covers_the_true_mean() -> None:
    """About 95 % of the intervals of 200 samples (of 60, with probability 0.6) contain 0.6."""
    rng = np.random.default_rng(5)
    samples = (rng.random((200, 60)) < 0.6).astype(np.float32)
    intervals = [bootstrap_interval(values, samples=400) for values in samples]
    covered = np.mean([low <= 0.6 <= high for low, high in intervals])
    assert 0.89 <= covered <= 0.99


@pytest.mark.parametrize("drawn_at_once", [1, 60, 7 * 60 + 1])
def test_the_bootstrap_interval_does_not_depend_on_how_much_is_drawn_at_once(
    drawn_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 times as many values as there are."""
    values = np.random.default_rng(2).normal(size=60)
    expected = bootstrap_interval(values)
    draws: list[tuple[int, int]] = []
    generator = np.random.default_rng(0)

    def integers(low: int, high: int, shape: tuple[int, int]) -> np.ndarray:
        draws.append(shape)
        return generator.integers(low, high, shape)

    monkeypatch.setattr(evaluation, "RESAMPLED_AT_ONCE", drawn_at_once)
    monkeypatch.setattr(np.random, "default_rng", lambda _: SimpleNamespace(integers=integers))
    assert bootstrap_interval(values) == expected
    assert sum(rows for rows, _ in draws) == 10_000
    assert max(rows for rows, _ in draws) == max(1, drawn_at_once // 60)


def test_one_pair_is_enough() -> None:
    result = evaluate_pairs(MODEL, PAIRS[:1], ObjectiveConfig())
    assert result.accuracy_interval in ((0.0, 0.0), (1.0, 1.0))
    assert mx.isfinite(mx.array(result.metrics["loss"]))


def test_tokens_that_the_model_does_not_have_are_an_error() -> None:
    """MLX would read other memory, and the loss would be a number all the same."""
    sequence = TokenizedSequence(np.array([1, 2, 600], np.int32), 1)
    pair = EncodedPair(sequence, PAIRS[0].rejected, 0, "f.jsonl:3")
    with pytest.raises(
        SimPOError, match=r"f.jsonl:3 has token 600, but the model has a vocabulary"
    ):
        evaluate_pairs(MODEL, [*PAIRS, pair], ObjectiveConfig())


# --- rebuilt from its arrays -----------------------------------------------------------------


@pytest.mark.parametrize("objective", [ObjectiveConfig(), ObjectiveConfig(beta=10, sft_weight=0.3)])
def test_an_evaluation_is_rebuilt_from_its_log_probabilities(objective: ObjectiveConfig) -> None:
    result = evaluate_pairs(MODEL, PAIRS, objective, batch_size=2)
    saved = [np.array(mx.array(logps)) for logps in (result.chosen_logps, result.rejected_logps)]
    rebuilt = summarize_logps(PAIRS, saved[0], saved[1], objective)
    assert rebuilt.as_dict() == result.as_dict()
    assert rebuilt.per_pair() == result.per_pair()
    assert (rebuilt.losses == result.losses).all()
    assert result.losses.mean() == pytest.approx(result.metrics["loss"])


@pytest.mark.parametrize("response", ["chosen", "rejected"])
def test_log_probabilities_that_are_not_finite_are_an_error(response: str) -> None:
    logps = {name: np.zeros(8, np.float32) for name in ("chosen_logps", "rejected_logps")}
    logps[f"{response}_logps"][2:] = [np.nan, np.inf, -np.inf, np.nan, np.nan, np.nan]
    with pytest.raises(SimPOError) as error:
        summarize_logps(make_pairs(8), **logps, objective=ObjectiveConfig())
    assert str(error.value) == (
        "the log-probabilities of 6 of 8 pairs are not finite numbers (f:2, f:3, f:4, f:5, f:6); "
        "if the model's weights are intact, try dtype=float32"
    )


def test_no_pairs_are_an_error() -> None:
    with pytest.raises(SimPOError, match="there are no pairs to evaluate on"):
        evaluate_pairs(MODEL, [], ObjectiveConfig())


# --- worse than before -----------------------------------------------------------------------


def evaluated(losses: Sequence[float] | np.ndarray, chosen: float = -1.0) -> Evaluation:
    none = np.zeros(0, np.float32)
    losses = np.array(losses, np.float32)
    metrics = {"loss": float(losses.mean()), "logps/chosen": chosen}
    return Evaluation((), metrics, (0.0, 1.0), none, none, none, losses)


def test_a_loss_that_rises_for_most_pairs_is_worse() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(0.5, 2.5, 40)
    change = rng.normal(0.2, 0.3, 40)
    assert is_worse(evaluated(before), evaluated(before + change))
    assert not is_worse(evaluated(before), evaluated(before - change))
    assert not is_worse(evaluated(before), evaluated(before))


def test_the_change_per_pair_decides_and_not_the_spread_of_the_pairs() -> None:
    before = np.linspace(0.1, 9.0, 30)
    assert is_worse(evaluated(before), evaluated(before + 0.1))


def test_chance_is_rarely_worse() -> None:
    """With no change in the mean, about 1 of 40 runs: the interval has 2.5 % on each side."""
    rng = np.random.default_rng(1)
    before = np.ones(50)
    results = [
        is_worse(evaluated(before), evaluated(before + rng.normal(0, 0.5, 50))) for _ in range(40)
    ]
    assert sum(results) <= 4


def test_a_rise_of_less_than_1_percent_is_not_worse() -> None:
    before = np.linspace(1.0, 2.0, 30)
    assert not is_worse(evaluated(before), evaluated(before * 1.009))
    assert is_worse(evaluated(before), evaluated(before * 1.011))
    hundred = np.full(30, 100.0)
    assert not is_worse(evaluated(hundred), evaluated(hundred + 1.0))
    assert is_worse(evaluated(hundred), evaluated(hundred + 1.125))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_pairs_must_all_be_far_worse(count: int) -> None:
    before = np.ones(count)
    assert is_worse(evaluated(before), evaluated(before + 1.5))
    assert not is_worse(evaluated(before), evaluated(before + 1.0))
    for first in (-0.1, 0.0):
        changes = np.where(np.arange(count) > 0, 8.0, first)
        assert not is_worse(evaluated(before), evaluated(before + changes))


def test_far_worse_is_twice_the_loss_and_at_least_1_more() -> None:
    for before, limit in ((0.25, 1.25), (1.0, 2.0), (4.0, 8.0)):
        assert not is_worse(evaluated([before] * 3), evaluated([limit] * 3))
        assert is_worse(evaluated([before] * 3), evaluated([limit, limit, limit + 0.5]))
        # One of them may be only a little worse.
        assert is_worse(evaluated([before] * 3), evaluated([before + 0.125, 99.0, 99.0]))


def test_five_pairs_may_show_a_small_rise() -> None:
    assert is_worse(evaluated([1.0] * 5), evaluated([1.2] * 5))
    assert not is_worse(evaluated([1.0] * 5), evaluated([1.0, 1.0, 1.0, 1.0, 11.0]))


@pytest.mark.parametrize(
    ("before", "after", "vocab_size", "expected"),
    [
        (-3.27, -2.06, 49152, False),  # configs/demo.yaml
        (-3.27, -29.79, 49152, True),  # with a learning rate of 1e-2, and a loss of 0
        (-3.27, -10.80, 49152, True),  # of 1e6: the uniform distribution
        (-1.80, -2.00, 49152, False),
        (-1.80, -5.0, 49152, False),
        (-1.80, -6.5, 49152, True),
        (-6.2, -9.0, 512, False),  # a random model
        (-5.5, -9.0, 512, False),
        # What is known is exactly 1, and exactly the half is left; both are of the good kind.
        (1.0, 0.0, 1, False),
        (1.5, 0.7, 1, True),
        (4.0, 2.0, 1, False),
        (4.0, 1.9, 1, True),
    ],
)
def test_a_collapse_is_the_loss_of_half_of_what_a_model_knew(
    before: float, after: float, vocab_size: int, expected: bool
) -> None:
    first, last = (evaluated([1.0] * 6, logp) for logp in (before, after))
    assert has_collapsed(first, last, vocab_size) == expected
