"""Watching the steps of a run for signs that the model is being destroyed.

The loss alone does not tell. With a learning rate that is ten times too high, the run of
configs/demo.yaml reaches a loss of 0.00 and an accuracy of 100 % within seven steps, while its
chosen responses fall to −30 nats per token: less likely than random tokens, at −10.8.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

from ..errors import SimPOError
from ..evaluation import far_above
from ..reporting.advice import COLLAPSE_NATS, COLLAPSE_REMEDY

# Steps whose mean is compared with the mean of the first ones. The chosen log-probability of a step
# varies by 0.15 nats (SmolLM2-135M on AlpacaEval pairs, 16 pairs per step) to 0.9 (on the demo's
# pairs, one pair per step): the mean of 10 steps by 0.05 to 0.3, well below the limit of 1 nat.
WINDOW = 10
FEWEST_STEPS = 5  # before which nothing is known about the noise of this run
HISTORY = 50  # steps from which noise and the usual gradient norm are estimated
# Noise is measured, because it depends on batch size and data. With so many standard deviations,
# 600,000 simulated steps of healthy runs (3,000 runs as in its tests) had no warning.
DEVIATIONS = 5.0
# Steps that are so much less likely than those before them do not belong to the beginning.
SUDDEN_FALL_NATS = 3.0
# In the run on AlpacaEval pairs, which went well, the norm of one step in 60 reached 5 times the
# median. One jump alone does no harm, because it is clipped (train.max_grad_norm).
NORM_JUMP = 10.0
NORM_DEVIATIONS = 3.0
FEWEST_JUMPS = 3
SMALLEST_NORM = 1e-12  # of a destroyed model it is exactly 0, which has no logarithm


class WatchedStep(NamedTuple):
    """What is remembered of one optimizer step."""

    chosen_logp: float
    loss: float
    grad_norm: float


class CollapseWatch:
    """Receives the metrics of each optimizer step and returns warnings, each one sentence.

    Warned about are chosen responses that become much less likely, repeated jumps of the gradient's
    norm, and a loss far above the first one. A warning is not repeated until what it was about has
    passed. Compared are steps with steps: an evaluation may have data of another kind
    (`advice.collapse` compares evaluations).

    >>> watch = CollapseWatch()
    >>> for step in session.steps():
    ...     for warning in watch.add_step(step.metrics):
    ...         display.warn(warning)
    """

    def __init__(self) -> None:
        self._first: list[WatchedStep] = []
        self._recent: list[WatchedStep] = []
        self._active: set[str] = set()

    @property
    def is_degenerating(self) -> bool:
        """Whether something that was warned about has not passed."""
        return bool(self._active)

    def add_step(self, metrics: Mapping[str, float]) -> list[str]:
        """Take note of one step's metrics (`trainer.StepMetrics`) and return new warnings."""
        step = WatchedStep(metrics["logps/chosen"], metrics["loss"], metrics["grad_norm"])
        if len(self._first) < WINDOW:
            self._first.append(step)
        self._recent = [*self._recent, step][-HISTORY:]
        checks = {
            "chosen_logp": self._check_chosen_logp,
            "grad_norm": self._check_grad_norm,
            "loss": self._check_loss,
        }
        warnings = []
        for kind, check in checks.items():
            result = check()
            if isinstance(result, str):
                if kind not in self._active:
                    warnings.append(f"{result}; the model may be degenerating: {COLLAPSE_REMEDY}")
                self._active.add(kind)
            elif result:
                self._active.discard(kind)
        return warnings

    # Each check returns a warning, or whether an earlier one has been overcome.

    def _check_chosen_logp(self) -> str | bool:
        if len(self._recent) < FEWEST_STEPS:
            return False
        begin = before_fall([step.chosen_logp for step in self._first])
        values = [step.chosen_logp for step in self._recent]
        last = values[-WINDOW:]
        fall = fmean(begin) - fmean(last)
        noise = step_noise(values) * math.sqrt(1 / len(begin) + 1 / len(last))
        limit = COLLAPSE_NATS + DEVIATIONS * noise
        if fall <= limit:
            # Half of it, or noise around the limit would warn again and again.
            return fall < limit / 2
        return (
            f"the chosen responses have become {fall:.1f} nats per token less likely (logps/chosen "
            f"is {fmean(last):.1f} in the last {len(last)} steps and was {fmean(begin):.1f} at the "
            "beginning)"
        )

    def _check_grad_norm(self) -> str | bool:
        norms = [step.grad_norm for step in self._recent]
        if len(norms) < WINDOW:
            return False
        # The first ones, too: when a run has learned its pairs, gradients are almost 0, and that of
        # a pair that it has not learned yet is many times greater.
        count = len(before_fall([step.chosen_logp for step in self._first]))
        usual = max(median(norms), median(step.grad_norm for step in self._first[:count]))
        logs = [math.log(max(norm, SMALLEST_NORM)) for norm in norms]
        limit = math.log(max(usual, SMALLEST_NORM))
        limit += max(math.log(NORM_JUMP), NORM_DEVIATIONS * step_noise(logs))
        jumps = sum(log > limit for log in logs[-WINDOW:])
        if jumps < FEWEST_JUMPS:
            return max(logs) <= limit
        return (
            f"the gradient's norm has jumped to {max(norms[-WINDOW:]):.3g}, and was far above its "
            f"usual {usual:.3g} in {jumps} of the last {WINDOW} steps"
        )

    def _check_loss(self) -> str | bool:
        last = [step.loss for step in self._recent[-WINDOW:]]
        begin = fmean(step.loss for step in self._first)
        limit = far_above(begin)  # of fewer steps, the smallest loss is not above their mean
        if min(last) <= limit:
            return max(last) <= limit
        return (
            f"the loss has been above {limit:.2f} for {WINDOW} steps in a row, and was {begin:.2f} "
            "at the beginning"
        )

    def state(self) -> dict[str, Any]:
        """Return everything that later warnings depend on, as JSON values."""
        return {
            "first": [list(step) for step in self._first],
            "recent": [list(step) for step in self._recent],
            "active": sorted(self._active),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was called.

        Raises:
            SimPOError: these are not the values of `state`.
        """
        try:
            first, recent = (
                [WatchedStep(*map(float, step)) for step in state[name]]
                for name in ("first", "recent")
            )
            active = {str(kind) for kind in state["active"]}
        except (KeyError, TypeError, ValueError) as error:
            raise SimPOError(
                f"the saved state of the collapse watch is damaged ({error!r}); resume from an "
                "earlier checkpoint"
            ) from None
        self._first, self._recent, self._active = first, recent, active


def before_fall(logps: Sequence[float]) -> Sequence[float]:
    """Return the log-probabilities before a sudden fall that lasts, or all of them.

    With a learning rate that is far too high, most of the first steps are already bad.
    """
    for count in range(1, len(logps)):
        if fmean(logps[:count]) - max(logps[count:]) > SUDDEN_FALL_NATS:
            return logps[:count]
    return logps


def step_noise(values: Sequence[float]) -> float:
    """Estimate the standard deviation of the noise of single steps.

    From the median change between neighbours, which neither a trend nor a sudden fall disturbs. For
    normal noise of standard deviation 1 that median is 0.954.
    """
    return median(abs(after - before) for before, after in pairwise(values)) / 0.954
