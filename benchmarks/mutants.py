"""Mutation testing: which wrong versions of the code do the tests of its module notice?

    python benchmarks/mutants.py [MODULE …] [--count 400] [--seed 0] [--jobs 2] [--record]

MODULE is engine/head, or engine for all of a room; without one, everything that computes
(mutation/scope.py). Cosmic Ray's operators and a few of ours (mutation/operators.py) change one
expression each. Every wrong version is put into a private copy of the working tree, and the tests
of its module are run until one fails. Survivors are listed with their line, and those that cannot
change any result are listed in mutation/equivalent with a reason. --record writes
benchmarks/results/mutants.json; --at-least ends with status 1 below that score.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parent))

from mutation.equivalents import reason
from mutation.operators import check_operators
from mutation.sample import Mutant, sample
from mutation.scope import ROOT, modules, short, tests_of
from provenance import provenance, write_result

SLOWEST = 4.0  # times as long as the tests of the right version take, plus half a minute


class Worker:
    """A process that runs tests in its own copy of the repository."""

    def __init__(self, folder: Path) -> None:
        copy_tree(folder)
        self._process = subprocess.Popen(
            [sys.executable, str(folder / "benchmarks/mutation/worker.py"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def __call__(
        self, module: str, code: str | None, tests: list[str], seconds: float
    ) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"module": module, "code": code, "tests": tests, "seconds": seconds}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def copy_tree(folder: Path) -> None:
    """Copy what git tracks or would add."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        source = ROOT / name
        if source.is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())


def baseline(worker: Worker, module: str) -> float:
    """Return how many seconds the tests of the right version take.

    Raises:
        SystemExit: they do not pass, or there are none.
    """
    result = worker(module, None, tests_of(module), 900.0)
    if result["outcome"] != "passed":
        raise SystemExit(f"The tests of {module} as it is: {result['outcome']}\n{result['tail']}")
    return result["seconds"]


def outcomes(mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, dict[str, Any]]]:
    """Yield what the tests say of each wrong version, in any order within a module."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        workers: SimpleQueue[Worker] = SimpleQueue()
        every = [Worker(Path(scratch, str(number))) for number in range(jobs)]
        for worker in every:
            workers.put(worker)
        limits: dict[str, float] = {}

        def test(mutant: Mutant) -> tuple[Mutant, dict[str, Any]]:
            worker = workers.get()
            try:
                if mutant.module not in limits:
                    limits[mutant.module] = 30 + SLOWEST * baseline(worker, mutant.module)
                tests = tests_of(mutant.module)
                return mutant, worker(mutant.module, mutant.code, tests, limits[mutant.module])
            finally:
                workers.put(worker)

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(test, mutants)
        for worker in every:
            worker.__exit__()


def report(results: list[tuple[Mutant, dict[str, Any]]]) -> dict[str, Any]:
    """Return the table of modules, the survivors and the equivalents."""
    table: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    survivors, equivalent = [], []
    for mutant, result in results:
        name = short(mutant.module)
        entry = {
            "module": name,
            "line": mutant.line,
            "definition": mutant.definition,
            "operator": mutant.operator,
            "before": mutant.before,
            "after": mutant.after,
        }
        table[name]["mutants"] += 1
        if result["outcome"] != "passed":
            table[name]["noticed"] += 1
        elif why := reason(mutant):
            table[name]["equivalent"] += 1
            equivalent.append(entry | {"reason": why})
        else:
            survivors.append(entry)
    total = {key: sum(row.get(key, 0) for row in table.values()) for key in KEYS}
    for row in (*table.values(), total):
        row["score_percent"] = score(row)
    return {
        "total": total,
        "modules": {name: dict(row) for name, row in table.items()},
        "survivors": survivors,
        "equivalent": equivalent,
    }


KEYS = ("mutants", "noticed", "equivalent")


def score(row: dict[str, Any]) -> float:
    """Return the noticed share of those that are not equivalent, in percent."""
    wrong = row.get("mutants", 0) - row.get("equivalent", 0)
    return round(100.0 * row.get("noticed", 0) / wrong, 1) if wrong else 100.0


def show(record: dict[str, Any]) -> None:
    for name, row in (*record["modules"].items(), ("all", record["total"])):
        counts = [row.get(key, 0) for key in KEYS]
        print(f"{name:32}", *(f"{count:6}" for count in counts), f"{row['score_percent']:7} %")
    for entry in record["survivors"]:
        print(f"\n{entry['module']}:{entry['line']} {entry['definition']} ({entry['operator']})")
        print(f"  - {entry['before']}\n  + {entry['after']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    parser.add_argument("--count", type=int, default=400, help="how many; 0: one at every place")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at the same time")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="PERCENT")
    parser.add_argument("--record", action="store_true", help="write results/mutants.json")
    arguments = parser.parse_args()
    check_operators()
    start = time.monotonic()
    mutants = sample(ROOT, modules(arguments.modules), arguments.count or None, arguments.seed)
    print(f"{len(mutants)} wrong versions", file=sys.stderr)
    results = []
    for mutant, result in outcomes(mutants, arguments.jobs):
        results.append((mutant, result))
        where = f"{short(mutant.module)}:{mutant.line}"
        by = result["by"] or ""
        print(f"{where:36} {result['outcome']:7} {result['seconds']:6} s {by}", file=sys.stderr)
    record = report(results)
    show(record)
    if arguments.record:
        named = " ".join(sys.argv[1:])
        record = {
            "provenance": provenance(f"python benchmarks/mutants.py {named}"),
            "minutes": round((time.monotonic() - start) / 60, 1),
            **record,
        }
        print(write_result("mutants", record))
    sys.exit(record["total"]["score_percent"] < arguments.at_least)


if __name__ == "__main__":
    main()
