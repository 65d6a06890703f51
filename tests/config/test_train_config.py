"""The section train: what excludes what, and what may change when a run is resumed."""

import re
from pathlib import Path

import pytest

from mlx_simpo import EarlyStoppingConfig, SimPOConfig, SimPOError, TrainConfig
from mlx_simpo.config.schema import all_settings

PAGE = Path(__file__).parents[2] / "docs" / "long_runs.md"


def test_the_documentation_lists_exactly_the_settings_that_may_change() -> None:
    table = PAGE.read_text("utf-8").partition("| may change | |")[2].partition("\n\n")[0]
    listed = re.findall(r"`([a-z_.]+)`", table)
    allowed = [n for n, i, _ in all_settings(SimPOConfig) if i.metadata["on_resume"] != "same"]
    assert sorted(listed) == sorted(allowed)


def test_early_stopping_needs_evaluations() -> None:
    message = r"train\.early_stopping\.patience is 2, but there are no evaluations .*eval_every"
    with pytest.raises(SimPOError, match=message):
        TrainConfig(early_stopping=EarlyStoppingConfig(patience=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 1.0, "steps": 3}, "train.epochs and train.steps both set the length"),
        ({"save_every": 0}, "train.save_every is 0; it must be greater than 0"),
        ({"save_minutes": 0.0}, "train.save_minutes is 0.0; it must be greater than 0"),
        ({"keep_checkpoints": 0}, "train.keep_checkpoints is 0; it must be greater than 0"),
        ({"max_skipped": -1}, "train.max_skipped is -1; it must be 0 or greater"),
        ({"resume": "always"}, "train.resume is 'always'; it must be one of 'never', 'auto'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'; it must be one of 'stop', 'skip'"),
    ],
)
def test_settings_that_would_lose_a_run_are_errors(settings: dict, message: str) -> None:
    with pytest.raises(SimPOError) as error:
        TrainConfig(**settings)
    assert message in str(error.value)


def test_by_default_runs_are_saved_and_nothing_is_skipped_or_overwritten() -> None:
    train = TrainConfig()
    assert (train.save_minutes, train.save_every, train.keep_checkpoints) == (10.0, None, 2)
    assert (train.on_nonfinite, train.max_skipped, train.resume) == ("stop", 10, "never")
