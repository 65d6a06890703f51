"""The two facts about the machine that the package asks for."""

import os

import mlx.core as mx
import pytest

from mlx_simpo.device import is_gpu, total_memory_bytes


@pytest.mark.parametrize(("device", "expected"), [(mx.gpu, True), (mx.cpu, False)])
def test_is_gpu_follows_the_default_device(
    device: mx.DeviceType, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    assert is_gpu() == expected


def test_total_memory_is_pages_times_page_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert total_memory_bytes() == 4_096_000
