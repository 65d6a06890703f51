"""The training loop: a generator of step metrics.

The caller takes one optimizer step after another and may log, evaluate, save or stop in between;
nothing here writes, prints or decides to stop early.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..config.simpo_config import SimPOConfig, TrainConfig
from ..data.encode import EncodedPair
from ..data.mixing import Mixture, epoch_order
from ..data.order import steps_per_epoch
from ..device import memory_metrics
from ..engine.choice import Engine, configured_engine
from ..engine.gradient_checkpointing import gradient_checkpointing
from ..errors import SimPOError
from ..randomness import random_state
from .state import TrainingState, restore_on_error
from .step import (
    GradientFunction,
    NonFiniteError,
    StepBatch,
    check_finite,
    collate_step,
    step_gradients,
)


@dataclass(frozen=True)
class StepMetrics:
    """The result of one optimizer step.

    step: from 1. epoch: passes over the data so far. metrics: the means over the step's pairs,
    named as in `objectives.simpo_loss`, and

    - learning_rate; grad_norm: the gradient's norm before clipping
    - pairs, and of several sources those of each, pairs/<name>
    - tokens: of both sequences of each pair, the prompt counted twice, without padding
    - positions: tokens that the trunk processed, padding included
    - traces: how often mx.compile has traced the step since the loop began; seconds
    - peak_memory_gb, cache_memory_gb: see `device.memory_metrics`

    nonfinite: of a step that was skipped, which has no other metrics than sizes, rate and time:
    what was not finite (`step.NonFiniteError.record`).
    """

    step: int
    total_steps: int
    epoch: float
    metrics: dict[str, float]
    nonfinite: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, float]:
        """Return step, epoch and the metrics, for a log."""
        skipped = {} if self.nonfinite is None else {"skipped": self.nonfinite["what"]}
        return {"step": self.step, "epoch": round(self.epoch, 4), **skipped, **self.metrics}


def total_steps(config: SimPOConfig, pairs: Sequence[EncodedPair]) -> int:
    """Return the number of optimizer steps of a run on these pairs."""
    options = config.train
    if options.steps is not None:
        return options.steps
    per_epoch = epoch_order(pairs, config.seed).num_pairs
    return math.ceil((options.epochs or 1.0) * steps_per_epoch(per_epoch, options.step_pairs))


def train_steps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    config: SimPOConfig,
    engine: Engine | None = None,
    state: TrainingState | None = None,
) -> Iterator[StepMetrics]:
    """Train the model's trainable weights in place; yield after each optimizer step.

    Each step's gradient is that of the loss over all its pairs, whatever its micro-batches are; the
    last step of an epoch takes the remaining pairs. Between steps the model is in evaluation mode.
    If a step ends early, by Ctrl-C too, model and state are those of the step before.

    Args:
        engine: default: the one that ``config.train.engine`` names, if the model supports it.
        state: where to continue; it advances with each step. Default: the beginning.

    Raises:
        SimPOError: no pairs.
        NonFiniteError: a loss or gradient is NaN or infinite, and may not be skipped (`_skip`).
    """
    if not pairs:
        raise SimPOError("there are no pairs to train on")
    options = config.train
    engine = engine or configured_engine(config, model)
    steps = total_steps(config, pairs)
    per_epoch = steps_per_epoch(epoch_order(pairs, config.seed).num_pairs, options.step_pairs)
    state = state or TrainingState(model, config, steps)
    gradient_function = create_gradient_function(model, config, engine)
    batches = step_batches(pairs, config, engine, state.step, steps)
    batch = next(batches, None)
    while batch:
        started = time.perf_counter()
        model.train()
        state.seed_random_numbers()
        means, nonfinite, next_batch = {}, None, None
        try:
            with restore_on_error(model, state):
                results = submit_update(model, state, options, gradient_function, batch)
                next_batch = next(batches, None)  # collated while the device computes
                mx.eval(results)
                parts, norm, *_ = results
                metrics = {k: np.concatenate([np.array(p[k]) for p in parts]) for k in parts[0]}
                check_finite(state.step + 1, metrics["loss"], float(norm), batch.pairs)
            means = {k: float(v.mean(dtype=np.float64)) for k, v in metrics.items()}
            means["grad_norm"] = float(norm)
        except NonFiniteError as error:
            nonfinite = _skip(error, options, state)
        model.eval()
        state.random = random_state()
        state.step += 1
        means |= _size_metrics(batch) | {
            "traces": gradient_function.traces,
            "learning_rate": float(state.optimizer.learning_rate),
            "seconds": time.perf_counter() - started,
            **memory_metrics(),
        }
        yield StepMetrics(state.step, steps, state.step / per_epoch, means, nonfinite)
        batch = next_batch


def submit_update(
    model: nn.Module,
    state: TrainingState,
    options: TrainConfig,
    gradient_function: GradientFunction,
    batch: StepBatch,
) -> tuple[list[dict[str, mx.array]], mx.array, dict, dict]:
    """Update model and optimizer by the gradient of one step, without waiting for the device.

    Returns:
        The metrics per pair, one dict per micro-batch; the gradient's norm before clipping, as a
        scalar; the updated weights and optimizer state. All may still be being computed.
    """
    with gradient_checkpointing(model) if options.gradient_checkpointing else nullcontext():
        parts, gradients = step_gradients(gradient_function, batch)
    # Without a limit, too: clip_grad_norm also returns the norm.
    gradients, norm = optim.clip_grad_norm(gradients, options.max_grad_norm or math.inf)
    state.optimizer.update(model, gradients)
    results = (parts, norm, model.trainable_parameters(), state.optimizer.state)
    mx.async_eval(results)
    return results


def create_gradient_function(
    model: nn.Module, config: SimPOConfig, engine: Engine
) -> GradientFunction:
    """Return the gradient function of these settings, compiled where they say so."""
    compiled = config.train.compile
    compiled = engine.compiled if compiled is None else compiled
    return GradientFunction(model, asdict(config.objective), engine, compiled=compiled)


def _skip(error: NonFiniteError, options: TrainConfig, state: TrainingState) -> dict[str, Any]:
    """Count a step as skipped, and return what is known of it.

    Raises:
        NonFiniteError: the settings do not allow it.
    """
    if options.on_nonfinite == "stop":
        limit = "train.on_nonfinite=skip omits such steps"
    elif state.skipped >= options.max_skipped:
        limit = f"{state.skipped} were skipped before, and train.max_skipped is no higher"
    else:
        state.skip_update()
        return error.record
    raise NonFiniteError(f"{error}; {limit}", error.record) from None


def step_batches(
    pairs: Sequence[EncodedPair], config: SimPOConfig, engine: Engine, done: int, steps: int
) -> Iterator[StepBatch]:
    """Yield the batches of a run's first ``steps`` optimizer steps, without the first ``done``."""
    orders = epoch_order(pairs, config.seed).steps(config.train.step_pairs, done)
    mixture = pairs if isinstance(pairs, Mixture) and len(pairs.names) > 1 else None
    for order in itertools.islice(orders, max(0, steps - done)):
        batch = collate_step([pairs[i] for i in order], engine, config.train)
        if mixture is not None:
            batch = batch._replace(sources=mixture.take(order).sizes)
        yield batch


def _size_metrics(batch: StepBatch) -> dict[str, int]:
    """Return the numbers of pairs, tokens and positions of a step; see `StepMetrics`."""
    return {
        **{f"pairs/{name}": count for name, count in batch.sources.items()},
        "pairs": len(batch.pairs),
        "tokens": sum(len(p.chosen.tokens) + len(p.rejected.tokens) for p in batch.pairs),
        "positions": batch.positions,
    }
