"""Whether the shared-prefix engine computes on this device what the reference computes."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any, NamedTuple, get_args

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..device import is_gpu
from ..engine.choice import REFERENCE, Engine, shared_prefix_engine
from ..engine.figures import AttentionName, Figures
from ..engine.gradient_checkpointing import gradient_checkpointing
from ..kernels.choice import Implementation
from ..model.loading import dtype_of
from ..training.step import GradientFunction, collate_step, step_gradients
from .attempts import attempt, finite
from .examples import Example

ATTENTIONS: tuple[AttentionName, ...] = get_args(AttentionName)
# Allowed differences by dtype: of average log-probabilities, in nats per token, and of the entries
# of a LoRA gradient, relative to its largest one. On a CPU, 30 layers in float32 differ by 1.4e-6
# and 1.5e-5, 16 layers by 5e-4 and 4e-2 in bfloat16, and by 4e-5 and 6e-3 in float16.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 0.25), "float16": (0.02, 0.1)}
# GPUs multiply float32 in TF32, which has the 10 bits of float16 (MLX_ENABLE_TF32).
GPU_FLOAT32 = TOLERANCES["float16"]
# A weight whose gradient is next to nothing is compared with this share of the largest one of all.
FLOOR = 0.01


class Results(NamedTuple):
    """What an engine computes of an example.

    trained, evaluated: float64 [2B], average log-probabilities of the chosen and then the rejected
    responses, in nats per token, from a forward pass of training and one of evaluation. gradients:
    of the step's loss, by the names of the LoRA weights, float64.
    """

    trained: np.ndarray
    evaluated: np.ndarray
    gradients: dict[str, np.ndarray]


def equality(
    example: Example, implementation: Implementation, figures: Figures
) -> Iterator[dict[str, Any]]:
    """Compare each attention, with and without gradient checkpointing, with the reference.

    Yields:
        "attention" and "checkpointing", "dtype", the largest differences "error" (in nats per
        token) and "gradient_error" (relative to the largest entry of each weight's gradient) with
        "tolerance" and "gradient_tolerance", and "passed"; the differences are None where one of
        the two is not a number, or where "problem" tells why it does not run.
    """
    dtype = dtype_of(example.model)
    limits = tolerances(dtype)
    expected, reference_problem = attempt(lambda: results(example, REFERENCE, checkpointing=False))
    for attention, checkpointing in product(ATTENTIONS, (False, True)):
        if expected is None:
            compared, problem = None, f"the reference fails: {reference_problem}"
        else:
            build = partial(shared_prefix_engine, example.model, implementation, attention, figures)
            compared, problem = attempt(partial(_compare, example, build, checkpointing, expected))
        errors = compared or (None, None)
        yield {
            "attention": attention,
            "checkpointing": checkpointing,
            "dtype": dtype,
            "error": errors[0],
            "gradient_error": errors[1],
            "tolerance": limits[0],
            "gradient_tolerance": limits[1],
            "problem": problem,
            "passed": all(
                error is not None and error <= limit
                for error, limit in zip(errors, limits, strict=True)
            ),
        }
        mx.clear_cache()


def _compare(
    example: Example, build: Callable[[], Engine], checkpointing: bool, expected: Results
) -> tuple[float | None, float | None]:
    """Build an engine, and return its `differences` from what is expected."""
    return differences(results(example, build(), checkpointing), expected)


def tolerances(dtype: str) -> tuple[float, float]:
    """Return the allowed differences of log-probabilities and of gradients in this dtype."""
    return GPU_FLOAT32 if dtype == "float32" and is_gpu() else TOLERANCES[dtype]


def results(example: Example, engine: Engine, checkpointing: bool) -> Results:
    """Compute log-probabilities and the gradient of one step on the example's pairs."""
    model, config = example.model, example.config
    batch = collate_step(example.pairs, engine, config.train)
    model.train()
    try:
        with gradient_checkpointing(model) if checkpointing else nullcontext():
            function = GradientFunction(model, asdict(config.objective), engine, compiled=False)
            parts, gradients = step_gradients(function, batch)
            mx.eval(parts, gradients)
    finally:
        model.eval()
    # A step's pairs come in the order of its micro-batches, which differs between engines.
    order = np.argsort([pair.index for pair in batch.pairs])
    trained = [
        np.concatenate([np.array(part[f"logps/{name}"], np.float64) for part in parts])[order]
        for name in ("chosen", "rejected")
    ]
    halves: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for micro_batch in batch.micro_batches:
        logps = np.array(engine.logps(model, micro_batch.arrays, training=False), np.float64)
        for half, values in zip(halves, np.split(logps, 2), strict=True):
            half.append(values)
    evaluated = [np.concatenate(half)[order] for half in halves]
    flat: Any = tree_flatten(gradients)
    return Results(
        np.concatenate(trained),
        np.concatenate(evaluated),
        {name: np.array(value.astype(mx.float32), np.float64) for name, value in flat},
    )


def differences(actual: Results, expected: Results) -> tuple[float | None, float | None]:
    """Return the largest differences of log-probabilities, in nats per token, and of gradients,
    relative to the largest entry of each weight's (or to FLOOR of the largest of all); None for one
    that is not a finite number."""
    logps = [
        np.abs(actual.trained - expected.trained).max(),
        np.abs(actual.evaluated - expected.evaluated).max(),
    ]
    largest = {name: np.abs(value).max() for name, value in expected.gradients.items()}
    floor = FLOOR * max(largest.values())
    gradients = [
        np.abs(actual.gradients[name] - value).max() / max(largest[name], floor)
        for name, value in expected.gradients.items()
    ]
    # max() of Python passes NaN over, that of NumPy does not.
    return finite(np.max(logps)), finite(np.max(gradients))
