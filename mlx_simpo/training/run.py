"""A whole run: steps, evaluations, checkpoints, and an end that can be continued from."""

import signal
import time
from typing import Any

import mlx.core as mx

from ..engine.vocabulary import vocabulary_size
from ..errors import SimPOError, one_line
from ..model.adapters import WEIGHTS
from ..reporting import advice
from ..reporting.display import step_note
from ..runs.folder import NONFINITE, SAMPLES, RunFolder
from ..sampling.samples import Sample, sample_responses, sample_warning
from .early_stopping import EarlyStopping
from .fingerprint import fingerprint
from .result import TrainResult
from .resuming import Evaluations, Progress, restore_checkpoint, write_checkpoint
from .saver import Saver
from .session import Session
from .step import NonFiniteError
from .stopping import StopRequest
from .trainer import StepMetrics
from .watch import CollapseWatch

SHOWN_CHARACTERS = 200  # of a response to train.sample_prompts


class _Stopped(Exception):
    """Raised in an evaluation when a signal has asked the run to stop."""


class Run:
    """One run of a session in its folder, from its beginning or from a checkpoint."""

    def __init__(self, session: Session, folder: RunFolder, stop: StopRequest) -> None:
        """Begin, or restore the newest whole checkpoint if the folder holds this run.

        Raises:
            SimPOError: the run must not go on with this configuration, data or model.
        """
        self.session, self.folder, self.stop = session, folder, stop
        self.display = session.display
        self.fingerprint = fingerprint(session)
        self.progress, self.evaluations = Progress(), Evaluations()
        if folder.resuming:
            self.progress, self.evaluations = restore_checkpoint(session, folder, self.fingerprint)
        self.first_step = self.progress.step
        options = session.config.train
        self.watch, self.early_stopping = CollapseWatch(), EarlyStopping(options.early_stopping)
        if folder.resuming and self.progress.watch:
            self.watch.restore(self.progress.watch)
            self.early_stopping.restore(self.progress.early_stopping)
        self.saver = Saver(folder.checkpoints, options, self.display)
        self._started = time.monotonic() - self.progress.seconds
        self._last: StepMetrics | None = None
        self._is_unsaved = not folder.resuming  # whether no checkpoint holds the present state

    def finish(self) -> TrainResult:
        """Run to the end, or until a signal or an error, and write everything to the folder.

        Raises:
            KeyboardInterrupt, SystemExit: a signal before the first finished step.
            SimPOError: a step was not finite, or the adapter cannot be written.
        """
        number = None
        try:
            self._evaluate_if_due()
            if self.session.state.step == 0:
                self._save_checkpoint()  # also shows that saving works, before an evening is spent
            self._train()
            if not self.stop:
                # Before the last evaluation, and only if a run that had ended is not resumed.
                if self._is_unsaved or not (self.folder.path / WEIGHTS).is_file():
                    self._save_adapter()
                self._evaluate_if_due()
                if self._is_unsaved:
                    self._save_checkpoint()
        except (_Stopped, KeyboardInterrupt):
            number = self.stop.signal or signal.SIGINT
        except BaseException as error:
            self._save_after(error)
            raise
        number = number or self.stop.signal
        if number:
            self._end_interrupted(number)
        return self._result(number)

    @property
    def _is_over(self) -> bool:
        """Whether no step is left: all are done, or the evaluations no longer improve."""
        return self.session.state.step == self.session.total_steps or self.early_stopping.is_over

    def _train(self) -> None:
        """Take the remaining steps, until the run is to stop."""
        if self._is_over:
            return
        session, progress = self.session, self.progress
        with self.display.progress("Training", session.total_steps, progress.step) as advance:
            for step in session.steps():
                self._last, progress.last, self._is_unsaved = step, step.as_dict(), True
                self.folder.log(step.as_dict())
                if step.nonfinite is not None:
                    self._record_nonfinite(step.nonfinite)
                else:
                    for warning in self.watch.add_step(step.metrics):
                        self.display.warn(f"step {step.step}: {warning}")
                advance(1, step_note(step.metrics))
                if self.stop or self._is_over:
                    return
                self._evaluate_if_due()
                if self._is_over:
                    return
                if self.saver.is_due(step.step):
                    self._save_checkpoint()

    def _evaluate_if_due(self) -> None:
        """Evaluate if it is the turn of it after the last finished step."""
        session, progress, options = self.session, self.progress, self.session.config.train
        step, every = session.state.step, options.eval_every
        is_due = step == 0 or self._is_over or (every is not None and step % every == 0)
        if not is_due or progress.evaluated == step:
            return
        if session.valid:
            self._evaluate(step)
        if options.sample_prompts:
            self._sample(step)
        progress.evaluated, self._is_unsaved = step, True

    def _evaluate(self, step: int) -> None:
        title = "Before" if step == 0 else "After" if self._is_over else f"Step {step}"
        result = self.session.evaluate(title, self._check_stop)
        every = self.session.config.train.eval_every
        if every is not None and step > 0:
            self._keep_if_best(step, result.metrics["loss"])
        self.folder.log({"step": step, **{f"eval_{k}": v for k, v in result.as_dict().items()}})
        self.evaluations.latest = result
        if step == 0:
            self.evaluations.before = result
        reason = self.early_stopping.add_evaluation(result.metrics)
        if reason and step < self.session.total_steps:
            self.display.note(f"stopping early, after step {step}: {reason}")

    def _sample(self, step: int) -> None:
        """Respond to train.sample_prompts, and compare with the first responses."""
        session, options = self.session, self.session.config.train
        samples = sample_responses(
            session.model,
            session.tokenizer,
            session.encoder,
            options.sample_prompts,
            options.sample_tokens,
        )
        for sample in samples:
            self.folder.log({"step": step, **sample.as_dict()}, SAMPLES)
            response = one_line(sample.response, SHOWN_CHARACTERS)
            self.display.note(f"step {step}: {one_line(sample.prompt, 60)} → {response}")
        if not self.progress.samples:
            self.progress.samples = [sample.as_dict() for sample in samples]
        first = [Sample(**sample) for sample in self.progress.samples]
        self.display.warn(sample_warning(first, samples))

    def _check_stop(self) -> None:
        if self.stop:
            raise _Stopped

    def _keep_if_best(self, step: int, loss: float) -> None:
        if self.progress.best is not None and loss >= self.progress.best[0]:
            return
        try:
            self.session.save(self.folder.path / "best")
        except SimPOError as error:
            self.display.warn(f"the best adapter so far, of step {step}, is not kept: {error}")
        else:
            self.progress.best = (loss, step)

    def _record_nonfinite(self, record: dict[str, Any]) -> None:
        self.folder.log(record, NONFINITE)
        self.display.warn(
            f"step {record['step']} was skipped: its {record['what']} is not a finite number; its "
            f"pairs are in {self.folder.path / NONFINITE}"
        )

    # --- saving --------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        self.progress.seconds = time.monotonic() - self._started
        self.progress.watch = self.watch.state()
        self.progress.early_stopping = self.early_stopping.state()
        self._is_unsaved &= not self.saver.save(
            self.session.state.step,
            lambda folder: write_checkpoint(
                folder,
                self.session,
                self.folder,
                self.progress,
                self.evaluations,
                self.fingerprint,
            ),
        )

    def _save_adapter(self) -> None:
        """Save the state after the last finished step: as a checkpoint, and as the run's adapter.

        Raises:
            SimPOError: the adapter cannot be written.
        """
        self._save_checkpoint()
        self.session.save(self.folder.path)

    def _save_after(self, error: BaseException) -> None:
        """Save what an error has left, which is the state after the last finished step."""
        if isinstance(error, NonFiniteError):
            self.folder.log(error.record, NONFINITE)
        step = self.session.state.step
        if step == self.first_step:
            return
        try:
            self._save_adapter()
        except Exception as second:  # the first error is the one to be seen
            self.display.warn(f"the adapter of step {step} could not be saved: {second}")
        else:
            self.display.warn(f"the adapter of step {step} is saved; {self._how_to_resume()}")

    def _end_interrupted(self, number: int) -> None:
        step = self.session.state.step
        if step == 0:
            # Nothing is lost: as if the signal had come before the run.
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self._save_adapter()
        self.display.warn(
            f"interrupted; the adapter of step {step} is saved; {self._how_to_resume()}"
        )

    def _how_to_resume(self) -> str:
        return f"to go on from there: mlx-simpo train --resume {self.session.config.output}"

    def _result(self, number: int | None) -> TrainResult:
        """Write summary.json and return the result, after showing the evaluations."""
        session, progress, evaluations = self.session, self.progress, self.evaluations
        before, after = evaluations.before, evaluations.latest
        if after is not None and (number or progress.evaluated != self.session.state.step):
            after = None
        message = None
        if before and after:
            size = vocabulary_size(self.session.model)
            message = advice.ended_worse(before, after, size)
        elif number is None and self.watch.is_degenerating:
            message = "the run ended while the model was degenerating, see the warnings above"
        result = TrainResult(
            adapter=self.folder.path,
            pairs=len(self.session.train),
            last=self._last_step(),
            before=before,
            after=after,
            best=progress.best[1] if progress.best else None,
            signal=number,
            stopped_early=number is None and session.state.step < session.total_steps,
            skipped=self.session.state.skipped,
            worse=message is not None,
            seconds=time.monotonic() - self._started,
            save_seconds=self.saver.seconds,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
        )
        self.folder.finish(result.as_dict())
        if before and after:
            self.display.evaluations({"before": before, "after": after})
        self.display.warn(message)
        return result

    def _last_step(self) -> StepMetrics:
        """Return the last step; of a run that was resumed at its end, as it was recorded."""
        if self._last is not None:
            return self._last
        assert self.progress.last is not None
        metrics = dict(self.progress.last)
        step, epoch = metrics.pop("step"), metrics.pop("epoch")
        return StepMetrics(step, self.session.total_steps, epoch, metrics)
