"""Early stopping: after how many evaluations, by which metric; its state."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_simpo import EarlyStoppingConfig, SimPOError
from mlx_simpo.training.early_stopping import EarlyStopping


def stops_at(config: EarlyStoppingConfig, values: list[float]) -> int | None:
    """The number of the evaluation, from 1, after which the run stops."""
    stopping = EarlyStopping(config)
    for number, value in enumerate(values, 1):
        if stopping.add_evaluation({config.metric: value}) is not None:
            return number
    return None


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "stop"),
    [
        (1, 0.0, [1.0, 1.0], 2),
        (1, 0.0, [1.0, 0.9, 0.8], None),
        (2, 0.0, [1.0, 1.1, 0.9, 0.95, 0.92], 5),
        (2, 0.0, [1.0, 1.1, 0.9, 0.95, 0.89], None),
        (3, 0.0, [1.0, 1.1, 1.2, 1.3], 4),
        (1, 0.5, [2.0, 1.5], 2),
        (1, 0.5, [2.0, 1.4], None),
        # Each less than min_delta better than the one before, but not than the best.
        (3, 0.5, [2.0, 1.75, 1.375, 1.125], None),
        (None, 0.0, [1.0] * 100, None),
    ],
)
def test_the_run_stops_after_patience_evaluations_without_improvement(
    patience: int | None, min_delta: float, losses: list[float], stop: int | None
) -> None:
    config = EarlyStoppingConfig(patience=patience)
    if min_delta:
        config = EarlyStoppingConfig(patience=patience, min_delta=min_delta)
    assert stops_at(config, losses) == stop


@pytest.mark.parametrize("metric", ["rewards/accuracies", "rewards/margins"])
def test_rewards_have_to_rise(metric: str) -> None:
    config = EarlyStoppingConfig(metric=metric, patience=2)  # type: ignore[arg-type]
    assert stops_at(config, [0.1, 0.2, 0.3]) is None
    assert stops_at(config, [0.3, 0.2, 0.1]) == 3


def test_the_reason_has_the_figures() -> None:
    stopping = EarlyStopping(EarlyStoppingConfig(patience=1, min_delta=0.01))
    assert stopping.add_evaluation({"loss": 1.25}) is None
    assert stopping.add_evaluation({"loss": 1.245}) == (
        "eval_loss has not fallen by more than 0.01 in 1 evaluation (best 1.2500, now 1.2450)"
    )
    stopping = EarlyStopping(EarlyStoppingConfig(metric="rewards/accuracies", patience=2))
    reasons = [stopping.add_evaluation({"rewards/accuracies": v}) for v in (0.5, 0.5, 0.25)]
    assert reasons == [
        None,
        None,
        "eval_rewards/accuracies has not risen in 2 evaluations (best 0.5000, now 0.2500)",
    ]


@given(
    values=st.lists(st.floats(-10, 10), max_size=30),
    patience=st.integers(1, 5),
    min_delta=st.floats(0, 1),
    data=st.data(),
)
def test_a_restored_state_is_one_that_was_never_interrupted(
    values: list[float], patience: int, min_delta: float, data: st.DataObject
) -> None:
    config = EarlyStoppingConfig(patience=patience, min_delta=min_delta)
    cut = data.draw(st.integers(0, len(values)))
    first, second = EarlyStopping(config), EarlyStopping(config)
    for value in values[:cut]:
        first.add_evaluation({"loss": value})
    second.restore(json.loads(json.dumps(first.state())))
    for value in values[cut:]:
        assert second.add_evaluation({"loss": value}) == first.add_evaluation({"loss": value})
    assert second.state() == first.state()


def test_another_metric_cannot_be_continued() -> None:
    first = EarlyStopping(EarlyStoppingConfig(patience=1))
    second = EarlyStopping(EarlyStoppingConfig(metric="rewards/margins", patience=1))
    first.add_evaluation({"loss": 1.0})
    with pytest.raises(SimPOError) as caught:
        second.restore(first.state())
    assert str(caught.value) == (
        "train.early_stopping.metric is 'rewards/margins'; the run began with 'loss', whose best "
        "value cannot be compared"
    )


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"metric": "loss", "best": "x", "waited": 0},
        {"metric": "loss", "best": 1.0, "waited": []},
    ],
)
def test_a_damaged_state_is_an_error(state: dict) -> None:
    with pytest.raises(SimPOError, match="the saved state of early stopping is damaged"):
        EarlyStopping(EarlyStoppingConfig(patience=1)).restore(state)
