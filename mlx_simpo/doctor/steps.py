"""What a training step costs here: ours with each attention, and the reference."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

from ..config.simpo_config import TrainConfig
from ..engine.choice import REFERENCE, Engine, shared_prefix_engine
from ..engine.figures import Figures
from ..kernels.choice import Implementation
from ..training.state import TrainingState, restore_on_error
from ..training.step import GradientFunction, StepBatch, collate_step
from ..training.trainer import create_gradient_function, submit_update
from .attempts import attempt
from .equality import ATTENTIONS
from .examples import Example

ROUNDS = 2  # in which the variants take turns; a Mac without a fan grows slow as it grows warm
COUNTED = 2  # steps of a turn that count
LONG_STEP = 1.0  # seconds; of steps that take longer, one per turn counts


class Variant(NamedTuple):
    """A way to compute a step. engine: builds its engine for a model. compiled: by mx.compile."""

    name: str
    engine: Callable[[], Engine]
    checkpointing: bool
    compiled: bool


class Measurement(NamedTuple):
    """A variant ready to run, and what its counted steps have taken."""

    variant: Variant
    options: TrainConfig
    gradient_function: GradientFunction
    batch: StepBatch
    seconds: list[float]
    peaks: list[int]


def variants(
    example: Example, implementation: Implementation, figures: Figures, *, shares: bool
) -> list[Variant]:
    """Return the ways to compute a step of this example, those that need little memory first.

    Where there is not enough memory, macOS may end the process: what came before it was shown.

    Args:
        shares: whether the shared-prefix engine can run the model.
    """

    def ours(attention: Any) -> Callable[[], Engine]:
        return lambda: shared_prefix_engine(example.model, implementation, attention, figures)

    shared = [
        Variant(
            f"ours, attention {name}{', checkpointing' if checkpointing else ''}",
            ours(name),
            checkpointing,
            compiled=False,
        )
        for checkpointing in (True, False)
        for name in ATTENTIONS
    ]
    reference = [
        Variant("reference", lambda: REFERENCE, False, compiled=False),
        Variant("reference, compiled", lambda: REFERENCE, False, compiled=True),
    ]
    return (shared if shares else []) + reference


def timed_steps(
    example: Example, ways: list[Variant], note: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Measure a step of each variant: in turns, after a step that is not counted.

    Args:
        note: told each turn's result at once.

    Yields:
        "variant", "seconds" (the median), "tokens_per_second" (of both sequences, without padding),
        "peak_gb" (10⁹ bytes, the model's weights included), "positions" (that the trunk
        processes, padding included) and "micro_batches"; or only "variant" and "problem".
    """
    state = TrainingState(example.model, example.config, total_steps=1000)
    measurements: dict[str, Measurement] = {}
    problems: dict[str, str] = {}
    for number in range(ROUNDS):
        # Backwards in every other round, so that a machine that grows slow is slow for all.
        for variant in ways if number % 2 == 0 else reversed(ways):
            name = variant.name
            if name in problems:
                continue
            if name not in measurements:
                prepared, problem = attempt(lambda variant=variant: prepare(example, variant))
                if prepared is None:
                    problems[name] = problem or ""
                    note(f"{example.name}: {name}: {problem}")
                    continue
                measurements[name] = prepared
            measurement = measurements[name]
            _, problem = attempt(lambda one=measurement: take_turn(example, one, state))
            mx.clear_cache()  # of shapes that the next variant does not have
            if problem is not None:
                problems[name] = problem
                note(f"{example.name}: {name}: {problem}")
                continue
            seconds, peak = statistics.median(measurement.seconds), max(measurement.peaks)
            note(
                f"{example.name}: {name}: {seconds:.3g} s, {peak / 1e9:.3g} GB "
                f"(turn {number + 1} of {ROUNDS})"
            )
    for variant in ways:
        problem = problems.get(variant.name)
        if problem is not None:
            yield {"variant": variant.name, "problem": problem}
        else:
            yield summary(example, measurements[variant.name])


def prepare(example: Example, variant: Variant) -> Measurement:
    """Return a variant ready to run."""
    engine, config = variant.engine(), example.config
    options = replace(
        config.train,
        engine=engine.name,
        gradient_checkpointing=variant.checkpointing,
        compile=variant.compiled,
    )
    config = replace(config, train=options)
    return Measurement(
        variant,
        options,
        create_gradient_function(example.model, config, engine),
        collate_step(example.pairs, engine, options),
        [],
        [],
    )


def take_turn(example: Example, measurement: Measurement, state: TrainingState) -> None:
    """Run a step that is not counted, and then those that are."""
    first = run_step(example, measurement, state)
    for _ in range(COUNTED if first < LONG_STEP else 1):
        mx.reset_peak_memory()
        measurement.seconds.append(run_step(example, measurement, state))
        measurement.peaks.append(mx.get_peak_memory())


def run_step(example: Example, measurement: Measurement, state: TrainingState) -> float:
    """Run one optimizer step as a training does, and return its seconds."""
    model = example.model
    started = time.perf_counter()
    model.train()
    try:
        with restore_on_error(model, state):
            function, batch = measurement.gradient_function, measurement.batch
            mx.eval(submit_update(model, state, measurement.options, function, batch))
    finally:
        model.eval()
    return time.perf_counter() - started


def summary(example: Example, measurement: Measurement) -> dict[str, Any]:
    """Return what a variant's counted steps have shown; see `timed_steps`."""
    seconds = statistics.median(measurement.seconds)
    return {
        "variant": measurement.variant.name,
        "seconds": seconds,
        "tokens_per_second": example.tokens / seconds,
        "peak_gb": max(measurement.peaks) / 1e9,
        "positions": measurement.batch.positions,
        "micro_batches": len(measurement.batch.micro_batches),
    }
