"""Fuzz the readers of what comes from elsewhere, guided by coverage.

    pip install atheris==3.0.0        (wheels for Linux, Python 3.11 to 3.13)
    python benchmarks/fuzz.py                                 # all targets, 30 minutes in all
    python benchmarks/fuzz.py record config --seconds 60      # two of them, a minute in all

The targets are the readers of tests/helpers/readers.py, and their seeds the valid files there:
whatever a reader raises that it does not document is a defect. `make test` has the same readers
with hypothesis, for seconds. An input that found a defect is kept in --defects, to be read, fixed
and turned into a test. Results go to benchmarks/results/fuzz.json.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
TARGETS = ("record", "config", "adapter", "checkpoint", "cache")
# In memory, where there is such a folder: each execution writes a few small files.
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
MAX_INPUT = 8192  # bytes
# Deaths of a target's process (a segmentation fault, out of memory) after which it is given up.
MAX_DEATHS = 20
INSTRUMENTED = ["mlx_simpo", "mlx_lm.tuner", "yaml"]
# What fuzzing has found so far and was fixed, with its tests.
FIXED = {
    "cache": "KeyError, TypeError, AttributeError: a manifest of another form, with a valid "
    "checksum (tests/data/test_cache.py)",
    "record": "ValueError, RecursionError: tools as text of too many digits or brackets; noticed "
    "while the seeds were written, before any run (tests/data/test_records.py)",
}
STATUS = re.compile(r"^#(\d+)\s.*?cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)


# --- the process that fuzzes one target ------------------------------------------------------


def fuzz_target(target: str, defects: Path, arguments: list[str]) -> None:
    """Fuzz until libFuzzer ends the process; new defects are written as they are found."""
    import atheris  # here: the parent and the tests do without it

    with atheris.instrument_imports(include=INSTRUMENTED):
        read, _ = reader_and_seeds(target)
    from helpers.readers import SEPARATOR, change_json

    known: set[str] = set()

    def execute(content: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="fuzz-") as folder:
            try:
                read(content, Path(folder))
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                ours = [f for f in frames if "mlx_simpo" in f.filename or "readers" in f.filename]
                name = f"{type(error).__name__}-{Path(ours[-1].filename).stem}-{ours[-1].lineno}"
                if name in known:
                    return
                known.add(name)
                defects.mkdir(parents=True, exist_ok=True)
                (defects / f"{name}.bin").write_bytes(content)
                (defects / f"{name}.txt").write_text(traceback.format_exc(), encoding="utf-8")

    def mutate(content: bytes, max_size: int, seed: int) -> bytes:
        """Change a value of the JSON in every other input, else bytes as libFuzzer does."""
        random = Random(seed)
        first, separator, rest = content.partition(SEPARATOR)
        changed = change_json(first, random) if random.random() < 0.5 else None
        if changed is None:
            return atheris.Mutate(content, max_size)
        return (changed + separator + rest)[:max_size]

    atheris.Setup([sys.argv[0], *arguments], execute, custom_mutator=mutate)
    atheris.Fuzz()


def reader_and_seeds(target: str) -> tuple[Callable[[bytes, Path], bool], list[bytes]]:
    """Return a target's reader, and its valid content."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import mlx_simpo  # noqa: F401  (before MLX)

    # isort: split
    from helpers import readers

    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        return {
            "record": lambda: (readers.read_records, readers.record_seeds()),
            "config": lambda: (readers.read_config, readers.config_seeds()),
            "adapter": lambda: (readers.read_adapter, readers.adapter_seeds(Path(folder))),
            "checkpoint": lambda: (readers.read_checkpoint, readers.checkpoint_seeds()),
            "cache": lambda: (readers.read_token_cache, readers.token_cache_seeds(Path(folder))),
        }[target]()


# --- all targets, one after the other --------------------------------------------------------


def run(target: str, seconds: float, defects: Path) -> dict[str, Any]:
    """Fuzz a target for so long, in processes of its own, and return what happened."""
    work = Path(tempfile.mkdtemp(dir=SCRATCH, prefix=f"fuzz-{target}-"))
    corpus, dictionary = work / "corpus", work / "dictionary"
    corpus.mkdir()
    _, seeds = reader_and_seeds(target)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    dictionary.write_text(words(seeds), encoding="ascii")
    command = [
        *(sys.executable, __file__, "--child", target, "--defects", str(defects), str(corpus)),
        *(f"-dict={dictionary}", f"-max_len={MAX_INPUT}", f"-artifact_prefix={defects}/died-"),
        *("-timeout=60", "-rss_limit_mb=6000", "-print_final_stats=1"),
    ]
    deaths, executions, coverage = [], 0, (0, 0, 0)
    started = time.monotonic()
    while (left := seconds - (time.monotonic() - started)) > 1 and len(deaths) < MAX_DEATHS:
        defects.mkdir(parents=True, exist_ok=True)
        process = subprocess.run(
            [*command, f"-max_total_time={max(1, round(left))}"],
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for number, *counters in STATUS.findall(process.stderr)[-1:]:
            executions += int(number)
            coverage = tuple(map(int, counters))
        if process.returncode:
            deaths.append(process.stderr[-2000:])
            (defects / f"death-{len(deaths)}.txt").write_text(process.stderr, encoding="utf-8")
    elapsed = time.monotonic() - started
    shutil.rmtree(work)
    return {
        "seconds": round(elapsed, 1),
        "executions": executions,
        "executions_per_second": round(executions / elapsed, 1),
        "coverage_counters": coverage[0],
        "features": coverage[1],
        "seeds": len(seeds),
        "corpus": coverage[2],
        "defects": sorted(path.stem for path in defects.glob("*.bin")),
        "deaths": len(deaths),
    }


def words(seeds: list[bytes]) -> str:
    """Return the words of the seeds as a dictionary of libFuzzer."""
    pattern = rb'"[\w. /-]{1,40}"|[a-z_]{3,30}'
    entries = {word for seed in seeds for word in re.findall(pattern, seed)}
    entries |= {b"null", b"true", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'"\\ud800"', b"[[[[[[[["}
    lines = ("".join(f"\\x{byte:02x}" for byte in word) for word in sorted(entries))
    return "".join(f'"{line}"\n' for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=1800, help="for all targets together")
    parser.add_argument("--defects", type=Path, default=Path("fuzz-defects"), metavar="FOLDER")
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.child:
        fuzz_target(options.child, options.defects, [*options.targets, *rest])
        return
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(TARGETS)}")
    targets = options.targets or list(TARGETS)
    results = {}
    for target in targets:
        folder = options.defects.resolve() / target
        results[target] = run(target, options.seconds / len(targets), folder)
        print(f"{target}: {json.dumps(results[target])}", flush=True)
    from provenance import provenance, write_result

    command = f"python benchmarks/fuzz.py {' '.join(options.targets)} --seconds {options.seconds:g}"
    record = {
        "provenance": provenance(" ".join(command.split())),
        "atheris": importlib.metadata.version("atheris"),
        "targets": results,
        "fixed_before": FIXED,
    }
    print(write_result("fuzz", record))


if __name__ == "__main__":
    main()
