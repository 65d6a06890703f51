"""A run goes on with the figures that it began with, whatever would be measured meanwhile.

MLX reports a GPU, and each measurement has other figures than the one before: another division into
micro-batches, and so other last digits.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.clock import FakeClock
from helpers.devices import on_stand_in_gpu
from helpers.runs import Runs, after_line, assert_same_run, send
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import SimPOConfig, SimPOError
from mlx_simpo.engine import calibrated, calibration
from mlx_simpo.engine.calibrated import calibration_folder
from mlx_simpo.engine.calibration import Calibration
from mlx_simpo.engine.figures import default_figures
from mlx_simpo.engine.pass_timing import PassTiming
from mlx_simpo.engine.stopwatch import Measurement
from mlx_simpo.engine.trial_shapes import Lengths, shape_of
from mlx_simpo.runs.checkpoints import list_checkpoints
from mlx_simpo.runs.manifest import MANIFEST, write_manifest
from mlx_simpo.training.resuming import PROGRESS, recorded_figures

# What a pass costs in the first, second … measurement: each sequence in a pass of its own, and all
# of a micro-batch in one.
PASS_COSTS = (1, 500, 30, 250)
# What is said of the first.
FIRST = "micro-batches of up to 64 tokens; one more forward pass costs as much as 1 token"
SETTINGS = (
    "logps.impl=mlx",
    "train.batch_size=4",
    "train.gradient_accumulation_steps=1",
    "train.steps=3",
    "train.eval_every=null",
)


class Measurements:
    """The calibrations so far, by a clock that makes each different."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        patch.setattr(calibrated, "calibrate", self._calibrate)
        patch.setattr(calibration, "time_passes", self._time_passes)
        patch.setattr(calibration, "time_attention", lambda *_: [])
        patch.setattr(calibration, "time_head", lambda *_: None)

    def _calibrate(self, model: Any, config: SimPOConfig, lengths: Lengths) -> Calibration:
        self.count += 1
        return calibration.calibrate(model, config, lengths, 3.0, FakeClock())

    def _time_passes(self, watch: Any, work_of: Any, lengths: Lengths, *_: Any) -> list[PassTiming]:
        pass_s = PASS_COSTS[self.count - 1] * 1e-4
        return [
            PassTiming(s, Measurement(pass_s * s.passes + 1e-4 * s.positions, 0))
            for s in (shape_of(64, lengths), shape_of(512, lengths))
        ]


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> Iterator[Measurements]:
    shutil.rmtree(calibration_folder(), ignore_errors=True)
    with on_stand_in_gpu():
        yield Measurements(monkeypatch)
    shutil.rmtree(calibration_folder(), ignore_errors=True)


@pytest.fixture
def runs(model_folder: Path, tmp_path: Path) -> Runs:
    return Runs(model_folder, write_jsonl(tmp_path / "pairs.jsonl", some_pairs()), tmp_path)


def figures_of(folder: Path) -> dict[str, Any]:
    """The figures in the newest checkpoint of a run."""
    newest = list_checkpoints(folder / "checkpoints")[0]
    return json.loads((newest / PROGRESS).read_text("utf-8"))["figures"]


def interrupt(runs: Runs, name: str, *settings: str) -> None:
    with after_line(2, lambda folder: send(2)):
        runs.begin(name, *SETTINGS, *settings)


def test_a_resumed_run_is_the_same_bit_for_bit_though_others_would_be_measured(
    runs: Runs, measurements: Measurements
) -> None:
    whole = runs.begin("whole", *SETTINGS)
    assert f"; measured in 0.0 s: {FIRST}" in whole.text
    shutil.rmtree(calibration_folder())
    measurements.count = 0
    interrupt(runs, "parts")
    shutil.rmtree(calibration_folder())  # so that anything measured now would be different
    resumed = runs.resume("parts")
    assert f"; recorded by the run: {FIRST}" in resumed.text
    assert measurements.count == 1
    assert_same_run(runs.root / "parts", runs.root / "whole")


def test_other_figures_are_not_the_same_run(runs: Runs, measurements: Measurements) -> None:
    """Or the test above would show nothing."""
    for name in ("one", "two"):
        runs.begin(name, *SETTINGS)
        shutil.rmtree(calibration_folder())
    assert measurements.count == 2
    one, two = (
        [json.loads(line) for line in (runs.root / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [r.get("positions") for r in one] != [r.get("positions") for r in two]


def test_a_cache_that_has_changed_meanwhile_is_not_read(
    runs: Runs, measurements: Measurements
) -> None:
    interrupt(runs, "run")
    before = figures_of(runs.root / "run")
    shutil.rmtree(calibration_folder())
    runs.begin("other", *SETTINGS)  # measures again, and fills the cache with other figures
    assert figures_of(runs.root / "other")["pass_cost"] == 500
    runs.resume("run")
    assert figures_of(runs.root / "run") == before
    assert before["pass_cost"] == 1


def test_a_second_run_takes_what_the_first_has_measured(
    runs: Runs, measurements: Measurements
) -> None:
    runs.begin("one", *SETTINGS)
    two = runs.begin("two", *SETTINGS)
    assert f"; measured earlier on this machine: {FIRST}" in two.text
    assert measurements.count == 1
    assert figures_of(runs.root / "one") == figures_of(runs.root / "two")


def test_turned_off_the_numbers_are_built_in_and_a_change_is_mentioned(
    runs: Runs, measurements: Measurements
) -> None:
    interrupt(runs, "run")
    resumed = runs.resume("run", "engine.calibration=off")
    assert "engine.calibration changed: the run goes on, but not bit for bit" in resumed.text
    assert default_figures().note in resumed.text
    assert figures_of(runs.root / "run") == default_figures().as_dict()
    assert measurements.count == 1


def test_turned_on_they_are_measured(runs: Runs, measurements: Measurements) -> None:
    interrupt(runs, "run", "engine.calibration=off")
    assert figures_of(runs.root / "run") == default_figures().as_dict()
    resumed = runs.resume("run", "engine.calibration=auto")
    assert "measured in 0.0 s" in resumed.text
    assert measurements.count == 1


def test_the_reference_engine_has_no_figures_to_record(
    runs: Runs, measurements: Measurements
) -> None:
    interrupt(runs, "run", "logps.impl=auto", "train.engine=reference")
    assert figures_of(runs.root / "run") is None
    runs.resume("run")
    assert measurements.count == 0


# --- what a checkpoint says ------------------------------------------------------------------


@pytest.fixture
def finished(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The newest checkpoint of a run on the CPU."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    runs.begin("run")
    return list_checkpoints(runs.root / "run" / "checkpoints")[0]


def change(checkpoint: Path, **values: Any) -> None:
    """Change values of progress.json, or remove them (None), as an older version writes it."""
    content: dict[str, Any] = json.loads((checkpoint / PROGRESS).read_text("utf-8")) | values
    content = {k: v for k, v in content.items() if v is not None or k not in values}
    (checkpoint / PROGRESS).write_text(json.dumps(content), encoding="utf-8")
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, content["step"])


def test_a_run_of_an_older_version_goes_on_with_the_numbers_of_its_time(
    runs: Runs, finished: Path
) -> None:
    change(finished, figures=None)
    config = runs.config("run")
    assert recorded_figures(finished, config) == default_figures()
    text = runs.resume("run").text
    assert default_figures().note in text
    assert "warning: an earlier version of mlx-simpo began the run: it goes on, but not bit" in text


def test_another_processor_is_another_device(
    runs: Runs, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = recorded_figures(finished, runs.config("run"))
    assert recorded == replace(default_figures(), source="recorded by the run")
    monkeypatch.setattr("mlx_simpo.training.resuming.processor", lambda: "Apple M9")
    assert recorded_figures(finished, runs.config("run")) is None


@pytest.mark.parametrize("figures", [{"pass_cost": 3}, [], "16", {"pass_cost": "16"}])
def test_figures_of_another_form_are_an_error_that_says_what_to_remove(
    figures: Any, runs: Runs, finished: Path
) -> None:
    change(finished, figures=figures)
    with pytest.raises(SimPOError) as error:
        runs.resume("run")
    assert str(error.value).startswith(f"{finished / PROGRESS} is not as a run writes it (")
    assert f"{figures!r} are not figures of the engine" in str(error.value)
    assert str(error.value).endswith(f"remove {finished} to go on from the checkpoint before")
