"""What the package asks about the machine."""

import os
import resource
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_simpo import device
from mlx_simpo.device import is_gpu, total_memory_bytes


@pytest.mark.parametrize(("kind", "expected"), [(mx.gpu, True), (mx.cpu, False)])
def test_is_gpu_follows_the_default_device(
    kind: mx.DeviceType, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(kind))
    assert is_gpu() == expected


def test_total_memory_is_pages_times_page_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert total_memory_bytes() == 4_096_000


# --- what MLX can use ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"memory_size": 8000, "max_recommended_working_set_size": 5000}, 5000),  # Metal
        ({"free_memory": 100, "total_memory": 6000}, 6000),  # CUDA
    ],
)
def test_a_gpu_knows_its_limit(
    info: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert device.memory_limit_bytes() == expected
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert device.memory_limit_bytes() > expected


@pytest.mark.parametrize(("cgroup", "address_space"), [([7000, 4000], []), ([], [4000])])
def test_a_cpu_has_the_least_of_its_limits(
    cgroup: list[int], address_space: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(device, "total_memory_bytes", lambda: 6000)
    monkeypatch.setattr(device, "_cgroup_limits", list)
    monkeypatch.setattr(device, "_address_space_limits", list)
    assert device.memory_limit_bytes() == 6000
    monkeypatch.setattr(device, "_cgroup_limits", lambda: cgroup)
    monkeypatch.setattr(device, "_address_space_limits", lambda: address_space)
    assert device.memory_limit_bytes() == 4000


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        # Version 2, and within a container, where the path of the host is absent.
        (
            {
                "proc/self/cgroup": "0::/user.slice/job 1\n",
                "sys/fs/cgroup/user.slice/job 1/memory.max": "max\n",
                "sys/fs/cgroup/user.slice/memory.max": "5000\n",
                "sys/fs/cgroup/other/memory.max": "10\n",
                "memory.max": "10\n",
            },
            [5000],
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "4096\n"}, [4096]),
        # Version 1.
        (
            {
                "proc/self/cgroup": "5:cpu:/a\n4:hugetlb,memory:/docker/a:b\n0::/\n",
                "sys/fs/cgroup/memory/docker/a:b/memory.limit_in_bytes": "3000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/cpu/a/memory.limit_in_bytes": "10\n",
            },
            [3000, 9223372036854771712],
        ),
    ],
    ids=["not Linux", "version 2", "container", "version 1"],
)
def test_limits_of_control_groups(
    files: dict[str, str], expected: list[int], tmp_path: Path
) -> None:
    write_files(tmp_path, files)
    assert device._cgroup_limits(tmp_path) == expected


def test_the_address_space_is_limited_beyond_what_is_not_arrays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    assert device._address_space_limits() == []
    limits = (10**13, resource.RLIM_INFINITY)
    (limit,) = device._address_space_limits()
    assert 0 < limit < 10**13
    limits = (1000, 1000)
    assert device._address_space_limits() in ([0], [1000])  # without /proc, nothing is known
