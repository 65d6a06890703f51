"""What follows from the evaluations of several sets: decided by the main one alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.commands import captured_display
from helpers.stored import make_pairs

from mlx_simpo import SimPOConfig, TrainConfig
from mlx_simpo.evaluation import Evaluation, summarize_logps
from mlx_simpo.training.evaluator import Evaluator
from mlx_simpo.training.resuming import Evaluations, Progress


class Run:
    """An evaluator whose model has these log-probabilities next, and nothing else of a run."""

    def __init__(self, folder: Path, main: str = "second") -> None:
        self.config = SimPOConfig(model="m", train=TrainConfig(eval_every=1))
        display, self.text = captured_display()
        self.saved: list[int] = []
        self.state = SimpleNamespace(step=0)
        self.results: dict[str, Evaluation] = {}
        session: Any = SimpleNamespace(
            config=self.config,
            display=display,
            state=self.state,
            total_steps=10,
            valid_main=main,
            valid_sets={"first": [], "second": []},
            evaluate_sets=lambda *_: self.results,
            save=lambda _: self.saved.append(self.state.step),
        )
        run_folder: Any = SimpleNamespace(path=folder, log=lambda _: None)
        self.progress, self.evaluations = Progress(), Evaluations()
        self.evaluator = Evaluator(
            session, run_folder, self.progress, self.evaluations, lambda: None
        )

    def evaluate(self, step: int, **chosen_logps: float) -> None:
        self.state.step = step
        self.results = {name: self.evaluation(value) for name, value in chosen_logps.items()}
        assert self.evaluator.evaluate_if_due()

    def evaluation(self, chosen: float) -> Evaluation:
        logps, rejected = np.full(2, chosen, np.float32), np.full(2, -3.0, np.float32)
        return summarize_logps(make_pairs(2), logps, rejected, self.config.objective)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_the_best_adapter_is_that_of_the_main_set(run: Run) -> None:
    run.evaluate(0, first=-3.0, second=-3.0)
    run.evaluate(1, first=-1.0, second=-2.9)
    run.evaluate(2, first=-2.0, second=-2.5)
    run.evaluate(3, first=-0.5, second=-2.7)
    assert run.saved == [1, 2]
    assert run.progress.best is not None
    assert run.progress.best[1] == 2


def test_of_equal_evaluations_the_first_is_the_best(run: Run) -> None:
    """Otherwise a run that stands still would write its adapter again and again."""
    for step in range(4):
        run.evaluate(step, first=-2.0, second=-2.0)
    assert run.saved == [1]


def test_a_collapse_is_one_of_the_main_set(run: Run) -> None:
    run.evaluate(0, first=-1.0, second=-2.0)
    run.evaluate(1, first=-20.0, second=-3.0)
    assert "less likely" not in run.text.getvalue()
    run.evaluate(2, first=-20.0, second=-2.0 - 17)
    assert "have become 17.0 nats per token less likely" in run.text.getvalue()


def test_a_fall_is_measured_from_the_main_sets_beginning(run: Run) -> None:
    run.evaluate(0, first=-1.0, second=-19.0)
    run.evaluate(1, first=-1.0, second=-20.0)
    assert "less likely" not in run.text.getvalue()


def test_each_step_is_evaluated_once(run: Run) -> None:
    run.evaluate(0, first=-2.0, second=-2.0)
    assert not run.evaluator.evaluate_if_due()
    assert run.evaluations.before.keys() == run.evaluations.latest.keys() == {"first", "second"}
