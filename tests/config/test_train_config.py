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
