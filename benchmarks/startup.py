"""How long the package and the command line take to start, and how fast OpenBLAS then is.

    python benchmarks/startup.py [--processes 5]

Each figure is the median of fresh processes, after one that is not counted and fills the file
cache. Wall seconds are what a user waits; the processor's seconds (user and system, of all threads)
hardly depend on what else the machine does, and tell whether the wall clock was measured in peace.
OpenBLAS's idle threads spin for a moment, so they can exceed the wall seconds.

Then, on Linux, the float32 matrix rate, in turns with OpenBLAS loaded by `import mlx_simpo` and
with OpenBLAS in LD_PRELOAD, and once with MLX's own BLAS, which takes most of the time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flops import RATE
from provenance import provenance, write_result

# This checkout, whichever is installed, and no OpenBLAS from outside.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("LD_")}
ENVIRONMENT["PYTHONPATH"] = str(Path(__file__).parents[1])
PROGRAM = str(Path(sys.executable).with_name("mlx-simpo"))
# Name: (arguments, seconds that the median should not exceed).
PROCESSES: dict[str, tuple[list[str], float | None]] = {
    'python -c ""': ([sys.executable, "-c", ""], None),
    'python -c "import mlx_simpo"': ([sys.executable, "-c", "import mlx_simpo"], 0.15),
    "mlx-simpo --version": ([PROGRAM, "--version"], 0.3),
    "mlx-simpo train --help": ([PROGRAM, "train", "--help"], 0.6),
}
FIRST_LINE = "mlx-simpo train: first line"
FIRST_LINE_TARGET = 1.0


def seconds(arguments: list[str], *, first_line: bool = False) -> tuple[float, float]:
    """Return the wall and processor seconds of a process, until it ends or has written a line.

    With ``first_line`` the process is killed as soon as it has written to stderr.
    """
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    started = time.perf_counter()
    process = subprocess.Popen(arguments, env=ENVIRONMENT, **output)
    assert process.stderr is not None
    text = process.stderr.readline() if first_line else process.stderr.read()
    wall = time.perf_counter() - started
    if first_line:
        process.kill()
    _, status, usage = os.wait4(process.pid, 0)
    if not first_line:
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (-9 if first_line else 0):
        raise RuntimeError(f"{arguments} ended with {process.returncode}: {text.decode()}")
    return wall, usage.ru_utime + usage.ru_stime


def measured(
    arguments: list[str], target: float | None, processes: int, *, first_line: bool = False
) -> dict[str, Any]:
    """Return the medians of so many processes, and every value."""
    seconds(arguments, first_line=first_line)
    values = [seconds(arguments, first_line=first_line) for _ in range(processes)]
    wall, processor = (
        [round(value, 4) for value in column] for column in zip(*values, strict=True)
    )
    return {
        "target_seconds": target,
        "median_seconds": statistics.median(wall),
        "median_processor_seconds": statistics.median(processor),
        "seconds": wall,
        "processor_seconds": processor,
    }


def startup(processes: int) -> dict[str, Any]:
    """Return the times of the package and the commands."""
    results = {
        name: measured(arguments, target, processes)
        for name, (arguments, target) in PROCESSES.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"model={folder}/model", f"data.train={folder}/pairs.jsonl"]
        train = [PROGRAM, "train", *settings, f"output={folder}/run"]
        results[FIRST_LINE] = measured(train, FIRST_LINE_TARGET, processes, first_line=True)
    return results


def matmul_rates(processes: int) -> dict[str, Any]:
    """Return float32 rates in GFLOP/s, each the best of a process, and the ratio of both ways."""
    printed = subprocess.run(
        [sys.executable, "-m", "mlx_simpo.blas"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    preload = dict(word.split("=", 1) for word in printed.stdout.split())
    if not preload:
        return {"note": printed.stderr.strip()}
    ours, theirs = "import mlx_simpo", "LD_PRELOAD"
    rates: dict[str, list[float]] = {ours: [], theirs: []}
    for _ in range(processes):  # in turns, so that other load falls on both
        rates[ours].append(rate(f"import mlx_simpo\n{RATE}", {}))
        rates[theirs].append(rate(RATE, preload))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "median_gflops": medians,
        "best_gflops": {name: max(values) for name, values in rates.items()},
        "gflops": rates,
        "median_of_ratios": round(
            statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True)), 3
        ),
        "gflops_of_mlxs_own": rate(RATE.replace("range(12)", "range(2)"), {}),
    }


def rate(code: str, variables: dict[str, str]) -> float:
    """Return the rate in GFLOP/s that this code prints in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return round(json.loads(ended.stdout) / 1e9, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=5)
    options = parser.parse_args()
    record: dict[str, Any] = {
        "provenance": provenance(f"python benchmarks/startup.py --processes {options.processes}"),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "startup": startup(options.processes),
    }
    for name, result in record["startup"].items():
        target = f", target {result['target_seconds']}" if result["target_seconds"] else ""
        print(
            f"{result['median_seconds']:.3f} s ({result['median_processor_seconds']:.3f} s of "
            f"processor{target}): {name}",
            flush=True,
        )
    if sys.platform == "linux":
        record["blas"] = matmul_rates(options.processes)
        print(json.dumps(record["blas"], indent=1))
    print(write_result("startup", record))


if __name__ == "__main__":
    main()
