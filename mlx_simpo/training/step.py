"""The gradient of one optimizer step, from micro-batches that fit into memory.

The device is kept busy: the graph of a micro-batch is built and submitted while the one before it
is being computed, and nothing is read back in between.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..config.simpo_config import TrainConfig
from ..data.encode import EncodedPair
from ..engine.choice import Engine, MicroBatch
from ..errors import SimPOError
from ..objectives import simpo_loss


class StepBatch(NamedTuple):
    """The pairs of one optimizer step, in the order of its micro-batches, and these as arrays.

    chosen_tokens: per micro-batch, [B] numbers of scored tokens of the chosen responses. totals:
    the step's numbers of pairs and of scored chosen tokens, as scalars. sources: of several
    sources, how many of the pairs each has; empty for one.
    """

    pairs: list[EncodedPair]
    micro_batches: list[MicroBatch]
    chosen_tokens: list[mx.array]
    totals: tuple[mx.array, mx.array]
    sources: Mapping[str, int] = MappingProxyType({})

    @property
    def positions(self) -> int:
        """Number of tokens that the trunk processes, padding included."""
        return sum(batch.positions for batch in self.micro_batches)


def collate_step(pairs: Sequence[EncodedPair], engine: Engine, options: TrainConfig) -> StepBatch:
    """Divide the pairs of one optimizer step into micro-batches, as the engine plans them."""
    plan = engine.plan(pairs, options.batch_size, options.max_tokens_per_step)
    parts = [[pairs[index] for index in indices] for indices in plan]
    chosen_tokens = [[pair.chosen.num_scored for pair in part] for part in parts]
    return StepBatch(
        [pair for part in parts for pair in part],
        [engine.collate(part) for part in parts],
        [mx.array(numbers) for numbers in chosen_tokens],
        # Arrays and not numbers: under mx.compile, a number would be traced as a constant.
        (mx.array(float(len(pairs))), mx.array(float(sum(map(sum, chosen_tokens))))),
    )


def micro_batch_loss(
    model: nn.Module,
    engine: Engine,
    arrays: tuple,
    chosen_tokens: mx.array,
    total_pairs: mx.array,
    total_chosen_tokens: mx.array,
    **objective: Any,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Compute what one micro-batch of B pairs adds to the loss of a step with these totals.

    Args:
        arrays: of `MicroBatch`. chosen_tokens: [B] numbers of scored tokens of the chosen
            responses. objective: the keyword arguments of `objectives.simpo_loss`.

    Returns:
        The loss, and the metrics per pair [B]; see `objectives.simpo_loss`.
    """
    logps = engine.logps(model, arrays, training=True)
    half = len(chosen_tokens)
    return simpo_loss(
        logps[:half],
        logps[half:],
        chosen_tokens,
        total_pairs=total_pairs,
        total_chosen_tokens=total_chosen_tokens,
        **objective,
    )


class GradientFunction:
    """``f(arrays, chosen_tokens, total_pairs, total_chosen_tokens) -> (metrics, gradients)`` of one
    micro-batch; see `micro_batch_loss`. traces: how often mx.compile has traced it."""

    def __init__(
        self, model: nn.Module, objective: dict[str, Any], engine: Engine, *, compiled: bool
    ) -> None:
        self.traces = 0
        self._compiled = compiled
        loss = partial(micro_batch_loss, model, engine, **objective)
        self._value_and_grad = nn.value_and_grad(model, loss)
        # Every array the step reads or that tracing replaces must be named here (mlx.core.compile).
        state = [model.state, mx.random.state]
        run = self._metrics_and_gradients
        self._run = mx.compile(run, inputs=state, outputs=state) if compiled else run

    def __call__(self, *batch: Any) -> tuple[dict[str, mx.array], dict]:
        return self._run(*batch)

    def _metrics_and_gradients(self, *batch: Any) -> tuple[dict[str, mx.array], dict]:
        self.traces += self._compiled  # under mx.compile, this line runs once per shape
        (_, metrics), gradients = self._value_and_grad(*batch)
        return metrics, gradients


def step_gradients(
    gradient_function: GradientFunction, batch: StepBatch
) -> tuple[list[dict[str, mx.array]], dict]:
    """Compute the gradient of one optimizer step.

    Returns:
        The metrics per pair, one dict per micro-batch, and the gradient; both may still be being
        computed.
    """
    gradients, parts = None, []
    for micro_batch, chosen_tokens in zip(batch.micro_batches, batch.chosen_tokens, strict=True):
        metrics, new = gradient_function(micro_batch.arrays, chosen_tokens, *batch.totals)
        before = gradients
        gradients = new if before is None else tree_map(mx.add, before, new)
        mx.async_eval(metrics, gradients)
        if before is not None:
            mx.eval(before)  # no more than two micro-batches' activations in memory at a time
        parts.append(metrics)
    assert gradients is not None
    return parts, gradients


class NonFiniteError(SimPOError):
    """A loss or gradient that is NaN or infinite, with what is known about it.

    record: step, what ("loss" or "gradient"), grad_norm and the step's pairs with their losses;
    numbers that are not finite as text, which JSON can hold.
    """

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        super().__init__(message)
        self.record = record


def check_finite(step: int, losses: np.ndarray, norm: float, pairs: Sequence[EncodedPair]) -> None:
    """Check the losses [N] of a step's N pairs and the norm of its gradient.

    Raises:
        NonFiniteError: one of them is NaN or infinite.
    """
    if np.isfinite(losses).all() and math.isfinite(norm):
        return
    numbered = list(zip(pairs, losses.tolist(), strict=True))
    bad = [pair.source for pair, loss in numbered if not math.isfinite(loss)]
    what, sources = ("loss", bad) if bad else ("gradient", [p.source for p in pairs])
    record = {
        "step": step,
        "what": what,
        "grad_norm": _for_json(norm),
        "pairs": [
            {"source": p.source, "index": p.index, "loss": _for_json(x)} for p, x in numbered
        ],
    }
    raise NonFiniteError(
        f"the {what} of step {step} is not a finite number (pairs: {', '.join(sources)}). A lower "
        "train.learning_rate, or dtype=float32 for a float16 model, usually fixes this",
        record,
    )


def _for_json(number: float) -> float | str:
    """Return a number, or its name ("nan", "inf") if JSON has none for it."""
    return number if math.isfinite(number) else str(number)
