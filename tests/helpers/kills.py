"""Runs that are killed and resumed: in processes of their own, compared with an uninterrupted run.

A server process imports everything once and forks a process per run: a run then takes a second, so
that hundreds can be killed. Nothing is computed before the fork, which MLX would not survive.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

PRELOAD = ["mlx_simpo.api", "mlx_simpo.cli.main", "helpers.kills"]
TIMES = ("seconds", "traces", "save_seconds", "peak_memory_gb", "cache_memory_gb")


def run_in_child(arguments: Sequence[str], log: str, environment: dict[str, str]) -> None:
    """Run ``mlx-simpo`` with these arguments; stdout and stderr go to the file ``log``."""
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    from mlx_simpo.cli.main import run_command

    status = run_command(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Ended(NamedTuple):
    """A process that has ended: exit status (negative: the signal that killed it), and its time."""

    status: int
    seconds: float


class Runner:
    """Starts commands, and kills them on the way."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def __call__(
        self,
        arguments: Sequence[object],
        log: Path,
        *,
        kill_after: float | None = None,
        when: Callable[[], bool] | None = None,
        number: int = 9,
        **environment: str,
    ) -> Ended:
        """Run a command to its end, or send a signal after ``kill_after`` seconds, or as soon as
        ``when`` holds."""
        words = [str(a) for a in arguments]
        process = self._context.Process(target=run_in_child, args=(words, str(log), environment))
        started = time.monotonic()
        process.start()
        if kill_after is not None:
            process.join(max(0.0, kill_after))
        while when is not None and process.is_alive() and not when():
            time.sleep(0.002)
        if process.is_alive() and (kill_after is not None or when is not None):
            assert process.pid is not None
            os.kill(process.pid, number)
        process.join(120)
        seconds = time.monotonic() - started
        if process.is_alive():
            process.kill()
            raise AssertionError(f"the command does not end: {words}\n{log.read_text()}")
        assert process.exitcode is not None
        return Ended(process.exitcode, seconds)


def content(folder: Path) -> dict[str, Any]:
    """Return what a run leaves behind, without its times: arrays, metrics, samples, summary."""
    # Without step-…-replaced: a kill may leave the former checkpoint of a step beside the new one.
    checkpoints = sorted((folder / "checkpoints").glob("step-" + "[0-9]" * 6))
    state = load_file(checkpoints[-1] / "state.safetensors")
    arrays = {f"state.{name}": value for name, value in state.items()}
    for name in ("adapters.safetensors", "best/adapters.safetensors"):
        if (folder / name).exists():
            arrays |= {f"{name}.{n}": v for n, v in load_file(folder / name).items()}
    texts = {
        name: [without_times(json.loads(line)) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "samples.jsonl", "nonfinite.jsonl")
        if (folder / name).exists()
    }
    summary = without_times(json.loads((folder / "summary.json").read_text()))
    summary.pop("adapter")
    return {"arrays": arrays, "logs": texts, "summary": summary, "last": checkpoints[-1].name}


def without_times(record: Any) -> Any:
    """Return a record of metrics without what differs from run to run."""
    if not isinstance(record, dict):
        return record
    return {k: without_times(v) for k, v in record.items() if k not in TIMES}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what differs between two runs' `content`, bit for bit."""
    names = [name for name in ("logs", "summary", "last") if one[name] != other[name]]
    a, b = one["arrays"], other["arrays"]
    names += sorted(a.keys() ^ b.keys())
    return names + [n for n in sorted(a.keys() & b.keys()) if not np.array_equal(a[n], b[n])]
