"""The law of the peak, on runs whose memory is known exactly."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.forecasts import Law, model_of, resident, trainable_bytes
from helpers.steps import weights
from helpers.tiny import token_pair
from mlx.utils import tree_flatten

from mlx_simpo.data.encode import EncodedPair
from mlx_simpo.planning.peak import COPIES_IN_UPDATE, Peak, extrapolate, predict_peak, shorten

PAIRS = [token_pair(64, 128, 96, seed) for seed in range(4)]
UNLIMITED = 1e12

# --- the law ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 2, 3, 8, 30])
def test_all_layers_are_predicted_from_some(num_layers: int) -> None:
    model = model_of(num_layers)
    law = Law(model)
    peak = predict_peak(law, model, PAIRS, UNLIMITED, accumulates=False)
    expected = resident(model, 2) + law.bytes(PAIRS, num_layers)
    assert peak.total == pytest.approx(expected, rel=1e-3)
    assert max(law.taken) <= law.bytes(PAIRS, max(2, num_layers // 2))


def test_layers_that_do_not_train_are_not_counted() -> None:
    model = model_of(12, num_layers=5)
    law = Law(model)
    peak = predict_peak(law, model, PAIRS, UNLIMITED, accumulates=False)
    assert peak.total == pytest.approx(resident(model, 2) + law.bytes(PAIRS, 5), rel=1e-3)


def test_twice_the_pairs_are_twice_the_activations() -> None:
    model = model_of(8)
    law = Law(model, fixed=lambda tokens: 0)
    one, two = (
        predict_peak(law, model, pairs, UNLIMITED, accumulates=False)
        for pairs in (PAIRS[:2], PAIRS)
    )
    assert two.activations[-1] == pytest.approx(2 * one.activations[-1], rel=1e-3)


def test_a_waiting_gradient_is_one_copy_of_what_trains() -> None:
    model = model_of(4)
    alone, accumulated = (
        predict_peak(Law(model), model, PAIRS, UNLIMITED, accumulates=accumulates)
        for accumulates in (False, True)
    )
    assert accumulated.total - alone.total == pytest.approx(trainable_bytes(model), abs=100)


def test_the_update_is_the_peak_where_activations_are_few() -> None:
    model = model_of(4)
    law = Law(model, fixed=lambda tokens: 0, per_layer=lambda tokens: 1)
    peak = predict_peak(law, model, PAIRS, UNLIMITED, accumulates=False)
    assert peak.total == pytest.approx(resident(model, COPIES_IN_UPDATE), abs=100)


# --- what may run ----------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 1.5, 2])
def test_no_run_takes_more_than_the_limit(power: float) -> None:
    model = model_of(8)
    law = Law(model, per_layer=lambda tokens: 1e6 * (tokens / 1e3) ** power)
    limit = resident(model, 2) + 0.6 * law.bytes(PAIRS, 4)
    peak = predict_peak(law, model, PAIRS, limit, accumulates=False)
    assert max(law.taken) + resident(model, 2) <= limit
    assert peak.lengths[-1] < 1
    assert peak.total > limit


def test_a_run_that_stops_early_still_has_a_fair_estimate() -> None:
    model = model_of(8)
    law = Law(model, per_layer=lambda tokens: 1e4 * tokens)
    limit = resident(model, 2) + 0.5 * law.bytes(PAIRS, 4)
    peak = predict_peak(law, model, PAIRS, limit, accumulates=False)
    assert peak.lengths == (1 / 8, 1 / 4)
    assert peak.total == pytest.approx(resident(model, 2) + law.bytes(PAIRS, 8), rel=0.1)


@pytest.mark.parametrize("power", [1, 1.5, 2])
def test_growth_is_continued_where_the_pairs_were_too_long(power: float) -> None:
    model = model_of(8)
    law = Law(model, per_layer=lambda tokens: 1e6 * (tokens / 1e3) ** power)
    limit = resident(model, 2) + 0.9 * law.bytes(PAIRS, 4)
    peak = predict_peak(law, model, PAIRS, limit, accumulates=False)
    assert peak.lengths == (1 / 8, 1 / 4, 1 / 2)
    expected = resident(model, 2) + law.bytes(PAIRS, 8)
    assert peak.total == pytest.approx(expected, rel=0.05)


def test_half_the_length_is_skipped_where_there_is_room() -> None:
    model = model_of(8)
    peak = predict_peak(Law(model), model, PAIRS, UNLIMITED, accumulates=False)
    assert peak.lengths == (1 / 8, 1 / 4, 1)


# --- arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("power", [1, 1.3, 2])
def test_three_values_show_the_power_of_the_growth(factor: int, power: float) -> None:
    values = [5 + length**power for length in (1, 2, 4)]
    assert extrapolate(values, factor) == pytest.approx(5 + (4 * factor) ** power)


@pytest.mark.parametrize("power", [1, 1.3, 2])
def test_two_values_show_it_if_they_begin_at_0(power: float) -> None:
    assert extrapolate([1, 2**power], 4) == pytest.approx(8**power)
    assert extrapolate([1, 2**power], 4, power=2) == pytest.approx(
        2**power + (2**power - 1) * 15 / 0.75
    )


def test_growth_is_at_least_in_proportion_and_never_negative() -> None:
    assert extrapolate([1, 4, 5], 2) == pytest.approx(7)
    assert extrapolate([8, 7], 4) == extrapolate([8, 7], 4, power=2) == 7


def test_the_length_within_a_limit_is_read_off_the_measured_ones() -> None:
    peak = Peak(resident=100, update=150, lengths=(1 / 8, 1 / 4, 1), activations=(10, 20, 80))
    assert [peak.length_within(limit) for limit in (180, 150)] == pytest.approx([1, 5 / 8])
    higher = Peak(resident=100, update=160, lengths=(1 / 8, 1 / 4, 1), activations=(10, 20, 80))
    assert higher.length_within(155) == 0  # whatever the pairs, the update needs more
    assert Peak(100, 0, (1 / 8, 1), (10, 80)).length_within(105) == pytest.approx(1 / 16)


def test_a_shortened_pair_keeps_its_shape() -> None:
    pair = token_pair(64, 128, 96)
    half = shorten(pair, 0.5)
    assert (half.chosen.score_start, half.chosen.num_scored) == (32, 64)
    assert (half.rejected.score_start, half.rejected.num_scored) == (32, 48)
    np.testing.assert_array_equal(half.chosen.tokens[:32], half.rejected.tokens[:32])
    np.testing.assert_array_equal(half.chosen.tokens[32:], pair.chosen.tokens[64:128])
    tiny = shorten(pair, 1e-3)
    assert (tiny.chosen.score_start, tiny.chosen.num_scored) == (1, 1)


# --- no trace --------------------------------------------------------------------------------


def state_of(model: nn.Module) -> tuple:
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    random: Any = mx.random.state[0]  # type: ignore[index]
    return names, model.training, np.array(random).tolist()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("was_training", [False, True])
def test_nothing_of_the_model_or_the_random_numbers_changes(
    fails: bool, was_training: bool
) -> None:
    model = model_of(6, num_layers=4)
    mx.random.seed(2**40 + 7)
    mx.eval(mx.random.normal((3,)))
    model.train(was_training)
    before, arrays = state_of(model), weights(model)

    def run(pairs: Sequence[EncodedPair]) -> None:
        assert model.training
        mx.eval(mx.random.normal((1000,)))
        if fails:
            raise RuntimeError("planted")

    if fails:
        with pytest.raises(RuntimeError, match="planted"):
            predict_peak(run, model, PAIRS, UNLIMITED, accumulates=False)
    else:
        predict_peak(run, model, PAIRS, UNLIMITED, accumulates=False)
    assert state_of(model) == before
    for name, array in weights(model).items():
        np.testing.assert_array_equal(array, arrays[name])
    assert mx.get_peak_memory() == mx.get_cache_memory() == 0
