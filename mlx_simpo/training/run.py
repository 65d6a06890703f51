"""A whole run: steps, evaluations, checkpoints, and an end that can be continued from."""

import signal
import time
from functools import partial
from pathlib import Path

import mlx.core as mx

from ..errors import SimPOError
from ..reporting.display import step_note
from ..runs.checkpoints import list_checkpoints
from ..runs.folder import NONFINITE, RunFolder, resume_command
from .evaluator import Evaluator
from .fingerprint import fingerprint
from .recording import record_skipped
from .result import BeforeAndAfter, TrainResult, recorded_step, verdict
from .resuming import Evaluations, Progress, remove_remains, restore_checkpoint, write_checkpoint
from .saver import Saver
from .session import Session
from .step import NonFiniteError
from .stopping import StopRequest
from .trainer import StepMetrics
from .watch import CollapseWatch


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
        options = session.config.train
        self.watch = CollapseWatch()
        if self.progress.watch:
            self.watch.restore(self.progress.watch)
        self.evaluator = Evaluator(
            session, folder, self.progress, self.evaluations, self._check_stop
        )
        self.saver = Saver(folder.checkpoints, options, self.display, self.progress.save_cost)
        if checkpoint is None:
            self.saver.check_space(session.model)
        self._started = time.monotonic() - self.progress.seconds
        self._last: StepMetrics | None = None
        self._is_unsaved = checkpoint is None  # whether no checkpoint holds the present state

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
                # Before the last evaluation. Of a run that is resumed at its end, too: it may have
                # been killed before this, and then has the adapter of an earlier interruption.
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

    def _evaluate_if_due(self) -> None:
        self._is_unsaved |= self.evaluator.evaluate_if_due()

    def _train(self) -> None:
        """Take the remaining steps, until the run is to stop."""
        session, progress = self.session, self.progress
        if self.evaluator.is_over:
            if progress.step < session.total_steps:
                self.display.note(
                    f"the run has stopped early, after step {progress.step}; to go on, raise "
                    "train.early_stopping.patience"
                )
            return
        if self.stop:
            return
        with self.display.progress("Training", session.total_steps, progress.step) as advance:
            for step in session.steps():
                self._last, progress.last, self._is_unsaved = step, step.as_dict(), True
                self.folder.log(step.as_dict())
                if step.nonfinite is not None:
                    record_skipped(self.folder, self.display, step.nonfinite)
                else:
                    for warning in self.watch.add_step(step.metrics):
                        self.display.warn(f"step {step.step}: {warning}")
                advance(1, step_note(step.metrics))
                if self.stop or self.evaluator.is_over:
                    return
                self._evaluate_if_due()
                if self.evaluator.is_over:
                    return
                if self.saver.is_due(step.step):
                    self._save_checkpoint()

    def _check_stop(self) -> None:
        """End an evaluation, as KeyboardInterrupt would, if a signal has asked the run to stop."""
        if self.stop:
            raise _Stopped

    # --- saving --------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        self.progress.seconds = time.monotonic() - self._started
        self.progress.save_cost = self.saver.cost
        self.progress.watch = self.watch.state()
        write = partial(
            write_checkpoint,
            session=self.session,
            run=self.folder,
            progress=self.progress,
            evaluations=self.evaluations,
            fingerprint=self.fingerprint,
        )
        self._is_unsaved &= not self.saver.save(self.session.state.step, write)

    def _save_adapter(self) -> None:
        """Save the state after the last finished step: as a checkpoint, and as the run's adapter.

        Raises:
            SimPOError: the adapter cannot be written; the message names the last checkpoint.
        """
        if self._is_unsaved:
            self._save_checkpoint()
        try:
            self.session.save(self.folder.path)
        except SimPOError as error:
            existing = list_checkpoints(self.folder.checkpoints)
            last = f"the last checkpoint is {existing[0]}" if existing else "there is no checkpoint"
            raise _AdapterError(f"{error}; {last}; {self._how_to_resume()}") from None

    def _save_after(self, error: BaseException) -> None:
        """Save what an error has left, which is the state after the last finished step."""
        step, remedy = self.session.state.step, self._how_to_resume(error)
        # An adapter that could not be written has nothing left to save.
        if step > self.first_step and not isinstance(error, _AdapterError):
            try:
                self._save_adapter()
            # RuntimeError is MLX's. The first error is the one to be seen.
            except (OSError, RuntimeError, SimPOError) as second:
                self.display.warn(f"the adapter of step {step} could not be saved: {second}")
            else:
                self.display.warn(f"the adapter of step {step} is saved; {remedy}")
        if isinstance(error, NonFiniteError):
            # After the checkpoint: the run that goes on from there takes this step again.
            self.folder.log(error.record, NONFINITE)
            self.display.warn(f"the pairs of this step are in {self.folder.path / NONFINITE}")

    def _end_interrupted(self, number: int) -> None:
        """Save, and say how to go on; KeyboardInterrupt or SystemExit if no step was finished."""
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

    def _how_to_resume(self, error: BaseException | None = None) -> str:
        command, options = resume_command(self.session.config.output), self.session.config.train
        if isinstance(error, NonFiniteError):  # which would come again
            limit = f"max_skipped={2 * self.session.state.skipped + 10}"
            setting = "on_nonfinite=skip" if options.on_nonfinite == "stop" else limit
            command += f" train.{setting}"
        return f"to go on from there: {command}"

    def _result(self, number: int | None) -> TrainResult:
        """Write summary.json and return the result, after showing the evaluations."""
        session, progress = self.session, self.progress
        sets = self._evaluated_sets(is_final=number is None)
        before, after = sets.get(session.valid_main, BeforeAndAfter(None, None))
        message = None if number else verdict(session.model, before, after, self.watch)
        result = TrainResult(
            adapter=self.folder.path,
            pairs=len(session.train),
            sources=session.sources,
            last=self._last or recorded_step(progress.last, session.total_steps),
            before=before,
            after=after,
            valid_sets={name: both for name, both in sets.items() if name},
            best=progress.best[1] if progress.best else None,
            signal=number,
            stopped_early=number is None and session.state.step < session.total_steps,
            skipped=session.state.skipped,
            worse=message is not None,
            seconds=time.monotonic() - self._started,
            save_seconds=self.saver.seconds,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
        )
        for name, both in sets.items():
            if both.before and both.after:
                self.display.evaluations({"before": both.before, "after": both.after}, name)
        self.display.warn(message)
        try:
            self.folder.finish(result.as_dict())
        except SimPOError as error:  # the adapter is saved, and nothing of this is lost
            self.display.warn(str(error))
        return result

    def _evaluated_sets(self, *, is_final: bool) -> dict[str, BeforeAndAfter]:
        """Return the evaluations of each validation set; after: only of the end of a whole run."""
        is_final &= self.progress.evaluated == self.session.state.step
        after = self.evaluations.latest if is_final else {}
        return {
            name: BeforeAndAfter(self.evaluations.before.get(name), after.get(name))
            for name in self.session.valid_sets
        }
