"""The result of a run: as plain values, as an exit status, and whether it ended worse."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.stored import make_pairs
from helpers.tiny import tiny_model

from mlx_simpo import ObjectiveConfig
from mlx_simpo.data.mixing import SourceCounts
from mlx_simpo.evaluation import Evaluation, summarize_logps
from mlx_simpo.training.result import BeforeAndAfter, TrainResult, recorded_step, verdict
from mlx_simpo.training.trainer import StepMetrics
from mlx_simpo.training.watch import CollapseWatch


def evaluation(chosen: float) -> Evaluation:
    """Of two pairs, whose rejected responses have −3."""
    logps, rejected = np.full(2, chosen, np.float32), np.full(2, -3.0, np.float32)
    return summarize_logps(make_pairs(2), logps, rejected, ObjectiveConfig())


def result(**changes: Any) -> TrainResult:
    values: dict[str, Any] = {
        "adapter": Path("out/run"),
        "pairs": 12,
        "sources": {"a": SourceCounts(12, 1, 10, 1.0)},
        "last": StepMetrics(5, 6, 1.25, {"loss": 0.5}),
        "before": evaluation(-2.0),
        "after": None,
        "valid_sets": {"chat": BeforeAndAfter(evaluation(-2.0), evaluation(-1.0))},
        "best": 4,
        "signal": None,
        "stopped_early": True,
        "skipped": 1,
        "worse": False,
        "seconds": 12.3456,
        "save_seconds": 0.98765,
        "peak_memory_gb": 1.23456,
    }
    return TrainResult(**(values | changes))


def test_the_result_as_plain_values() -> None:
    before, after = evaluation(-2.0).as_dict(), evaluation(-1.0).as_dict()
    content = result().as_dict()
    assert content == {
        "adapter": "out/run",
        "pairs": 12,
        "sources": {"a": {"pairs": 12, "quarantined": 1, "per_epoch": 10, "share": 1.0}},
        "steps": 5,
        "best": 4,
        "interrupted": False,
        "stopped_early": True,
        "skipped": 1,
        "worse": False,
        "seconds": 12.3,
        "save_seconds": 0.99,
        "peak_memory_gb": 1.23,
        "train": {"step": 5, "epoch": 1.25, "loss": 0.5},
        "before": before,
        "after": None,
        "valid_sets": {"chat": {"before": before, "after": after}},
    }
    assert json.loads(json.dumps(content, allow_nan=False)) == content


@pytest.mark.parametrize(
    ("signal_number", "worse", "status"),
    [
        (None, False, 0),
        (None, True, 3),
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, True, 143),
    ],
)
def test_the_exit_status_is_of_the_signal_or_tells_a_worse_model(
    signal_number: int | None, worse: bool, status: int
) -> None:
    run = result(signal=signal_number, worse=worse)
    assert run.exit_status == status
    assert run.interrupted == run.as_dict()["interrupted"] == (signal_number is not None)


def test_a_run_ended_worse_by_its_evaluations_or_else_by_its_steps() -> None:
    model, watch, fallen = tiny_model(), CollapseWatch(), CollapseWatch()
    for step in range(40):
        metrics = {"logps/chosen": -1.0 if step < 20 else -9.0, "loss": 1.0, "grad_norm": 1.0}
        fallen.add_step(metrics)
    good, bad = evaluation(-1.0), evaluation(-9.0)
    assert verdict(model, good, good, fallen) is None
    worse = verdict(model, good, bad, watch)
    assert worse is not None
    assert worse.startswith("the run ended worse than it began: loss from 0.05 to 13.00")
    assert "less likely than random tokens, at -6.24" in worse  # of 512 tokens
    for pair in ((None, None), (good, None), (None, good)):
        assert verdict(model, *pair, watch) is None
        assert verdict(model, *pair, fallen) == (
            "the run ended while the model was degenerating, see the warnings above"
        )


def test_a_step_is_read_back_from_its_record() -> None:
    step = StepMetrics(5, 6, 1.25, {"loss": 0.5, "grad_norm": 2.0})
    assert recorded_step(step.as_dict(), 6) == step
