"""mlx-simpo doctor: what it prints, and that it notices results that are wrong."""

import re
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from helpers.commands import command
from helpers.devices import on_cpu, on_gpu

from mlx_simpo import SimPOError, doctor
from mlx_simpo.kernels.choice import BUILT_IN

Capture = pytest.CaptureFixture[str]
DEVICES = {"cpu": on_cpu, "gpu": on_gpu}
IMPLEMENTATIONS = {"cpu": "mlx", "gpu": "kernel"}
NOTES = {"cpu": "MLX's own operations, as MLX runs on the CPU", "gpu": "kernel, which agrees with"}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with DEVICES[request.param]():
        yield request.param


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two vocabularies, and one timed run of few logits on a GPU (which may be a stand-in)."""
    monkeypatch.setattr(doctor, "SIZES", (2, 1027))
    monkeypatch.setattr(doctor, "TIMED_ON_GPU", (mx.bfloat16, (4, 1027)))
    monkeypatch.setattr(doctor, "REPEATS", 1)


def test_the_text_describes_this_machine(device: str, capsys: Capture) -> None:
    result = command(capsys, "doctor")
    assert result.status == 0
    assert f"MLX's device: {mx.default_device()}\n" in result.out
    version = mx.__version__  # type: ignore[attr-defined]
    for words in (f"mlx: {version}", "chip: ", NOTES[device]):
        assert words in result.out
    assert re.search(r"memory: [1-9]\d* GiB", result.out)
    assert "checks: 12 of 12 passed; the largest float32 error is " in result.out
    shape = {"cpu": "128 rows of 49152 logits (float32)", "gpu": "4 rows of 1027 logits (bfloat16)"}
    assert f"time for value and gradient of {shape[device]}:\n" in result.out
    assert len(re.findall(r"ms +[\d.]+ GB/s", result.out)) == 3


def test_json_has_everything(device: str, capsys: Capture) -> None:
    report = command(capsys, "doctor", "--json").json
    assert report["implementation"] == IMPLEMENTATIONS[device]
    assert NOTES[device] in report["reason"]
    assert len(report["checks"]) == 12
    assert all(check["passed"] for check in report["checks"])
    assert [timing["method"] for timing in report["timings"]] == [
        f"mlx_simpo ({IMPLEMENTATIONS[device]})",
        "mx.fast.cross_entropy",
        "plain operations",
    ]
    assert all(t["milliseconds"] > 0 and t["gb_per_second"] > 0 for t in report["timings"])


def test_a_mac_is_told_of_the_gpu_watchdog(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert "GPU watchdog" not in command(capsys, "doctor").out or sys.platform == "darwin"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "8")
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER", raising=False)
    line = command(capsys, "doctor", "--json").json["machine"]["GPU watchdog"]
    for words in (
        "“Impacting Interactivity” (see docs/troubleshooting.md)",
        "MLX_MAX_OPS_PER_BUFFER is 8, MLX_MAX_MB_PER_BUFFER is not set",
    ):
        assert words in line
    assert f"\nGPU watchdog: {line}\n" in command(capsys, "doctor").out


def shifted_logps(*arrays: Any, **settings: Any) -> tuple:
    logps, gradient = BUILT_IN.response_logps(*arrays, **settings)
    return logps + 1e-3, gradient


def scaled_gradient(*arrays: Any, **settings: Any) -> tuple:
    logps, gradient = BUILT_IN.response_logps(*arrays, **settings)
    assert gradient is not None
    return logps, 1.05 * gradient


def wrapped_targets(raw_logits: mx.array, targets: mx.array, **settings: Any) -> tuple:
    return BUILT_IN.response_logps(raw_logits, targets % raw_logits.shape[1], **settings)


@pytest.mark.parametrize("wrong", [shifted_logps, scaled_gradient, wrapped_targets])
def test_a_wrong_implementation_is_noticed(
    wrong: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    implementation = BUILT_IN._replace(response_logps=wrong)
    monkeypatch.setattr(doctor, "choose_implementation", lambda: implementation)
    result = command(capsys, "doctor")
    assert result.status == 2
    assert re.search(r"checks: \d of 12 passed", result.out)
    assert "FAILED: float32, vocabulary 1027" in result.out
    assert "log-probabilities are not right on this machine" in result.err


def test_a_kernel_that_does_not_run_is_reported_with_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail() -> None:
        raise SimPOError("the Metal kernel does not run: line 7")

    monkeypatch.setattr(doctor, "choose_implementation", fail)
    result = command(capsys, "doctor")
    assert result.status == 2
    assert "chip: " in result.out
    assert result.out.endswith("\nproblem: the Metal kernel does not run: line 7\n")
    assert "please report the lines above" in result.err


def test_settings_are_an_error_since_they_would_be_ignored(capsys: Capture) -> None:
    result = command(capsys, "doctor", "logps.impl=mlx")
    assert result.status == 2
    assert "takes no settings" in result.err
