"""The parts of the report, and what of it counts as not right."""

from typing import Any

import pytest
from helpers.devices import on_cpu
from helpers.doctor import tiny_example

from mlx_simpo.doctor import examine as module
from mlx_simpo.doctor.examine import (
    BUDGET_S,
    PATIENT_BUDGET_S,
    Part,
    add_part,
    calibrate_example,
    calibration_report,
    failures,
)
from mlx_simpo.engine.calibration import Calibration
from mlx_simpo.engine.figures import CPU
from mlx_simpo.engine.trial_shapes import typical_lengths

MEASURED = Calibration(CPU, 1.0, 1e-3, 1e-4, 1e-4, 512, True)
NOTHING = Calibration(CPU, 1.0, None, None, None, 0, False)


def test_parts_become_one_report_with_a_list_of_models() -> None:
    report: dict[str, Any] = {}
    for part in (
        Part({"machine": 1}),
        Part({"name": "a"}, about_model=True),
        Part({"steps": 2}, about_model=True),
        Part({"name": "b"}, about_model=True),
    ):
        add_part(report, part)
    assert report == {"machine": 1, "models": [{"name": "a", "steps": 2}, {"name": "b"}]}


GOOD, BAD = {"name": "attention", "passed": True}, {"name": "attention", "passed": False}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"checks": [GOOD], "operations": [GOOD]}, []),
        ({"problem": "no kernel"}, ["log-probabilities"]),
        ({"checks": [GOOD, BAD]}, ["log-probabilities"]),
        ({"operations": [GOOD, BAD]}, ["MLX's attention"]),
        ({"models": [{"name": "m", "engine": GOOD, "steps": [{"problem": "no memory"}]}]}, []),
        ({"models": [{"name": "m", "engine": BAD}]}, ["the results of m"]),
        ({"models": [{"name": "m", "engine": GOOD, "equality": [BAD]}]}, ["the results of m"]),
        # Of the same operation twice, one word.
        (
            {"operations": [BAD], "models": [{"name": "m", "engine": BAD, "operations": [BAD]}]},
            ["MLX's attention", "the results of m"],
        ),
    ],
)
def test_what_is_not_right(report: dict[str, Any], expected: list[str]) -> None:
    assert failures(report) == expected


def test_a_calibration_that_shows_nothing_is_repeated_with_more_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budgets: list[float] = []

    def calibrate(model: Any, config: Any, lengths: Any, budget_s: float) -> Calibration:
        assert lengths == typical_lengths(example.pairs)
        budgets.append(budget_s)
        return results.pop(0)

    monkeypatch.setattr(module, "calibrate", calibrate)
    example, results = tiny_example(), [MEASURED]
    assert calibrate_example(example) is MEASURED
    results = [NOTHING, MEASURED]
    assert calibrate_example(example) is MEASURED
    assert budgets == [BUDGET_S, BUDGET_S, PATIENT_BUDGET_S]


def test_a_calibration_of_the_tiny_model_is_ready_for_a_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BUDGET_S", 0.3)
    monkeypatch.setattr(module, "PATIENT_BUDGET_S", 0.6)
    with on_cpu():
        report = calibration_report(calibrate_example(tiny_example()))
    assert {"figures", "seconds", "pass_s", "position_s", "note", "table"} <= report.keys()
    assert report["figures"]["source"] in report["note"]


def test_on_a_gpu_a_step_is_computed_with_the_measured_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = MEASURED.figures.__class__(7, 777, 2**19, 2**20, "blocks", "measured in 1.0 s")
    calibration = Calibration(measured, 1.0, 1e-3, 1e-4, 1e-4, 512, True)
    monkeypatch.setattr(module, "calibrate", lambda *arguments: calibration)
    monkeypatch.setattr(module, "random_examples", lambda: iter([tiny_example()]))
    monkeypatch.setattr(module, "machine", dict)
    monkeypatch.setattr(module, "checks", lambda implementation: [])
    monkeypatch.setattr(module, "timings", lambda implementation: [])
    for is_gpu, note in ((False, "built-in numbers for a CPU"), (True, "777")):
        monkeypatch.setattr(module, "is_gpu", lambda is_gpu=is_gpu: is_gpu)
        with on_cpu():
            parts = [part.values for part in module.examine()]
        engines = [values["engine"] for values in parts if "engine" in values]
        assert [note in engine["note"] for engine in engines] == [True]
        assert any("calibration" in values for values in parts) == is_gpu
