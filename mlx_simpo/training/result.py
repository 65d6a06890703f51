"""The result of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn

from ..data.mixing import SourceCounts
from ..engine.vocabulary import vocabulary_size
from ..evaluation import Evaluation
from ..reporting import advice
from .stopping import exit_status
from .trainer import StepMetrics
from .watch import CollapseWatch

# Exit status of a run whose evaluation is worse after training than before.
ENDED_WORSE = 3


class BeforeAndAfter(NamedTuple):
    """The evaluations of one validation set before and after the training, as far as there are."""

    before: Evaluation | None
    after: Evaluation | None

    def as_dict(self) -> dict[str, Any]:
        """Return both as plain values, for JSON."""
        return {k: None if v is None else v.as_dict() for k, v in self._asdict().items()}


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    adapter: the output folder. pairs: number of training pairs. sources: what there is of each
    training source. last: the last step. before, after: evaluations of the main validation set;
    None without validation pairs, and after also if the run was interrupted. valid_sets: those of
    all sets that have names. best: the step with the lowest evaluation loss, whose adapter is in
    best/ (with train.eval_every).
    signal: the number of the signal that interrupted the run. stopped_early: by
    train.early_stopping. skipped: steps without an update, because it was not finite. worse: the
    model is worse after training than before (`advice.ended_worse`). seconds: of training and
    evaluations, over all the times that the run was resumed; save_seconds: of the checkpoints since
    it was last begun or resumed. peak_memory_gb: MLX's, in GB (10⁹ bytes).
    """

    adapter: Path
    pairs: int
    sources: dict[str, SourceCounts]
    last: StepMetrics
    before: Evaluation | None
    after: Evaluation | None
    valid_sets: dict[str, BeforeAndAfter]
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
            return exit_status(self.signal)
        return ENDED_WORSE if self.worse else 0

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain values, for JSON."""
        return {
            "adapter": str(self.adapter),
            "pairs": self.pairs,
            "sources": {name: counts._asdict() for name, counts in self.sources.items()},
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
            **BeforeAndAfter(self.before, self.after).as_dict(),
            "valid_sets": {name: both.as_dict() for name, both in self.valid_sets.items()},
        }


def verdict(
    model: nn.Module, before: Evaluation | None, after: Evaluation | None, watch: CollapseWatch
) -> str | None:
    """Say how a run ended worse than it began; None if it did not."""
    if before and after:
        return advice.ended_worse(before, after, vocabulary_size(model))
    if watch.is_degenerating:  # there are no validation pairs
        return "the run ended while the model was degenerating, see the warnings above"
    return None


def recorded_step(record: Mapping[str, Any] | None, total_steps: int) -> StepMetrics:
    """Return a step from its record (`StepMetrics.as_dict`), of a run resumed at its end."""
    assert record is not None
    metrics = {name: value for name, value in record.items() if name not in ("step", "epoch")}
    return StepMetrics(record["step"], total_steps, record["epoch"], metrics)
