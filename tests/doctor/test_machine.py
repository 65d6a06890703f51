"""The machine, in words."""

import platform
import sys

import mlx.core as mx
import pytest
from helpers.devices import on_gpu

from mlx_simpo.doctor.machine import machine


def test_versions_and_the_device_are_named() -> None:
    description = machine()
    assert description["mlx"] == mx.__version__  # type: ignore[attr-defined]
    assert description["MLX's device"] == str(mx.default_device())
    assert description["Python"] == platform.python_version()
    assert all(isinstance(value, str) and value for value in description.values())


def test_a_gpu_has_an_architecture_and_memory_of_its_own() -> None:
    with on_gpu():
        description = machine()
    assert description["memory for MLX"].endswith(" GiB")
    assert description["GPU architecture"]


def test_macos_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    assert machine()["system"] == "macOS 15.5"


def test_a_mac_is_told_of_the_gpu_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GPU watchdog" not in machine() or sys.platform == "darwin"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "8")
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER", raising=False)
    line = machine()["GPU watchdog"]
    for words in (
        "“Impacting Interactivity” (see docs/troubleshooting.md)",
        "MLX_MAX_OPS_PER_BUFFER is 8, MLX_MAX_MB_PER_BUFFER is not set",
    ):
        assert words in line
