"""What a training process holds: memory, open files, threads, traces, the files of its run."""

import json
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_simpo.reporting.display import Display


class SamplingDisplay(Display):
    """Shows nothing, and takes a sample after every so many training steps.

    samples: each with its "step".
    """

    def __init__(self, every: int, take: Callable[[], dict[str, int]]) -> None:
        super().__init__(Console(quiet=True))
        self.samples: list[dict[str, int]] = []
        self._every, self._take = every, take

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        step = done

        def advance(more: int = 1, note: str = "") -> None:
            nonlocal step
            step += more
            if title == "Training" and step % self._every == 0:
                self.samples.append({"step": step, **self._take()})

        yield advance


def sample(output: Path) -> dict[str, int]:
    """Return what this process, MLX and the folder of the run hold now."""
    logs = {path: path.stat().st_size for path in output.glob("*.jsonl")}
    files = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return {
        "resident_bytes": resident_bytes(),
        "active_bytes": mx.get_active_memory(),
        "cache_bytes": mx.get_cache_memory(),
        "open_files": open_files(),
        "threads": threads(),
        "traces": last_step(output / "metrics.jsonl")["traces"],
        "log_bytes": sum(logs.values()),
        "other_files_bytes": files - sum(logs.values()),
    }


def resident_bytes() -> int:
    """Return the process's resident size; on macOS, the largest that it has been."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def open_files() -> int:
    """Return the number of the process's open files; one of them is the listing itself."""
    return len(os.listdir("/dev/fd"))


def threads() -> int:
    """Return the number of the process's threads; on macOS, of those that Python started."""
    tasks = Path("/proc/self/task")
    return len(os.listdir(tasks)) if tasks.exists() else threading.active_count()


def last_step(metrics: Path) -> dict[str, Any]:
    """Return the last training step's line of a file that may have megabytes."""
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 8192))
        lines = file.read().splitlines()
    # Only the end is read, whose first line may be incomplete.
    return next(json.loads(line) for line in reversed(lines) if b'"traces"' in line)
