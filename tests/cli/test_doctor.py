"""mlx-simpo doctor: what it prints, and that it notices results that are wrong."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.commands import command, complaint
from helpers.devices import on_cpu, on_gpu
from helpers.doctor import tiny_example

from mlx_simpo import SimPOError
from mlx_simpo.doctor import equality, examine, kernel, operations, steps
from mlx_simpo.engine.calibration import Calibration
from mlx_simpo.engine.choice import shared_prefix_engine
from mlx_simpo.engine.figures import Figures
from mlx_simpo.kernels.choice import BUILT_IN

Capture = pytest.CaptureFixture[str]
DEVICES = {"cpu": on_cpu, "gpu": on_gpu}
IMPLEMENTATIONS = {"cpu": "mlx", "gpu": "kernel"}
NOTES = {
    "cpu": "MLX's own operations (mlx-simpo's kernel needs a GPU)",
    "gpu": "kernel, which agrees with",
}
CALIBRATION = Calibration(
    Figures(7, 700, 2**19, 2**20, "blocks", "measured in 1.0 s"), 1.0, 1e-3, 1e-4, 1e-4, 512, True
)
MACHINE = ["chip", "memory", "system", "processor", "MLX's device", "Python"]
VERSIONS = ["mlx-simpo", "mlx", "mlx-lm"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with DEVICES[request.param]():
        yield request.param


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two vocabularies, one timed run of few logits, and a tiny model for the random ones."""
    monkeypatch.setattr(kernel, "SIZES", (2, 1027))
    monkeypatch.setattr(kernel, "TIMED_ON_GPU", (mx.bfloat16, (4, 1027)))
    monkeypatch.setattr(kernel, "TIMED_ON_CPU", (mx.float32, (4, 1027)))
    monkeypatch.setattr(kernel, "REPEATS", 1)
    monkeypatch.setattr(steps, "ROUNDS", 1)
    for name in ("HEAD_SIZES", "HEAD_SIZES_ON_CPU"):
        monkeypatch.setattr(operations, name, (16,))
    for name in ("DELTA_HEADS", "DELTA_HEADS_ON_CPU"):
        monkeypatch.setattr(operations, name, ())
    monkeypatch.setattr(examine, "random_examples", lambda: iter([tiny_example()]))
    # What it measures depends on what else the machine does.
    monkeypatch.setattr(examine, "calibrate", lambda *arguments: CALIBRATION)


def test_the_text_describes_this_machine(device: str, capsys: Capture) -> None:
    result = command(capsys, "doctor")
    assert result.status == 0
    assert f"MLX's device: {mx.default_device()}\n" in result.out
    version = mx.__version__  # type: ignore[attr-defined]
    for words in (f"mlx: {version}", "chip: ", NOTES[device]):
        assert words in result.out
    assert re.search(r"memory: [1-9]\d* GiB", result.out)
    assert "checks: 12 of 12 passed; the largest float32 error is " in result.out
    dtype = {"cpu": "float32", "gpu": "bfloat16"}[device]
    assert f"time for value and gradient of 4 rows of 1027 logits ({dtype}):\n" in result.out
    assert len(re.findall(r"ms +[\d.]+ GB/s", result.out)) == 3
    assert "\nmodel: tiny (llama, 2 layers, float32)\n" in result.out
    assert "\nengine: shared_prefix (" in result.out
    assert "attention: " in result.out
    assert "peak GB" not in result.out  # that is what --full is for
    assert max(map(len, result.out.splitlines())) <= 80


def test_json_has_everything(device: str, capsys: Capture) -> None:
    result = command(capsys, "doctor", "--full", "--json")
    assert result.status == 0, result.err
    report = result.json
    only_gpu = ["GPU architecture", "memory for MLX"] if device == "gpu" else []
    assert {*MACHINE, *VERSIONS, *only_gpu} <= report["machine"].keys()
    assert [*report] == [
        *("machine", "implementation", "reason", "checks", "timings", "operations", "models")
    ]
    assert report["implementation"] == IMPLEMENTATIONS[device]
    assert NOTES[device] in report["reason"]
    assert len(report["checks"]) == 12
    assert [timing["method"] for timing in report["timings"]] == [
        f"mlx_simpo ({IMPLEMENTATIONS[device]})",
        "mx.fast.cross_entropy",
        "plain operations",
    ]
    (model,) = report["models"]
    assert [*model] == [
        *("name", "model_type", "random", "layers", "dtype", "calibration", "engine", "pairs"),
        *("operations", "equality", "steps"),
    ]
    assert model["calibration"]["figures"]["pass_cost"] == 7
    assert [row["tokens"] for row in model["calibration"]["table"]] == [64, 256, 1024, 4096]
    assert len(model["equality"]) == 4
    assert len(model["steps"]) == 6
    checks = (*report["checks"], *report["operations"], *model["operations"], *model["equality"])
    assert all(check["passed"] for check in (*checks, model["engine"]))
    assert "timing training steps" in result.err


def test_full_prints_every_table_in_80_columns(capsys: Capture) -> None:
    result = command(capsys, "doctor", "--full")
    assert result.status == 0
    assert max(map(len, result.out.splitlines())) <= 80
    for words in (
        "MLX's own operations beside ours",
        "a step: 2 pairs with sequences of 7 to 14 tokens, 45 in all; LoRA rank 16",
        "seconds per pair  pairs per hour",
        "nats/token  LoRA gradient",
        "seconds  tokens/s  peak GB",
        "  reference, compiled",
    ):
        assert words in result.out
    # Each turn is told at once, in case the next one ends the process.
    assert "ours, attention mlx: " in result.err


def test_a_model_alone_gets_its_calibration(model_folder: Path, capsys: Capture) -> None:
    result = command(capsys, "doctor", "--model", model_folder)
    assert result.status == 0, result.err
    assert "(llama, 2 layers, float32)\n" in result.out.replace("\n  ", " ")
    assert "seconds per pair  pairs per hour" in result.out
    assert "checks: " not in result.out
    report = command(capsys, "doctor", "--model", model_folder, "--json").json
    assert [*report] == ["machine", "implementation", "reason", "models"]
    assert report["models"][0]["name"] == str(model_folder)


def test_a_model_that_does_not_exist(capsys: Capture) -> None:
    result = command(capsys, "doctor", "--model", "./nowhere", "--json")
    assert complaint(result) == "model is './nowhere'; there is no such folder"


def shifted_logps(*arrays: Any, **settings: Any) -> tuple:
    logps, gradient = BUILT_IN.response_logps(*arrays, **settings)
    return logps + 1e-3, gradient


def test_a_wrong_implementation_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    implementation = BUILT_IN._replace(response_logps=shifted_logps)
    monkeypatch.setattr(examine, "choose_implementation", lambda: implementation)
    result = command(capsys, "doctor")
    assert result.status == 2
    assert re.search(r"checks: \d of 12 passed", result.out)
    assert "FAILED: float32, vocabulary 1027" in result.out
    assert "log-probabilities" in result.err
    assert "not right on this machine; please report the lines above" in result.err


def test_an_engine_that_is_wrong_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def build(*arguments: Any) -> Any:
        engine = shared_prefix_engine(*arguments)
        logps = lambda *args, **more: 1.01 * engine.logps(*args, **more)  # noqa: E731
        return engine._replace(logps=logps)

    monkeypatch.setattr(equality, "shared_prefix_engine", build)
    result = command(capsys, "doctor", "--full")
    assert result.status == 2
    assert "FAILED, attention blocks" in result.out
    assert "error: the results of tiny: not right on this machine" in result.err
    assert "reference, compiled" in result.out  # all the rest is measured


def test_a_variant_that_fails_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(steps, "shared_prefix_engine", fail)
    result = command(capsys, "doctor", "--full", "--json")
    assert result.status == 0
    assert [row.get("problem") for row in result.json["models"][0]["steps"]] == [
        *["RuntimeError: out of memory"] * 4,
        *[None] * 2,
    ]


def test_a_kernel_that_does_not_run_is_reported_with_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail() -> None:
        raise SimPOError("the Metal kernel does not run: line 7")

    monkeypatch.setattr(examine, "choose_implementation", fail)
    result = command(capsys, "doctor")
    assert result.status == 2
    assert "chip: " in result.out
    assert result.out.endswith("\nproblem: the Metal kernel does not run: line 7\n")
    assert "please report the lines above" in result.err
    # With --full, everything else is measured without it.
    report = command(capsys, "doctor", "--full", "--json").json
    assert report["problem"] == "the Metal kernel does not run: line 7"
    assert len(report["models"][0]["steps"]) == 6


def test_settings_are_an_error_since_they_would_be_ignored(capsys: Capture) -> None:
    result = command(capsys, "doctor", "logps.impl=mlx")
    assert result.status == 2
    assert "takes no settings" in result.err
