"""The report: its parts in their order, each as soon as it is there."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..engine.choice import choose_engine
from ..engine.figures import default_figures
from ..errors import SimPOError
from ..kernels.choice import BUILT_IN, Implementation, choose_implementation
from ..reporting.display import Display
from .attempts import attempt
from .equality import equality
from .examples import Example, loaded_example, random_examples
from .kernel import checks, timings
from .machine import machine
from .operations import checks_of_model, common_checks
from .steps import timed_steps, variants


class Part(NamedTuple):
    """Some of the report's values, by name; of_model: they belong to the newest model.

    A part of a model that has a "name" begins with a new model.
    """

    values: dict[str, Any]
    of_model: bool = False


def examine(
    model: str | None = None, *, full: bool = False, display: Display | None = None
) -> Iterator[Part]:
    """Yield the report's parts as they are measured.

    - always: the machine, and which engine runs and why
    - without ``model``, or with ``full``: checks and times of log-probabilities
    - with ``model``: what a step of it would cost, from a calibration
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
    for example in examples:
        yield from _of_example(example, implementation, full, display)


def _of_example(
    example: Example, implementation: Implementation, full: bool, display: Display
) -> Iterator[Part]:
    """Yield the parts of one model."""
    figures = default_figures()
    impl = "auto" if implementation is not BUILT_IN else "mlx"
    engine = choose_engine("shared_prefix", example.model, impl, "auto", figures)
    shares = engine.name == "shared_prefix"
    # A model of ours that cannot share its prompt is a defect; of others there may be some.
    chosen = {"name": engine.name, "note": engine.note, "passed": shares or not example.is_random}
    yield Part({**example.describe_model(), "engine": chosen}, of_model=True)
    if not full:
        return
    yield Part({"pairs": example.describe_pairs()}, of_model=True)
    if shares:
        yield Part({"operations": [*checks_of_model(example.model)]}, of_model=True)
        display.note(f"{example.name}: comparing with the reference engine")
        yield Part({"equality": [*equality(example, implementation, figures)]}, of_model=True)
    display.note(f"{example.name}: timing training steps")
    ways = variants(example, implementation, figures, shares=shares)
    yield Part({"steps": [*timed_steps(example, ways, display.note)]}, of_model=True)


def add_part(report: dict[str, Any], part: Part) -> None:
    """Add a part to a report, whose "models" are a list."""
    if not part.of_model:
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
