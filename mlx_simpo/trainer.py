"""The training loop: a generator of step metrics.

The caller pulls one optimizer step after the other and may log, evaluate, save or stop in between;
nothing here writes, prints or decides when to end early.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
        """step, epoch and the metrics, for a log."""
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
    # At least one step is no warm-up: a run of one step would else train at a rate of 0.
    warmup = min(math.ceil(config.warmup_ratio * steps), steps - 1)
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
    """``f(arrays, chosen_tokens, total_pairs, total_chosen_tokens) -> (metrics, gradients)`` of one
    micro-batch; see `batch_loss`."""
    value_and_grad = nn.value_and_grad(model, partial(batch_loss, model, engine, **objective))

    def share_of_step(*batch: Any) -> tuple[dict[str, mx.array], dict]:
        (_, metrics), gradients = value_and_grad(*batch)
        return metrics, gradients

    # Every array the step reads or that tracing replaces must be named here (mlx.core.compile).
    state = [model.state, mx.random.state]
    return mx.compile(share_of_step, inputs=state, outputs=state) if compiled else share_of_step


@contextmanager
def undone_on_error(model: nn.Module, seed: int) -> Iterator[None]:
    """Put all the model's arrays back if what happens within does not finish.

    An exception while mx.compile traces (Ctrl-C, no memory) leaves its placeholders in the model
    and in mx.random.state; one between the update and its metrics leaves half a step.
    """
    before = tree_map(lambda leaf: leaf, model.state)
    try:
        yield
    except BaseException:
        put_back(model.state, before)
        mx.random.seed(seed)
        raise


def put_back(tree: Any, saved: Any) -> None:
    """Write the leaves of ``saved`` into the dicts, modules and lists of ``tree``."""
    for key, value in saved.items() if isinstance(saved, dict) else enumerate(saved):
        if isinstance(value, dict | list):
            put_back(tree[key], value)
        else:
            tree[key] = value


def train_steps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    config: SimPOConfig,
    engine: Engine = REFERENCE,
) -> Iterator[StepMetrics]:
    """Train the model's trainable weights in place; yields after each optimizer step.

    Each step's gradient is that of the loss over all its pairs, whatever the micro-batches; the
    last step of an epoch takes the pairs that are left. Between steps the model is in evaluation
    mode. Whatever ends a step early, Ctrl-C too, leaves the weights of the step before.

    Raises:
        SimPOError: no pairs, or a loss or gradient that is not a finite number.
    """
    if not pairs:
        raise SimPOError("there are no pairs to train on")
    options = config.train
    steps = total_steps(options, len(pairs))
    per_epoch = steps_per_epoch(len(pairs), options.batch_size, options.gradient_accumulation_steps)
    optimizer = build_optimizer(options, steps)
    optimizer.init(model.trainable_parameters())
    objective = asdict(config.objective)
    mx.random.seed(config.seed)
    gradients_of = gradient_function(model, objective, engine, compiled=options.compile)
    micro_batches = (
        step
        for epoch in range(math.ceil(steps / per_epoch))
        for step in epoch_steps(
            pairs, options.batch_size, options.gradient_accumulation_steps, config.seed, epoch
        )
    )
    for number, micro in zip(range(1, steps + 1), micro_batches, strict=False):
        started = time.perf_counter()
        flat = [pair for batch in micro for pair in batch]
        model.train()
        checkpointing = gradient_checkpointing if options.gradient_checkpointing else nullcontext
        with undone_on_error(model, config.seed):
            with checkpointing(model):
                metrics, gradients = step_gradients(gradients_of, micro, engine)
            gradients, norm = optim.clip_grad_norm(gradients, options.max_grad_norm or math.inf)
            mx.eval(gradients, norm)
            refuse_not_finite(number, metrics["loss"], float(norm), flat)
            optimizer.update(model, gradients)
            mx.eval(model.trainable_parameters(), optimizer.state)
        model.eval()
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
    gradients_of: Callable[..., tuple[dict[str, mx.array], dict]],
    micro: Sequence[Sequence[EncodedPair]],
    engine: Engine = REFERENCE,
) -> tuple[dict[str, np.ndarray], dict]:
    """Metrics pair by pair and the gradient of one step, from its micro-batches in turn."""
    counts = [[p.chosen.scored for p in pairs] for pairs in micro]
    totals = (mx.array(float(sum(map(len, micro)))), mx.array(float(sum(map(sum, counts)))))
    gradients, parts = None, []
    for pairs, chosen_tokens in zip(micro, counts, strict=True):
        metrics, new = gradients_of(engine.batch(pairs), mx.array(chosen_tokens), *totals)
        gradients = new if gradients is None else tree_map(mx.add, gradients, new)
        mx.eval(metrics, gradients)  # one micro-batch's activations in memory at a time
        mx.clear_cache()  # the next one has other shapes; unused buffers would pile up
        parts.append({name: np.array(values) for name, values in metrics.items()})
    assert gradients is not None
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, gradients


def refuse_not_finite(
    step: int, losses: np.ndarray, norm: float, pairs: Sequence[EncodedPair]
) -> None:
    """SimPOError if a pair's loss, or the norm of the step's gradient, is NaN or infinite."""
    if np.isfinite(losses).all() and math.isfinite(norm):
        return
    bad = [p.source for p, loss in zip(pairs, losses, strict=True) if not math.isfinite(loss)]
    what, where = ("loss", bad) if bad else ("gradient", [p.source for p in pairs])
    raise SimPOError(
        f"the {what} of step {step} is not a finite number, at the pairs {', '.join(where)}; "
        "training stops with the weights of the step before. A lower train.learning_rate, or "
        "dtype=float32 with a float16 model, usually mends this"
    )
