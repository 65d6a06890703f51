"""The training loop: a generator of step metrics.

The caller pulls one optimizer step after the other and may log, evaluate, save or stop in between;
nothing here writes, prints or decides when to end early.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from .config import SimPOConfig, TrainConfig
from .data.batching import epoch_steps, steps_per_epoch
from .data.encode import EncodedPair
from .engine import REFERENCE, Engine
from .errors import SimPOError
from .model.checkpointing import gradient_checkpointing
from .objectives import simpo_loss


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    step: from 1. epoch: passes over the data so far. metrics: means over the step's pairs, under
    the names of `objectives.simpo_loss`, with learning_rate, grad_norm (before clipping), pairs,
    tokens (of both sequences, without padding) and seconds.
    """

    step: int
    total_steps: int
    epoch: float
    metrics: dict[str, float]

    def as_dict(self) -> dict[str, float]:
        return {"step": self.step, "epoch": round(self.epoch, 4), **self.metrics}


def total_steps(config: TrainConfig, pairs: int) -> int:
    """Optimizer steps of a run over ``pairs`` pairs."""
    if config.steps is not None:
        return config.steps
    per_epoch = steps_per_epoch(pairs, config.batch_size, config.gradient_accumulation_steps)
    return math.ceil((config.epochs or 1.0) * per_epoch)


def learning_rate_schedule(config: TrainConfig, steps: int) -> Callable[[mx.array], mx.array]:
    """The rate of update number ``step`` (from 0), as transformers' get_*_schedule_with_warmup:
    linear from 0 during the warm-up, then the schedule down to 0 (or constant)."""
    warmup = math.ceil(config.warmup_ratio * steps)
    peak, after = config.learning_rate, max(1, steps - warmup)
    if config.schedule == "cosine":
        main = optim.cosine_decay(peak, after)
    elif config.schedule == "linear":
        main = optim.linear_schedule(peak, 0.0, after)
    else:
        main = optim.linear_schedule(peak, peak, after)
    if warmup == 0:
        return main
    return optim.join_schedules([optim.linear_schedule(0.0, peak, warmup), main], [warmup])


def build_optimizer(config: TrainConfig, steps: int) -> optim.AdamW:
    """AdamW with torch's semantics: bias correction, and no weight decay unless asked for."""
    return optim.AdamW(
        learning_rate_schedule(config, steps),
        betas=[config.adam_beta1, config.adam_beta2],
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        bias_correction=True,
    )


def batch_loss(
    model: nn.Module,
    engine: Engine,
    arrays: tuple,
    chosen_tokens: mx.array,
    total_pairs: mx.array,
    total_chosen_tokens: mx.array,
    **objective: Any,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Loss of one micro-batch of B pairs, as its share of a step with these totals.

    Args:
        arrays: of `Engine.batch`. chosen_tokens: [B] scored tokens of the chosen answers.
    """
    logps = engine.logps(model, arrays)
    half = chosen_tokens.shape[0]
    return simpo_loss(
        logps[:half],
        logps[half:],
        chosen_tokens,
        total_pairs=total_pairs,
        total_chosen_tokens=total_chosen_tokens,
        **objective,
    )


def gradient_function(
    model: nn.Module, objective: dict[str, Any], engine: Engine = REFERENCE, *, compiled: bool
) -> Callable[..., tuple[dict[str, mx.array], dict]]:
    """``f(batch, totals, gradients) -> (metrics, gradients)``: adds one micro-batch's gradients to
    those of the step so far (None for the first). batch: arrays and chosen_tokens; totals: pairs
    and chosen tokens of the step; see `batch_loss`."""
    value_and_grad = nn.value_and_grad(model, partial(batch_loss, model, engine, **objective))

    def accumulate(batch: tuple, totals: tuple, gradients: dict | None) -> tuple:
        (_, metrics), new = value_and_grad(*batch, *totals)
        return metrics, new if gradients is None else tree_map(mx.add, gradients, new)

    # Every array the step reads or that tracing replaces must be named here (mlx.core.compile).
    state = [model.state, mx.random.state]
    return mx.compile(accumulate, inputs=state, outputs=state) if compiled else accumulate


def train_steps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    config: SimPOConfig,
    engine: Engine = REFERENCE,
) -> Iterator[StepMetrics]:
    """Train the model's trainable weights in place; yields after each optimizer step.

    Each step's gradient is that of the loss over all its pairs, whatever the micro-batches; the
    last step of an epoch takes the pairs that are left.

    Raises:
        SimPOError: the loss or its gradient is not a finite number. The weights are then those of
            the step before.
    """
    options = config.train
    steps = total_steps(options, len(pairs))
    per_epoch = steps_per_epoch(len(pairs), options.batch_size, options.gradient_accumulation_steps)
    optimizer = build_optimizer(options, steps)
    optimizer.init(model.trainable_parameters())
    objective = asdict(config.objective)
    mx.random.seed(config.seed)
    add_gradients = gradient_function(model, objective, engine, compiled=options.compile)
    micro_batches = (
        step
        for epoch in range(math.ceil(steps / per_epoch))
        for step in epoch_steps(
            pairs, options.batch_size, options.gradient_accumulation_steps, config.seed, epoch
        )
    )
    for number, micro in zip(range(1, steps + 1), micro_batches, strict=False):
        started = time.perf_counter()
        model.train()
        with gradient_checkpointing(model) if options.gradient_checkpointing else nullcontext():
            metrics, gradients = step_gradients(add_gradients, micro, engine)
        gradients, norm = optim.clip_grad_norm(gradients, options.max_grad_norm or math.inf)
        mx.eval(gradients, norm)
        flat = [pair for batch in micro for pair in batch]
        refuse_not_finite(number, metrics["loss"], float(norm), flat)
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state)
        mx.clear_cache()  # the next step has other shapes; unused buffers would pile up
        means = {name: float(v.mean(dtype=np.float64)) for name, v in metrics.items()}
        means |= {
            "learning_rate": float(optimizer.learning_rate),
            "grad_norm": float(norm),
            "pairs": len(flat),
            "tokens": sum(len(p.chosen.tokens) + len(p.rejected.tokens) for p in flat),
            "seconds": time.perf_counter() - started,
        }
        yield StepMetrics(number, steps, number / per_epoch, means)


def step_gradients(
    add_gradients: Callable[..., tuple[dict[str, mx.array], dict]],
    micro: Sequence[Sequence[EncodedPair]],
    engine: Engine = REFERENCE,
) -> tuple[dict[str, np.ndarray], dict]:
    """Metrics pair by pair and the gradient of one step, from its micro-batches in turn."""
    counts = [[p.chosen.scored for p in pairs] for pairs in micro]
    totals = (mx.array(float(sum(map(len, micro)))), mx.array(float(sum(map(sum, counts)))))
    gradients, parts = None, []
    for pairs, chosen_tokens in zip(micro, counts, strict=True):
        batch = (engine.batch(pairs), mx.array(chosen_tokens))
        metrics, gradients = add_gradients(batch, totals, gradients)
        mx.eval(metrics, gradients)  # one micro-batch's activations in memory at a time
        parts.append({name: np.array(values) for name, values in metrics.items()})
    assert gradients is not None
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, gradients


def refuse_not_finite(
    step: int, losses: np.ndarray, norm: float, pairs: Sequence[EncodedPair]
) -> None:
    if np.isfinite(losses).all() and math.isfinite(norm):
        return
    bad = [p.source for p, loss in zip(pairs, losses, strict=True) if not math.isfinite(loss)]
    what, where = ("loss", bad) if bad else ("gradient", [p.source for p in pairs])
    raise SimPOError(
        f"the {what} of step {step} is not a finite number, at the pairs {', '.join(where)}; "
        "training stops with the weights of the step before. A lower train.learning_rate, or "
        "dtype=float32 with a float16 model, usually mends this"
    )
