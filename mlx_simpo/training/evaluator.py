"""The evaluations of a run: when they are due, and what follows from them."""

from collections.abc import Callable

from ..device import memory_metrics
from ..errors import SimPOError
from ..evaluation import Evaluation
from ..reporting import advice
from ..reporting.display import count_text
from ..runs.folder import RunFolder
from ..sampling.samples import Sample, sample_responses
from .early_stopping import EarlyStopping
from .recording import evaluation_record, record_samples
from .resuming import Evaluations, Progress
from .session import Session


class Evaluator:
    """Evaluates the model of a session, keeps the best adapter, and says when to stop early.

    What it finds is written to ``progress`` and ``evaluations``, which a checkpoint holds.

    Args:
        check: called during an evaluation after each batch; what it raises ends the evaluation.
    """

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        progress: Progress,
        evaluations: Evaluations,
        check: Callable[[], None],
    ) -> None:
        self._session, self._folder, self._check = session, folder, check
        self._progress, self._evaluations = progress, evaluations
        self._has_fallen = False  # whether advice.collapse has been given
        self._early_stopping = EarlyStopping(session.config.train.early_stopping)
        if progress.early_stopping:
            self._early_stopping.restore(progress.early_stopping)

    @property
    def is_over(self) -> bool:
        """Whether no step is left: all are done, or the evaluations no longer improve."""
        state, total = self._session.state, self._session.total_steps
        return state.step == total or self._early_stopping.is_over

    def evaluate_if_due(self) -> bool:
        """Evaluate if it is the turn of it after the last finished step; return whether it was.

        Raises:
            SimPOError: log-probabilities that are not finite.
            Exception: what ``check`` raises.
        """
        session, progress, options = self._session, self._progress, self._session.config.train
        step, every = session.state.step, options.eval_every
        is_due = step == 0 or self.is_over or (every is not None and step % every == 0)
        if not is_due or progress.evaluated == step:
            return False
        pairs = sum(map(len, session.valid_sets.values()))
        if step == 0 and pairs > options.step_pairs:  # else it takes no longer than a step
            session.display.note(
                f"step 1 begins after an evaluation on {count_text(pairs, 'pair')}; a smaller "
                "data.valid_max makes it shorter"
            )
        title = "Before" if step == 0 else "After" if self.is_over else f"Step {step}"
        results, samples = session.evaluate_sets(title, self._check), None
        if options.sample_prompts:
            samples = sample_responses(
                session.model,
                session.tokenizer,
                session.encoder,
                options.sample_prompts,
                options.sample_tokens,
            )
        # Only now, when nothing can fail any more: a run that is resumed does all of it again.
        if results:
            self._add_evaluations(step, results)
        if samples is not None:
            progress.samples = progress.samples or [sample.as_dict() for sample in samples]
            first = [Sample(**sample) for sample in progress.samples]
            record_samples(self._folder, self._session.display, step, samples, first)
        progress.early_stopping = self._early_stopping.state()
        progress.evaluated = step
        return True

    def _add_evaluations(self, step: int, results: dict[str, Evaluation]) -> None:
        """Log the results, keep the adapter if it is the best one, and see whether to stop.

        The main validation set alone decides.
        """
        main, every = self._session.valid_main, self._session.config.train.eval_every
        result = results[main]
        if every is not None and step > 0:
            self._keep_if_best(step, result.metrics["loss"])
        self._folder.log({"step": step} | evaluation_record(results) | memory_metrics())
        self._evaluations.latest = results
        if step == 0:
            self._evaluations.before = results
        if self._evaluations.before and not self._has_fallen:
            fall = advice.collapse(self._evaluations.before[main], result)
            self._session.display.warn(fall)
            self._has_fallen = fall is not None
        reason = self._early_stopping.add_evaluation(result.metrics)
        if reason and step < self._session.total_steps:
            self._session.display.note(f"stopping early, after step {step}: {reason}")

    def _keep_if_best(self, step: int, loss: float) -> None:
        if self._progress.best is not None and loss >= self._progress.best[0]:
            return
        try:
            self._session.save(self._folder.path / "best")
        except SimPOError as error:
            self._session.display.warn(
                f"the best adapter so far, of step {step}, is not kept: {error}"
            )
        else:
            self._progress.best = (loss, step)
