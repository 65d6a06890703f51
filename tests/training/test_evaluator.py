"""When evaluations are due, and what follows from them: of several sets the main one decides."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.commands import captured_display
from helpers.stored import make_pairs

from mlx_simpo import EarlyStoppingConfig, SimPOConfig, SimPOError, TrainConfig
from mlx_simpo.device import memory_metrics
from mlx_simpo.evaluation import Evaluation, summarize_logps
from mlx_simpo.sampling.samples import Sample
from mlx_simpo.training import evaluator as evaluator_module
from mlx_simpo.training.evaluator import Evaluator
from mlx_simpo.training.resuming import Evaluations, Progress

STEPS = 10


class Run:
    """An evaluator whose model has these log-probabilities next, and nothing else of a run."""

    def __init__(
        self,
        folder: Path,
        main: str = "second",
        pairs: int = 0,
        progress: Progress | None = None,
        **train: Any,
    ) -> None:
        options: dict[str, Any] = {"eval_every": 1, **train}
        self.config = SimPOConfig(model="m", train=TrainConfig(**options))
        display, self._text = captured_display()
        display.console.width = 1000
        self.saved: list[int] = []
        self.save_error: SimPOError | None = None
        self.titles: list[str] = []
        self.log: list[tuple] = []
        self.state = SimpleNamespace(step=0)
        self.results: dict[str, Evaluation] = {}
        session: Any = SimpleNamespace(
            config=self.config,
            display=display,
            state=self.state,
            total_steps=STEPS,
            valid_main=main,
            valid_sets={"first": range(pairs), "second": range(pairs)},
            evaluate_sets=self._evaluate_sets,
            save=self._save,
            model="model",
            tokenizer="tokenizer",
            encoder="encoder",
        )
        run_folder: Any = SimpleNamespace(
            path=folder, log=lambda *record_and_name: self.log.append(record_and_name)
        )
        self.progress, self.evaluations = progress or Progress(), Evaluations()
        self.checks = 0
        self.evaluator = Evaluator(
            session, run_folder, self.progress, self.evaluations, self._check
        )

    def _check(self) -> None:
        self.checks += 1

    def _evaluate_sets(self, title: str, check: Any) -> dict[str, Evaluation]:
        check()
        self.titles.append(title)
        return self.results

    def _save(self, folder: Path) -> None:
        if self.save_error:
            raise self.save_error
        assert folder.name == "best"
        self.saved.append(self.state.step)

    def evaluate(self, step: int, **chosen_logps: float) -> None:
        self.state.step = step
        self.results = {name: self.evaluation(value) for name, value in chosen_logps.items()}
        assert self.evaluator.evaluate_if_due()

    def evaluation(self, chosen: float) -> Evaluation:
        logps, rejected = np.full(2, chosen, np.float32), np.full(2, -3.0, np.float32)
        return summarize_logps(make_pairs(2), logps, rejected, self.config.objective)

    @property
    def text(self) -> str:
        """What was shown."""
        return self._text.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


# --- when ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (4, {0: "Before", 4: "Step 4", 8: "Step 8", 10: "After"}),
        (5, {0: "Before", 5: "Step 5", 10: "After"}),
        (None, {0: "Before", 10: "After"}),
    ],
)
def test_an_evaluation_is_due_at_both_ends_and_every_so_many_steps(
    every: int | None, expected: dict[int, str], tmp_path: Path
) -> None:
    """Twice after no step; each may be interrupted."""
    run = Run(tmp_path, eval_every=every)
    due = []
    for step in range(STEPS + 1):
        run.state.step = step
        run.results = {"second": run.evaluation(-1.0)}
        due += [step] if run.evaluator.evaluate_if_due() else []
        assert not run.evaluator.evaluate_if_due()
    assert dict(zip(due, run.titles, strict=True)) == expected
    assert run.checks == len(due)
    assert run.evaluator.is_over
    # Without eval_every, nothing is kept: the last adapter is the only one.
    assert run.saved == ([] if every is None else [every])


@pytest.mark.parametrize(("pairs", "is_noted"), [(8, False), (9, True)])
def test_a_first_evaluation_that_is_longer_than_a_step_is_announced(
    pairs: int, is_noted: bool, tmp_path: Path
) -> None:
    """Steps are of 16 pairs, as many as two sets of 8 have."""
    run = Run(tmp_path, pairs=pairs, batch_size=4, gradient_accumulation_steps=4)
    run.evaluate(0, second=-1.0)
    note = (
        "step 1 begins after an evaluation on 18 pairs; a smaller data.valid_max makes it shorter\n"
    )
    assert run.text == (note if is_noted else "")
    run.evaluate(1, second=-1.0)
    assert run.text == (note if is_noted else "")


def test_an_evaluation_that_is_interrupted_is_still_due(run: Run) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    run.evaluator._check = stop
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(0, second=-1.0)
    assert (run.log, run.progress) == ([], Progress())
    run.evaluator._check = lambda: None
    run.evaluate(0, second=-1.0)


# --- what follows ----------------------------------------------------------------------------


def test_every_set_is_logged_and_remembered(run: Run) -> None:
    run.evaluate(0, first=-3.0, second=-2.0)
    run.evaluate(1, first=-1.5, second=-1.0)
    for step, (record,) in enumerate(run.log):
        results = (run.evaluations.before, run.evaluations.latest)[step]
        expected = {
            f"eval/{name}/{metric}": value
            for name in ("first", "second")
            for metric, value in results[name].as_dict().items()
        }
        assert record == {
            "step": step,
            **expected,
            **{name: record[name] for name in memory_metrics()},
        }
    before, latest = run.evaluations.before["second"], run.evaluations.latest["second"]
    assert (before.metrics["logps/chosen"], latest.metrics["logps/chosen"]) == (-2.0, -1.0)
    assert len(run.log) == 2
    assert run.progress.evaluated == 1


def test_the_best_adapter_is_that_of_the_main_set(run: Run) -> None:
    run.evaluate(0, first=-3.0, second=-3.0)
    run.evaluate(1, first=-1.0, second=-2.9)
    run.evaluate(2, first=-2.0, second=-2.5)
    run.evaluate(3, first=-0.5, second=-2.7)
    assert run.saved == [1, 2]
    assert run.progress.best == (run.evaluation(-2.5).metrics["loss"], 2)


def test_of_equal_evaluations_the_first_is_the_best(run: Run) -> None:
    """Otherwise a run that stands still would write its adapter again and again."""
    for step in range(4):
        run.evaluate(step, first=-2.0, second=-2.0)
    assert run.saved == [1]


def test_a_best_adapter_that_cannot_be_written_is_a_warning(run: Run) -> None:
    run.save_error = SimPOError("the disk is full")
    run.evaluate(1, second=-2.0)
    assert run.progress.best is None
    assert run.text == (
        "warning: the best adapter so far, of step 1, is not kept: the disk is full\n"
    )
    run.save_error = None
    run.evaluate(2, second=-2.0)
    assert run.saved == [2]


def test_a_collapse_is_one_of_the_main_set_and_told_once(run: Run) -> None:
    run.evaluate(0, first=-1.0, second=-2.0)
    run.evaluate(1, first=-20.0, second=-3.0)
    assert "less likely" not in run.text
    for step in (2, 3):
        run.evaluate(step, first=-20.0, second=-2.0 - 17)
        assert run.text.count("have become 17.0 nats per token less likely") == 1


def test_a_fall_is_measured_from_the_main_sets_beginning(run: Run) -> None:
    run.evaluate(0, first=-1.0, second=-19.0)
    run.evaluate(1, first=-1.0, second=-20.0)
    assert "less likely" not in run.text


def test_without_an_evaluation_before_training_no_fall_is_known(run: Run) -> None:
    run.evaluate(1, second=-2.0)
    run.evaluate(2, second=-20.0)
    assert run.text == ""


def test_a_run_is_over_when_the_main_set_no_longer_improves(tmp_path: Path) -> None:
    patience = EarlyStoppingConfig(patience=2)
    run = Run(tmp_path, early_stopping=patience)
    run.evaluate(0, first=-3.0, second=-2.0)
    run.evaluate(1, first=-2.0, second=-2.5)
    assert not run.evaluator.is_over

    best, now = (run.evaluation(logp).metrics["loss"] for logp in (-2.0, -2.4))
    resumed = Run(tmp_path, progress=run.progress, early_stopping=patience)
    resumed.evaluate(2, first=-1.0, second=-2.4)
    assert resumed.evaluator.is_over
    assert resumed.text == (
        "stopping early, after step 2: eval_loss has not fallen in 2 evaluations (best "
        f"{best:.4f}, now {now:.4f})\n"
    )
    # At the end of the run nothing is stopped early.
    last = Run(tmp_path, progress=run.progress, early_stopping=patience)
    last.evaluate(STEPS, first=-1.0, second=-2.4)
    assert (last.evaluator.is_over, last.text) == (True, "")


# --- samples ---------------------------------------------------------------------------------


def sample(response: str, repetition: float = 0.0) -> Sample:
    return Sample("Why?", response, 9, is_complete=False, repetition=repetition)


def test_responses_to_the_prompts_are_logged_and_compared_with_the_first_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones of the run, though it was resumed in between; also without pairs."""
    samples: list[Sample] = []

    def respond(*arguments: Any) -> Sequence[Sample]:
        assert arguments == ("model", "tokenizer", "encoder", ("Why?",), 7)
        return samples

    monkeypatch.setattr(evaluator_module, "sample_responses", respond)
    options: dict[str, Any] = {"sample_prompts": ("Why?",), "sample_tokens": 7}
    run = Run(tmp_path, **options)
    samples[:] = [sample("Because.")]
    run.evaluate(0)
    resumed = Run(tmp_path, progress=run.progress, **options)
    samples[:] = [sample("so so so so", 0.9)]
    resumed.evaluate(1)
    assert run.progress.samples == [sample("Because.").as_dict()]
    assert run.log == [({"step": 0, **sample("Because.").as_dict()}, "samples.jsonl")]
    assert [record["response"] for record, _ in resumed.log] == ["so so so so"]
    assert run.text == "step 0: Why? → Because.\n"
    assert (
        "1 of 1 sample responses repeat themselves up to the maximum length (before training 0)"
        in (resumed.text)
    )
