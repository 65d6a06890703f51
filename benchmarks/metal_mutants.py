"""Mutation testing of the kernel's own text: which wrong versions do its tests notice?

    python benchmarks/metal_mutants.py [--count 0] [--seed 0] [--jobs 2] [--only cuda.h] [--record]

Every rule of mutation/kernel_text.py is tried at every place of response_logps.metal, cuda.h and
the call in launch.py (--count: at that many), which tests/kernels/test_launch.py compiles and
executes on a CPU. As for Python (mutants.py), survivors are listed, and mutation/equivalent has
those that cannot change a result. --record writes benchmarks/results/metal_mutants.json.
"""

import mlx_simpo  # first: on a Linux CPU it loads a fast BLAS in place of MLX's own

# isort: split
import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import datasets  # noqa: F401 — what the tests import, so that each need not
import hypothesis  # noqa: F401
import metal_host.launch
import pytest
import transformers  # noqa: F401
from helpers import devices, fused, gradients, tiny  # noqa: F401
from mutants import report, show
from mutation.kernel_text import mutants
from mutation.sample import Mutant
from mutation.scope import ROOT
from mutation.worker import FAILED, OPTIONS, ended_within
from provenance import provenance, write_result

import mlx_simpo.training.step  # noqa: F401
from mlx_simpo.kernels import launch

SECONDS = 120  # of the tests of one wrong version; they take half a minute where all pass
TESTS = "tests/kernels/test_launch.py"
# In what pytest prints of a MetalError: "[race] …"; or of the check before first use: "does not
# run".
REPORTED = re.compile(r"^E .*?\[([a-z]+(?:-[a-z]+)*)\] ", re.MULTILINE)


def run_tests(mutant: Mutant | None, folder: Path) -> None:
    """Run the tests in this process, with the wrong version in place, and end it."""
    status = 70
    metal_host.launch.MAX_ACCESSES = 20_000_000  # so that endless loops end soon
    try:
        os.setsid()
        output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if mutant is not None and mutant.module.endswith(".py"):
            exec(compile(mutant.code, str(ROOT / mutant.module), "exec"), launch.__dict__)
        elif mutant is not None:
            for name in ("response_logps.metal", "cuda.h"):
                shutil.copy(launch._FOLDER / name, folder)
            (folder / Path(mutant.module).name).write_text(mutant.code, encoding="utf-8")
            launch._FOLDER = folder
        status = pytest.main([*OPTIONS, "-p", "no:randomly", TESTS])
    finally:
        sys.stdout.flush()
        os._exit(status)


def outcome(mutant: Mutant | None) -> dict[str, Any]:
    """Return how the tests end, by which test, and what the executor reported."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kernel-") as scratch:
        process = os.fork()
        if not process:
            run_tests(mutant, Path(scratch))
        status = ended_within(process, SECONDS)
        text = Path(scratch, "log").read_text(errors="replace")
    by = FAILED.search(text)
    return {
        "outcome": {None: "slow", 0: "passed"}.get(status, "failed"),
        "by": by[1].rpartition("::")[2] if by else "",
        "reported": sorted(set(REPORTED.findall(text))),
        "seconds": round(time.monotonic() - start, 1),
        "text": text,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=0, help="how many; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at the same time")
    parser.add_argument("--only", default="", help="files whose path contains this")
    parser.add_argument("--record", action="store_true", help="write results/metal_mutants.json")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    start = time.monotonic()
    if (right := outcome(None))["outcome"] != "passed":
        sys.exit(f"The tests of the kernel as it is do not pass\n{right['text'][-2000:]}")
    chosen = [mutant for mutant in mutants() if arguments.only in mutant.module]
    if arguments.count:
        chosen = random.Random(arguments.seed).sample(chosen, min(arguments.count, len(chosen)))
    print(f"{len(chosen)} wrong versions", file=sys.stderr)
    results = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutant, result in zip(chosen, pool.map(outcome, chosen), strict=True):
            results.append((mutant, result))
            where = f"{Path(mutant.module).name}:{mutant.line} {mutant.operator}"
            how = " ".join((result["by"], *result["reported"]))
            print(
                f"{where:44} {result['outcome']:7} {result['seconds']:6} s {how}", file=sys.stderr
            )
    record = report(results)
    show(record)
    noticed = [result for _, result in results if result["outcome"] != "passed"]
    if arguments.record:
        record = {
            "provenance": provenance("python benchmarks/metal_mutants.py --record"),
            "minutes": round((time.monotonic() - start) / 60, 1),
            "noticed_by_test": Counter(result["by"] or result["outcome"] for result in noticed),
            "reported_by_executor": Counter(k for r in noticed for k in r["reported"]),
            "kinds": Counter(mutant.operator for mutant, _ in results),
            **record,
        }
        print(write_result("metal_mutants", record))
    sys.exit(bool(record["survivors"]))


if __name__ == "__main__":
    main()
