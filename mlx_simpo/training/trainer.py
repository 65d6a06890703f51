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

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..config.simpo_config import SimPOConfig, TrainConfig
from ..data.encode import EncodedPair
from ..data.order import epoch_steps, steps_per_epoch
from ..engine.choice import Engine, choose_engine
from ..engine.gradient_checkpointing import gradient_checkpointing
from ..errors import SimPOError
from .optimizer import build_optimizer
from .step import (
    GradientFunction,
    StepBatch,
    check_finite,
    collate_step,
    restore_on_error,
    step_gradients,
)


@dataclass(frozen=True)
class StepMetrics:
    """The result of one optimizer step.

    step: from 1. epoch: passes over the data so far. metrics: the means over the step's pairs,
    named as in `objectives.simpo_loss`, and

    - learning_rate; grad_norm: the gradient's norm before clipping
    - pairs; tokens: of both sequences of each pair, the prompt counted twice, without padding
    - positions: tokens that the trunk processed, padding included
    - traces: how often mx.compile has traced the step so far; seconds
    """

    step: int
    total_steps: int
    epoch: float
    metrics: dict[str, float]

    def as_dict(self) -> dict[str, float]:
        """Return step, epoch and the metrics, for a log."""
        return {"step": self.step, "epoch": round(self.epoch, 4), **self.metrics}


def total_steps(config: TrainConfig, pairs: int) -> int:
    """Return the number of optimizer steps of a run over ``pairs`` pairs."""
    if config.steps is not None:
        return config.steps
    return math.ceil((config.epochs or 1.0) * steps_per_epoch(pairs, config.step_pairs))


def train_steps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    config: SimPOConfig,
    engine: Engine | None = None,
) -> Iterator[StepMetrics]:
    """Train the model's trainable weights in place; yield after each optimizer step.

    Each step's gradient is that of the loss over all its pairs, however they are divided into
    micro-batches; the last step of an epoch takes the remaining pairs. Between steps the model is
    in evaluation mode. If a step ends early, by Ctrl-C too, the model has the weights of the step
    before.

    Args:
        engine: default: the one that ``config.train.engine`` names, if the model supports it.

    Raises:
        SimPOError: no pairs, or a loss or gradient that is not a finite number.
    """
    if not pairs:
        raise SimPOError("there are no pairs to train on")
    options = config.train
    engine = engine or choose_engine(options.engine, model, config.logps.impl)
    steps = total_steps(options, len(pairs))
    optimizer = build_optimizer(options, steps)
    optimizer.init(model.trainable_parameters())  # only the trainable ones have moments
    compiled = engine.compiled if options.compile is None else options.compile
    gradient_function = GradientFunction(model, asdict(config.objective), engine, compiled=compiled)
    mx.random.seed(config.seed)
    batches = step_batches(pairs, config, engine, steps)
    batch, step = next(batches, None), 0
    while batch:
        step, started = step + 1, time.perf_counter()
        model.train()
        checkpointing = gradient_checkpointing if options.gradient_checkpointing else nullcontext
        with restore_on_error(model, config.seed):
            with checkpointing(model):
                parts, gradients = step_gradients(gradient_function, batch)
            # Without a limit, too: clip_grad_norm also returns the norm.
            gradients, norm = optim.clip_grad_norm(gradients, options.max_grad_norm or math.inf)
            optimizer.update(model, gradients)
            results = (parts, norm, model.trainable_parameters(), optimizer.state)
            mx.async_eval(results)
            next_batch = next(batches, None)  # collated while the device computes
            mx.eval(results)
            metrics = {k: np.concatenate([np.array(p[k]) for p in parts]) for k in parts[0]}
            check_finite(step, metrics["loss"], float(norm), batch.pairs)
        model.eval()
        means = {name: float(values.mean(dtype=np.float64)) for name, values in metrics.items()}
        means |= _size_metrics(batch) | {
            "traces": gradient_function.traces,
            "learning_rate": float(optimizer.learning_rate),
            "grad_norm": float(norm),
            "seconds": time.perf_counter() - started,
        }
        epoch = step / steps_per_epoch(len(pairs), options.step_pairs)
        yield StepMetrics(step, steps, epoch, means)
        batch = next_batch


def step_batches(
    pairs: Sequence[EncodedPair], config: SimPOConfig, engine: Engine, steps: int
) -> Iterator[StepBatch]:
    """Yield the batches of a run's first ``steps`` optimizer steps."""
    size = config.train.step_pairs
    orders = (
        order
        for epoch in itertools.count()
        for order in epoch_steps(len(pairs), size, config.seed, epoch)
    )
    for order in itertools.islice(orders, steps):
        yield collate_step([pairs[i] for i in order], engine, config.train)


def _size_metrics(batch: StepBatch) -> dict[str, int]:
    """Return the numbers of pairs, tokens and positions of a step; see `StepMetrics`."""
    return {
        "pairs": len(batch.pairs),
        "tokens": sum(len(p.chosen.tokens) + len(p.rejected.tokens) for p in batch.pairs),
        "positions": batch.positions,
    }
