"""The machine that MLX runs on: its default device and its memory."""

import os
import platform
import resource
from pathlib import Path

import mlx.core as mx


def is_gpu() -> bool:
    """Return whether MLX's default device is a GPU (Metal or CUDA)."""
    return mx.default_device().type == mx.gpu


def processor() -> str:
    """Return the name of the chip that MLX runs on."""
    return str(mx.device_info().get("device_name", platform.processor() or "unknown"))


def total_memory_bytes() -> int:
    """Return the machine's physical memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def recommended_memory_bytes() -> int | None:
    """Return max_recommended_working_set_size of mx.device_info; None without Metal.

    It is Metal's recommendedMaxWorkingSetSize, an "approximation of how much memory, in bytes, this
    GPU device can allocate without affecting its runtime performance" (Apple's documentation of
    MTLDevice), and the most that mx.set_wired_limit may keep resident; ``sudo sysctl
    iogpu.wired_limit_mb=N`` raises it. MLX goes on beyond it, up to 1.5 times as much
    (mx.set_memory_limit), while macOS swaps.
    """
    size = mx.device_info().get("max_recommended_working_set_size") if is_gpu() else None
    return None if size is None else int(size)


def device_memory_bytes() -> int:
    """Return the memory of MLX's default device, in bytes.

    - Metal, CUDA: memory_size or total_memory of mx.device_info.
    - CPU: the machine's memory, the limit of the process's cgroup (containers, batch systems), or
      the address space that ``ulimit -v`` leaves to arrays, whichever is least. Beyond it there is
      no error: the process ends.
    """
    info = mx.device_info()
    for name in ("memory_size", "total_memory"):
        if is_gpu() and name in info:
            return int(info[name])
    return min([total_memory_bytes(), *_cgroup_limits(), *_address_space_limits()])


def memory_limit_bytes() -> int:
    """Return how much memory MLX can use on its default device, in bytes: what Metal recommends, or
    all of the device's."""
    return recommended_memory_bytes() or device_memory_bytes()


def memory_metrics() -> dict[str, float]:
    """Return MLX's memory in GB (10⁹ bytes), rounded to MB, as a line of metrics.jsonl has it.

    peak_memory_gb: the most that arrays have taken since the process began, or since the forecast
    before a run. cache_memory_gb: freed buffers that MLX keeps now, which are not part of the peak.
    """
    return {
        "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 3),
        "cache_memory_gb": round(mx.get_cache_memory() / 1e9, 3),
    }


def _cgroup_limits(root: Path = Path("/")) -> list[int]:
    """Return the memory limits of this process's cgroup and of all above it, in bytes."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    limits = []
    for line in lines:
        # "0::/path" in version 2, "4:memory:/path" in version 1, where each resource has a tree.
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            tree, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        elif not controllers:
            tree, name = root / "sys/fs/cgroup", "memory.max"
        else:
            continue
        # Within a container the tree begins at its own cgroup, and the rest of the path is absent.
        group = tree / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(tree) and (folder / name).is_file():
                text = (folder / name).read_text(encoding="ascii").strip()
                limits += [] if text == "max" else [int(text)]
    return limits


def _address_space_limits() -> list[int]:
    """Return the bytes of arrays that fit into the process's address space, if it has a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return []
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:  # not Linux
        return [limit]
    other = pages * os.sysconf("SC_PAGE_SIZE") - mx.get_active_memory() - mx.get_cache_memory()
    return [max(0, limit - other)]
