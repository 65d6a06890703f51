"""The training loop: a generator of step metrics.

The caller pulls one optimizer step after the other and may log, evaluate, save or stop in between;
nothing here writes, prints or decides when to end early.
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
    Step,
    make_step,
    refuse_not_finite,
    step_gradients,
    undone_on_error,
)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    step: from 1. epoch: passes over the data so far. metrics: means over the step's pairs, under
    the names of `objectives.simpo_loss`, with learning_rate, grad_norm (before clipping), pairs,
    tokens (of both sequences, prompts twice, without padding), positions (tokens that went through
    the trunk, prompts as often as they did, with padding), traces (of mx.compile, so far) and
    seconds.
    """

    step: int
    total_steps: int
    epoch: float
    metrics: dict[str, float]

    def as_dict(self) -> dict[str, float]:
        """step, epoch and the metrics, for a log."""
        return {"step": self.step, "epoch": round(self.epoch, 4), **self.metrics}


def total_steps(config: TrainConfig, pairs: int) -> int:
    """Optimizer steps of a run over ``pairs`` pairs."""
    if config.steps is not None:
        return config.steps
    return math.ceil((config.epochs or 1.0) * steps_per_epoch(pairs, config.step_pairs))


def train_steps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    config: SimPOConfig,
    engine: Engine | None = None,
) -> Iterator[StepMetrics]:
    """Train the model's trainable weights in place; yields after each optimizer step.

    Each step's gradient is that of the loss over all its pairs, whatever the micro-batches; the
    last step of an epoch takes the pairs that are left. Between steps the model is in evaluation
    mode. Whatever ends a step early, Ctrl-C too, leaves the weights of the step before.

    engine: None for what ``config.train.engine`` and the model make of it.

    Raises:
        SimPOError: no pairs, or a loss or gradient that is not a finite number.
    """
    if not pairs:
        raise SimPOError("there are no pairs to train on")
    options = config.train
    engine = engine or choose_engine(options.engine, model, config.logps.impl)
    steps = total_steps(options, len(pairs))
    optimizer = build_optimizer(options, steps)
    optimizer.init(model.trainable_parameters())
    compiled = engine.compiled if options.compile is None else options.compile
    gradients_of = GradientFunction(model, asdict(config.objective), engine, compiled=compiled)
    mx.random.seed(config.seed)
    prepared = prepared_steps(pairs, config, engine, steps)
    step, number = next(prepared, None), 0
    while step:
        number, started = number + 1, time.perf_counter()
        model.train()
        checkpointing = gradient_checkpointing if options.gradient_checkpointing else nullcontext
        with undone_on_error(model, config.seed):
            with checkpointing(model):
                parts, gradients = step_gradients(gradients_of, step)
            gradients, norm = optim.clip_grad_norm(gradients, options.max_grad_norm or math.inf)
            optimizer.update(model, gradients)
            results = (parts, norm, model.trainable_parameters(), optimizer.state)
            mx.async_eval(results)
            following = next(prepared, None)  # made while the device is at work
            mx.eval(results)
            metrics = {k: np.concatenate([np.array(p[k]) for p in parts]) for k in parts[0]}
            refuse_not_finite(number, metrics["loss"], float(norm), step.pairs)
        model.eval()
        means = {name: float(values.mean(dtype=np.float64)) for name, values in metrics.items()}
        means |= counts(step) | {
            "traces": gradients_of.traces,
            "learning_rate": float(optimizer.learning_rate),
            "grad_norm": float(norm),
            "seconds": time.perf_counter() - started,
        }
        epoch = number / steps_per_epoch(len(pairs), options.step_pairs)
        yield StepMetrics(number, steps, epoch, means)
        step = following


def prepared_steps(
    pairs: Sequence[EncodedPair], config: SimPOConfig, engine: Engine, steps: int
) -> Iterator[Step]:
    """The batches of a run's first ``steps`` steps, made when they are asked for."""
    size = config.train.step_pairs
    orders = (
        order
        for epoch in itertools.count()
        for order in epoch_steps(len(pairs), size, config.seed, epoch)
    )
    for order in itertools.islice(orders, steps):
        yield make_step([pairs[i] for i in order], engine, config.train)


def counts(step: Step) -> dict[str, int]:
    """What a step's time goes into."""
    return {
        "pairs": len(step.pairs),
        "tokens": sum(len(p.chosen.tokens) + len(p.rejected.tokens) for p in step.pairs),
        "positions": step.positions,
    }
