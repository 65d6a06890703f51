"""Ending a run whose evaluations no longer improve."""

from collections.abc import Mapping
from typing import Any

from ..config.early_stopping import EarlyStoppingConfig
from ..errors import SimPOError
from ..reporting.display import count_text


class EarlyStopping:
    """Receives the metrics of each evaluation and says when to stop.

    best: the best value of the metric so far; None before the first evaluation. waited: evaluations
    since then. The evaluation before training counts: a run that only gets worse stops, too.
    """

    def __init__(self, config: EarlyStoppingConfig) -> None:
        self.config = config
        self.best: float | None = None
        self.waited = 0

    @property
    def is_over(self) -> bool:
        """Whether the last evaluation was one too many without an improvement."""
        patience = self.config.patience
        return patience is not None and self.waited >= patience

    def add_evaluation(self, metrics: Mapping[str, float]) -> str | None:
        """Take note of an evaluation's metrics; return why the run should stop, or None."""
        config, value = self.config, metrics[self.config.metric]
        if self.best is None or self._improvement(value) > config.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if not self.is_over:
            return None
        verb = "fallen" if config.metric == "loss" else "risen"
        by = f" by more than {config.min_delta:g}" if config.min_delta else ""
        return (
            f"eval_{config.metric} has not {verb}{by} in "
            f"{count_text(self.waited, 'evaluation')} (best {self.best:.4f}, now {value:.4f})"
        )

    def _improvement(self, value: float) -> float:
        """Return by how much ``value`` is better than the best one."""
        assert self.best is not None
        return self.best - value if self.config.metric == "loss" else value - self.best

    def state(self) -> dict[str, Any]:
        """Return everything that the next decision depends on, as JSON values."""
        return {"metric": self.config.metric, "best": self.best, "waited": self.waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was called.

        Raises:
            SimPOError: these are not the values of `state`, or another metric's.
        """
        try:
            metric, best, waited = state["metric"], state["best"], int(state["waited"])
            best = None if best is None else float(best)
        except (KeyError, TypeError, ValueError) as error:
            raise SimPOError(
                f"the saved state of early stopping is damaged ({error!r}); resume from an earlier "
                "checkpoint"
            ) from None
        if metric != self.config.metric:
            raise SimPOError(
                f"train.early_stopping.metric is {self.config.metric!r}; the run began with "
                f"{metric!r}, whose best value cannot be compared"
            )
        self.best, self.waited = best, waited
