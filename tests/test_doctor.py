"""mlx-simpo doctor: what it says, and that it notices."""

import re
from typing import Any

import mlx.core as mx
import pytest
from helpers.commands import command

from mlx_simpo import SimPOError, doctor
from mlx_simpo.kernels.choice import BUILT_IN

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two vocabularies, and one timed run."""
    monkeypatch.setattr(doctor, "SIZES", (2, 1027))
    monkeypatch.setattr(doctor, "REPEATS", 1)


def test_everything_it_says_is_about_this_machine(capsys: Capture) -> None:
    ran = command(capsys, "doctor")
    assert ran.status == 0
    for words in (f"mlx: {mx.__version__}", "chip: ", "memory: ", "as MLX runs on the CPU"):
        assert words in ran.out
    assert re.search(r"memory: [1-9]\d* GiB", ran.out)
    assert "checks: 12 of 12 right" in ran.out
    assert len(re.findall(r"ms +[\d.]+ GB/s", ran.out)) == 3


def test_json_has_it_all(capsys: Capture) -> None:
    found = command(capsys, "doctor", "--json").json
    assert found["implementation"] == "mlx"
    assert len(found["checks"]) == 12
    assert [t["way"] for t in found["timings"]][1] == "mx.fast.cross_entropy"
    assert all(t["milliseconds"] > 0 and t["gb_per_second"] > 0 for t in found["timings"])


def shifted(*given: Any, **settings: Any) -> tuple:
    logps, slope = BUILT_IN.response_logps(*given, **settings)
    return logps + 1e-3, slope


def steeper(*given: Any, **settings: Any) -> tuple:
    logps, slope = BUILT_IN.response_logps(*given, **settings)
    return logps, 1.05 * slope


def wrapped(products: mx.array, targets: mx.array, **settings: Any) -> tuple:
    return BUILT_IN.response_logps(products, targets % products.shape[1], **settings)


@pytest.mark.parametrize("wrong", [shifted, steeper, wrapped])
def test_a_wrong_implementation_is_noticed(
    wrong: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    bad = BUILT_IN._replace(response_logps=wrong)
    monkeypatch.setattr(doctor, "choose", lambda: bad)
    ran = command(capsys, "doctor")
    assert ran.status == 2
    assert "WRONG: float32, vocabulary 1027" in ran.out
    assert "log-probabilities are not right on this machine" in ran.err


def test_a_kernel_that_does_not_run_is_shown_with_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def failing() -> None:
        raise SimPOError("the Metal kernel does not run: line 7")

    monkeypatch.setattr(doctor, "choose", failing)
    ran = command(capsys, "doctor")
    assert ran.status == 2
    assert "chip: " in ran.out
    assert ran.out.endswith("the Metal kernel does not run: line 7\n")
    assert "please report the lines above" in ran.err


def test_settings_would_be_ignored_and_are_refused(capsys: Capture) -> None:
    ran = command(capsys, "doctor", "logps.impl=mlx")
    assert ran.status == 2
    assert "takes no settings" in ran.err
