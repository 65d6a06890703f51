"""A whole run: steps, evaluations, checkpoints, and an end that can be continued from."""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import SimPOError
from ..evaluation import Evaluation, is_worse
from ..reporting import advice
from ..reporting.display import step_note
from ..runs.checkpoints import list_checkpoints
from ..runs.folder import NONFINITE, RunFolder, resume_command
from .fingerprint import fingerprint
from .resuming import Evaluations, Progress, remove_remains, restore_checkpoint, write_checkpoint
from .saver import Saver
from .session import Session
from .step import NonFiniteError
from .stopping import StopRequest
from .trainer import StepMetrics

# Exit status of a run whose evaluation is worse after training than before.
ENDED_WORSE = 3


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    adapter: the output folder. pairs: number of training pairs. last: the last step. before, after:
    evaluations; None without validation pairs, and after also if the run was interrupted. best: the
    step with the lowest evaluation loss, whose adapter is in best/ (with train.eval_every).
    signal: the number of the signal that interrupted the run. stopped_early: by
    train.early_stopping. skipped: steps without an update, because it was not finite. worse: the
    model is worse after training than before (`evaluation.is_worse`). seconds: of training and
    evaluations, over all the times that the run was resumed; save_seconds: of the checkpoints since
    it was last begun or resumed. peak_memory_gb: MLX's, in GB (10⁹ bytes).
    """

    adapter: Path
    pairs: int
    last: StepMetrics
    before: Evaluation | None
    after: Evaluation | None
    best: int | None
    signal: int | None
    stopped_early: bool
    skipped: int
    worse: bool
    seconds: float
    save_seconds: float
    peak_memory_gb: float

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its end."""
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """The exit status of the command: 0, 3 if the model became worse, 128 + signal."""
        if self.signal is not None:
            return 128 + self.signal
        return ENDED_WORSE if self.worse else 0

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain values, for JSON."""
        return {
            "adapter": str(self.adapter),
            "pairs": self.pairs,
            "steps": self.last.step,
            "best": self.best,
            "interrupted": self.interrupted,
            "stopped_early": self.stopped_early,
            "skipped": self.skipped,
            "worse": self.worse,
            "seconds": round(self.seconds, 1),
            "save_seconds": round(self.save_seconds, 2),
            "peak_memory_gb": round(self.peak_memory_gb, 2),
            "train": self.last.as_dict(),
            "before": self.before.as_dict() if self.before else None,
            "after": self.after.as_dict() if self.after else None,
        }


class _AdapterError(SimPOError):
    """The run's adapter cannot be written."""


class _Stopped(Exception):
    """Raised in an evaluation when a signal has asked the run to stop."""


class Run:
    """One run of a session in its folder, from its beginning or from a checkpoint."""

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        stop: StopRequest,
        checkpoint: Path | None = None,
    ) -> None:
        """Begin, or restore a checkpoint.

        Raises:
            SimPOError: the run must not go on with this configuration, data or model.
        """
        self.session, self.folder, self.stop = session, folder, stop
        self.display = session.display
        self.fingerprint = fingerprint(session)
        self.progress, self.evaluations = Progress(), Evaluations()
        if checkpoint is not None:
            restored = restore_checkpoint(session, folder, checkpoint, self.fingerprint)
            self.progress, self.evaluations = restored
        elif folder.resuming:
            folder.rewind_logs({})
        remove_remains(folder)
        self.first_step = self.progress.step
        self.saver = Saver(folder.checkpoints, session.config.train, self.display)
        self._started = time.monotonic() - self.progress.seconds
        self._last: StepMetrics | None = None

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
                self._save_adapter()
                if self._evaluate_if_due():
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

    def _train(self) -> None:
        """Take the remaining steps, until the run is to stop."""
        session, progress = self.session, self.progress
        total = session.total_steps
        with self.display.progress("Training", total, progress.step) as advance:
            for step in session.steps():
                self._last, progress.last = step, step.as_dict()
                self.folder.log(step.as_dict())
                if step.nonfinite is not None:
                    self._record_nonfinite(step.nonfinite)
                advance(1, step_note(step.metrics))
                if self.stop:
                    return
                if step.step < total:
                    self._evaluate_if_due()
                    if self.saver.is_due(step.step):
                        self._save_checkpoint()

    def _evaluate_if_due(self) -> bool:
        """Evaluate if it is the turn of it after the last finished step; return whether it was."""
        session, progress = self.session, self.progress
        step, every = session.state.step, session.config.train.eval_every
        is_last = step == session.total_steps
        is_due = step == 0 or is_last or (every is not None and step % every == 0)
        if not session.valid or not is_due or progress.evaluated == step:
            return False
        title = "Before" if step == 0 else "After" if is_last else f"Step {step}"
        result = session.evaluate(title, self._check_stop)
        if every is not None and step > 0:
            self._keep_if_best(step, result.metrics["loss"])
        self.folder.log({"step": step, **{f"eval_{k}": v for k, v in result.as_dict().items()}})
        progress.evaluated = step
        self.evaluations.latest = result
        if step == 0:
            self.evaluations.before = result
        return True

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

    def _save_checkpoint(self) -> bool:
        self.progress.seconds = time.monotonic() - self._started
        return self.saver.save(
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
            SimPOError: the adapter cannot be written; the message names the last checkpoint.
        """
        self._save_checkpoint()
        try:
            self.session.save(self.folder.path)
        except SimPOError as error:
            existing = list_checkpoints(self.folder.checkpoints)
            last = f"the last checkpoint is {existing[0]}" if existing else "there is no checkpoint"
            raise _AdapterError(f"{error}; {last}; {self._how_to_resume()}") from None

    def _save_after(self, error: BaseException) -> None:
        """Save what an error has left, which is the state after the last finished step."""
        step, remedy = self.session.state.step, self._how_to_resume()
        if isinstance(error, NonFiniteError):
            remedy = self._how_to_resume(self._remedy_of(error))
        # An adapter that could not be written has nothing left to save.
        if step > self.first_step and not isinstance(error, _AdapterError):
            try:
                self._save_adapter()
            except Exception as second:  # the first error is the one to be seen
                self.display.warn(f"the adapter of step {step} could not be saved: {second}")
            else:
                self.display.warn(f"the adapter of step {step} is saved; {remedy}")
        if isinstance(error, NonFiniteError):
            # After the checkpoint: the run that goes on from there takes this step again.
            self.folder.log(error.record, NONFINITE)
            self.display.warn(f"the pairs of this step are in {self.folder.path / NONFINITE}")

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

    def _remedy_of(self, error: NonFiniteError) -> str:
        """Return the setting with which the run gets past a step that is not finite."""
        if self.session.config.train.on_nonfinite == "stop":
            return " train.on_nonfinite=skip"
        return f" train.max_skipped={2 * self.session.state.skipped + 10}"

    def _how_to_resume(self, setting: str = "") -> str:
        command = resume_command(self.session.config.output)
        return f"to go on from there: {command}{setting}"

    def _result(self, number: int | None) -> TrainResult:
        """Write summary.json and return the result, after showing the evaluations."""
        progress, evaluations = self.progress, self.evaluations
        before, after = evaluations.before, evaluations.latest
        if after is not None and (number or progress.evaluated != self.session.state.step):
            after = None
        worse = before is not None and after is not None and bool(is_worse(before, after))
        result = TrainResult(
            adapter=self.folder.path,
            pairs=len(self.session.train),
            last=self._last_step(),
            before=before,
            after=after,
            best=progress.best[1] if progress.best else None,
            signal=number,
            stopped_early=progress.stopped_early,
            skipped=self.session.state.skipped,
            worse=worse,
            seconds=time.monotonic() - self._started,
            save_seconds=self.saver.seconds,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
        )
        if before and after:
            self.display.evaluations({"before": before, "after": after})
            self.display.warn(advice.ended_worse(before, after) if worse else None)
        try:
            self.folder.finish(result.as_dict())
        except SimPOError as error:  # the adapter is saved, and nothing of this is lost
            self.display.warn(str(error))
        return result

    def _last_step(self) -> StepMetrics:
        """Return the last step; of a run that was resumed at its end, as it was recorded."""
        if self._last is not None:
            return self._last
        assert self.progress.last is not None
        metrics = dict(self.progress.last)
        step, epoch = metrics.pop("step"), metrics.pop("epoch")
        return StepMetrics(step, self.session.total_steps, epoch, metrics)
