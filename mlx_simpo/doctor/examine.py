"""The report: its parts in their order, each as soon as it is there."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from ..config.sections import MemoryConfig
from ..config.simpo_config import TrainConfig
from ..device import is_gpu
from ..engine.calibration import BUDGET_S, Calibration, calibrate, calibration_table
from ..engine.choice import choose_engine, shared_prefix_engine
from ..engine.figures import default_figures
from ..engine.trial_shapes import typical_lengths
from ..errors import SimPOError
from ..kernels.choice import BUILT_IN, Implementation, Name, choose_implementation
from ..planning.memory_limits import memory_limits
from ..reporting.display import Display
from .attempts import attempt
from .equality import equality
from .examples import Example, loaded_example, random_examples
from .kernel import checks, timings
from .machine import machine
from .operations import checks_of_model, common_checks
from .steps import timed_steps, variants

# Of a calibration, where the few seconds of a run's are not enough.
PATIENT_BUDGET_S = 20.0


class Part(NamedTuple):
    """Some of the report's values, by name; about_model: they belong to the newest model.

    A part of a model that has a "name" begins with a new model.
    """

    values: dict[str, Any]
    about_model: bool = False


def examine(
    model: str | None = None, *, full: bool = False, display: Display | None = None
) -> Iterator[Part]:
    """Yield the report's parts as they are measured.

    - always: the machine, and which engine runs and why
    - without ``model``, or with ``full``: checks and times of log-probabilities
    - with ``model``, with ``full``, or on a GPU: a calibration, and from it what a step would cost
    - with ``full``: also checks of operations, equality with the reference, times of steps

    If the kernel should run here but fails, "problem" has the reason, and ``full`` goes on without
    it.

    Args:
        model: Hub id or folder; default: small random models.
        display: where progress is shown; default: stderr.

    Raises:
        SimPOError: the model cannot be loaded.
    """
    display = display or Display()
    yield Part({"machine": machine()})
    try:
        implementation = choose_implementation()
    except SimPOError as error:
        yield Part({"problem": str(error)})
        if not full:
            return
        implementation = BUILT_IN
    else:
        yield Part({"implementation": implementation.name, "reason": implementation.note})
    if full or model is None:
        yield Part({"checks": checks(implementation)})
        yield Part({"timings": timings(implementation)})
    if full:
        yield Part({"operations": [*common_checks()]})
    examples = random_examples() if model is None else iter([loaded_example(model, display)])
    # On a GPU only a calibration tells which attention runs.
    measure = full or model is not None or is_gpu()
    with memory_limits(MemoryConfig()):  # as in a run
        for example in examples:
            yield from _of_example(example, implementation, measure, full, display)


def _of_example(
    example: Example, implementation: Implementation, measure: bool, full: bool, display: Display
) -> Iterator[Part]:
    """Yield the parts of one model. measure: whether there is a calibration."""
    yield Part(example.describe_model(), about_model=True)
    model, figures = example.model, default_figures()
    impl: Name = "mlx" if implementation is BUILT_IN else "auto"
    engine = choose_engine("shared_prefix", model, impl, "auto", figures)
    shares = engine.name == "shared_prefix"
    if shares and measure:
        display.note(f"{example.name}: calibrating")
        calibration, problem = attempt(lambda: calibrate_example(example))
        if calibration is None:
            yield Part({"calibration": {"problem": problem}}, about_model=True)
        else:
            yield Part({"calibration": calibration_report(calibration)}, about_model=True)
            if is_gpu():  # as in a run
                figures = calibration.figures
                engine = shared_prefix_engine(model, implementation, "auto", figures)
    # A model of ours that cannot share its prompt is a defect; of others there may be some.
    chosen = {"name": engine.name, "note": engine.note, "passed": shares or not example.is_random}
    yield Part({"engine": chosen}, about_model=True)
    if not full:
        return
    yield Part({"pairs": example.describe_pairs()}, about_model=True)
    if shares:
        yield Part({"operations": [*checks_of_model(model)]}, about_model=True)
        display.note(f"{example.name}: comparing with the reference engine")
        yield Part({"equality": [*equality(example, implementation, figures)]}, about_model=True)
    display.note(f"{example.name}: timing training steps")
    ways = variants(example, implementation, figures, shares=shares)
    yield Part({"steps": [*timed_steps(example, ways, display.note)]}, about_model=True)


def calibrate_example(example: Example) -> Calibration:
    """Measure the figures of the example's model, whether or not an earlier run has: as a run does,
    and if that shows nothing, for longer."""
    lengths = typical_lengths(example.pairs)
    calibration = calibrate(example.model, example.config, lengths, BUDGET_S)
    if calibration_table(calibration, 1):
        return calibration
    return calibrate(example.model, example.config, lengths, PATIENT_BUDGET_S)


def calibration_report(calibration: Calibration) -> dict[str, Any]:
    """Return what was measured, and in "table" what training would cost at several lengths.

    is_used: whether a run on this device goes by it.
    """
    figures = calibration.figures
    return {
        **asdict(calibration),
        "note": figures.note,
        "is_used": is_gpu(),  # in a run: on a CPU it takes the built-in figures
        "table": calibration_table(calibration, TrainConfig().batch_size),
    }


def add_part(report: dict[str, Any], part: Part) -> None:
    """Add a part to a report, whose "models" are a list."""
    if not part.about_model:
        report |= part.values
        return
    models = report.setdefault("models", [])
    if "name" in part.values:
        models.append({})
    models[-1] |= part.values


def failures(report: dict[str, Any]) -> list[str]:
    """Return what is not right on this machine, in words; [] if everything is."""
    failed = []
    if "problem" in report or not all(check["passed"] for check in report.get("checks", ())):
        failed.append("log-probabilities")
    models = report.get("models", ())
    operations = [o for part in (report, *models) for o in part.get("operations", ())]
    failed += [f"MLX's {o['name']}" for o in operations if not o["passed"]]
    for model in models:
        if not all(c["passed"] for c in (model["engine"], *model.get("equality", ()))):
            failed.append(f"the results of {model['name']}")
    return list(dict.fromkeys(failed))
