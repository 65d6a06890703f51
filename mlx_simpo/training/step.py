"""The gradient of one optimizer step, from micro-batches that fit into memory.

The device is kept busy: a micro-batch's graph is built and handed over while the one before it is
computed, and nothing is read back in between.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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

# Arrays of freed buffers are kept for the next ones of their size, up to this many bytes.
CACHE_BYTES = 2**30


class Step(NamedTuple):
    """One optimizer step's pairs, in the order of its micro-batches, and those as arrays.

    chosen_tokens: of each micro-batch, [B] scored tokens of the chosen answers. totals: the step's
    pairs and chosen tokens, as scalars.
    """

    pairs: list[EncodedPair]
    micro: list[MicroBatch]
    chosen_tokens: list[mx.array]
    totals: tuple[mx.array, mx.array]

    @property
    def positions(self) -> int:
        """Tokens that the trunk processes, padding included."""
        return sum(batch.positions for batch in self.micro)


def make_step(pairs: Sequence[EncodedPair], engine: Engine, options: TrainConfig) -> Step:
    """The pairs of one optimizer step, divided as the engine finds cheapest."""
    plan = engine.plan(pairs, options.batch_size, options.max_tokens_per_step)
    parts = [[pairs[place] for place in places] for places in plan]
    counts = [[pair.chosen.num_scored for pair in part] for part in parts]
    return Step(
        [pair for part in parts for pair in part],
        [engine.collate(part) for part in parts],
        [mx.array(c) for c in counts],
        (mx.array(float(len(pairs))), mx.array(float(sum(map(sum, counts))))),
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
    logps = engine.logps(model, arrays, training=True)
    half = chosen_tokens.shape[0]
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
    micro-batch; see `batch_loss`. traces: how often it was traced for mx.compile."""

    def __init__(
        self, model: nn.Module, objective: dict[str, Any], engine: Engine, *, compiled: bool
    ) -> None:
        self.traces = 0
        self._compiled = compiled
        loss = partial(batch_loss, model, engine, **objective)
        self._value_and_grad = nn.value_and_grad(model, loss)
        # Every array the step reads or that tracing replaces must be named here (mlx.core.compile).
        state = [model.state, mx.random.state]
        run = self._share_of_step
        self._run = mx.compile(run, inputs=state, outputs=state) if compiled else run

    def __call__(self, *batch: Any) -> tuple[dict[str, mx.array], dict]:
        return self._run(*batch)

    def _share_of_step(self, *batch: Any) -> tuple[dict[str, mx.array], dict]:
        self.traces += self._compiled  # under mx.compile, this line runs once a shape
        (_, metrics), gradients = self._value_and_grad(*batch)
        return metrics, gradients


def step_gradients(
    gradients_of: GradientFunction, step: Step
) -> tuple[list[dict[str, mx.array]], dict]:
    """Metrics pair by pair (of each micro-batch) and the gradient of one step; both still on their
    way when this returns."""
    gradients, parts = None, []
    for batch, chosen_tokens in zip(step.micro, step.chosen_tokens, strict=True):
        metrics, new = gradients_of(batch.arrays, chosen_tokens, *step.totals)
        before = gradients
        gradients = new if before is None else tree_map(mx.add, before, new)
        mx.async_eval(metrics, gradients)
        if before is not None:
            mx.eval(before)  # no more than two micro-batches' activations at a time
        if mx.get_cache_memory() > CACHE_BYTES:  # shapes change; buffers of old ones pile up
            mx.clear_cache()
        parts.append(metrics)
    assert gradients is not None
    return parts, gradients


@contextmanager
def undone_on_error(model: nn.Module, seed: int) -> Iterator[None]:
    """Put all the model's arrays back if what happens within does not finish.

    An exception while mx.compile traces (Ctrl-C, no memory) leaves its placeholders in the model
    and in mx.random.state; one between the update and its metrics leaves half a step.
    """
    before = tree_map(lambda leaf: leaf, model.state)
    try:
        yield
    except BaseException:  # Ctrl-C too
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
