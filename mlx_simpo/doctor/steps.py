"""What a training step costs here: ours with each attention, and the reference."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

from ..config.simpo_config import TrainConfig
from ..engine.choice import REFERENCE, Engine, shared_prefix_engine
from ..engine.figures import AttentionName, Figures
from ..kernels.choice import Implementation
from ..training.state import TrainingState, restore_on_error
from ..training.step import GradientFunction, StepBatch, collate_step
from ..training.trainer import create_gradient_function, submit_update
from .attempts import attempt
from .equality import ATTENTIONS
from .examples import Example

ROUNDS = 2  # in which the variants take turns; a Mac without a fan grows slow as it grows warm
COUNTED = 2  # steps of a turn that count, after one that does not
# Seconds of a step from which on a turn counts only one, and from which on it has only one: what
# the first step does besides (compiling, allocating) does not matter then.
LONG, VERY_LONG = 1.0, 10.0


class Variant(NamedTuple):
    """A way to compute a step. engine: builds its engine for a model. compiled: by mx.compile."""

    name: str
    engine: Callable[[], Engine]
    checkpointing: bool
    compiled: bool


class Step(NamedTuple):
    """What a step has taken: seconds, and bytes of memory at its peak, those of the weights too."""

    seconds: float
    peak: int


class Measurement(NamedTuple):
    """A variant ready to run, and its counted steps."""

    variant: Variant
    options: TrainConfig
    gradient_function: GradientFunction
    batch: StepBatch
    steps: list[Step]

    @property
    def seconds(self) -> float:
        """The median of the counted steps."""
        return statistics.median(step.seconds for step in self.steps)

    @property
    def peak_gb(self) -> float:
        """The highest peak of memory, in 10⁹ bytes."""
        return max(step.peak for step in self.steps) / 1e9


def variants(
    example: Example, implementation: Implementation, figures: Figures, *, shares: bool
) -> list[Variant]:
    """Return the ways to compute a step of this example, those that need little memory first.

    Where there is not enough memory, macOS may end the process: what came before it was shown.

    Args:
        shares: whether the shared-prefix engine can run the model.
    """

    def ours(attention: AttentionName) -> Callable[[], Engine]:
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
                    note(f"{name}: {problem}")
                    continue
                measurements[name] = prepared
            measurement = measurements[name]
            _, problem = attempt(lambda one=measurement: take_turn(example, one, state))
            mx.clear_cache()  # of shapes that the next variant does not have
            if problem is not None:
                problems[name] = problem
                note(f"{name}: {problem}")
                continue
            note(
                f"{name}: {measurement.seconds:.3g} s, {measurement.peak_gb:.3g} GB (turn "
                f"{number + 1} of {ROUNDS})"
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
    )


def take_turn(example: Example, measurement: Measurement, state: TrainingState) -> None:
    """Run a step that is not counted, and then those that are; of long steps fewer."""
    first = run_step(example, measurement, state)
    if first.seconds >= VERY_LONG:
        measurement.steps.append(first)
        return
    for _ in range(COUNTED if first.seconds < LONG else 1):
        measurement.steps.append(run_step(example, measurement, state))


def run_step(example: Example, measurement: Measurement, state: TrainingState) -> Step:
    """Run one optimizer step as a training does."""
    model = example.model
    mx.reset_peak_memory()
    started = time.perf_counter()
    model.train()
    try:
        with restore_on_error(model, state):
            function, batch = measurement.gradient_function, measurement.batch
            mx.eval(submit_update(model, state, measurement.options, function, batch))
    finally:
        model.eval()
    return Step(time.perf_counter() - started, mx.get_peak_memory())


def summary(example: Example, measurement: Measurement) -> dict[str, Any]:
    """Return what a variant's counted steps have shown; see `timed_steps`."""
    return {
        "variant": measurement.variant.name,
        "seconds": measurement.seconds,
        "tokens_per_second": example.tokens / measurement.seconds,
        "peak_gb": measurement.peak_gb,
        "positions": measurement.batch.positions,
        "micro_batches": len(measurement.batch.micro_batches),
    }
