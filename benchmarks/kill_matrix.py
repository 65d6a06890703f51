"""Runs that are killed and resumed, compared bit for bit with runs that were not.

    python benchmarks/kill_matrix.py [random] [operations] [demo] [--kills 200]

random: kill −9 (and SIGTERM, SIGINT, SIGHUP) at random instants of runs of a tiny model with
dropout, evaluations and checkpoints, in several variants of training; a resumed run is killed again
until it has been killed three times. operations: kill −9 before every operation on a file
(open for writing, write, sync, rename, …) of a whole run. demo: kill −9 of the real command on
SmolLM2-135M-Instruct and the example pairs.

Afterwards adapter, optimizer state, random state, metrics (without times) and summary must be those
of the run that was not killed. A run that could not be resumed, or differs, is counted as lost.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

# First, before anything imports MLX: on a Linux CPU it loads a fast BLAS in place of MLX's own.
import mlx_simpo  # noqa: E402, F401

# isort: split
from helpers.faults import Forks  # noqa: E402
from helpers.kills import Ended, Runner, content, differences  # noqa: E402
from helpers.tiny import some_pairs, tiny_folder, write_jsonl  # noqa: E402
from provenance import provenance, write_result  # noqa: E402

MOST_KILLS = 3  # of one run
DEMO_STEPS = 8
SIGNALS = {9: "SIGKILL", 15: "SIGTERM", 2: "SIGINT", 1: "SIGHUP"}
VARIANTS = {
    "shared_prefix, dropout": ["lora.dropout=0.2"],
    "reference, compiled, dropout": ["lora.dropout=0.2", "train.engine=reference"],
    "DoRA, checkpointing, dropout": [
        "lora.dropout=0.2",
        "lora.dora=true",
        "train.gradient_checkpointing=true",
    ],
    "early stopping, samples": [
        "lora.dropout=0.1",
        "train.early_stopping.patience=2",
        'train.sample_prompts=["Question 1"]',
        "train.sample_tokens=8",
    ],
}


def tiny_run(base: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a run of 16 steps on the tiny model in ``base``."""
    return [
        "train",
        f"model={base / 'model'}",
        f"data.train={base / 'pairs.jsonl'}",
        f"output={output}",
        "data.valid_fraction=0.2",
        "lora.rank=2",
        "train.batch_size=2",
        "train.gradient_accumulation_steps=2",
        "train.learning_rate=1e-2",
        "train.steps=16",
        "train.eval_every=4",
        "train.save_every=3",
        *more,
    ]


def arguments_of(output: Path, first: list[str]) -> list[str]:
    """Return the command that begins the run, or goes on with it once its folder exists."""
    if (output / "config.yaml").exists():
        return ["train", "--resume", str(output)]
    return first


# --- random instants -------------------------------------------------------------------------


def random_kills(base: Path, kills: int) -> dict[str, Any]:
    """Kill runs until ``kills`` processes were killed by SIGKILL; return what happened."""
    run, rng = Runner(), random.Random(0)
    results: dict[str, Any] = {}
    for variant, settings in VARIANTS.items():
        whole = base / f"whole {variant}"
        log = base / "log"
        run(tiny_run(base, whole, *settings), log)  # fills the cache of tokens
        shutil.rmtree(whole)
        ended = run(tiny_run(base, whole, *settings), log)
        assert ended.status in (0, 3), log.read_text()
        expected = content(whole)
        counts, instants, lost = Counter(), [], []
        number = 0
        while counts["SIGKILL"] < kills / len(VARIANTS):
            output = base / f"{variant} {number}"
            first = tiny_run(base, output, *settings)
            problem = killed_run(run, rng, first, output, ended.seconds, counts, instants)
            problem = problem or differences(content(output), expected)[:5]
            if problem:
                lost.append({"run": number, "problem": problem})
            else:
                shutil.rmtree(output)
            number += 1
        results[variant] = {
            "runs": number,
            "signals": dict(counts),
            "lost": lost,
            "seconds of an uninterrupted run": round(ended.seconds, 2),
            "steps finished when killed": dict(sorted(Counter(instants).items())),
        }
        print(f"{variant}: {json.dumps(results[variant])}", flush=True)
    return results


def killed_run(
    run: Runner,
    rng: random.Random,
    first: list[str],
    output: Path,
    seconds: float,
    counts: Counter,
    instants: list[int],
) -> str | None:
    """Run to the end with up to three kills on the way; return what went wrong, or None."""
    log = output.with_suffix(".log")
    for kill in range(MOST_KILLS + 1):
        number = rng.choices(list(SIGNALS), [7, 1, 1, 1])[0]
        after = rng.uniform(0, 1.1 * seconds) if kill < MOST_KILLS else None
        ended = run(arguments_of(output, first), log, kill_after=after, number=number)
        if ended.status in (0, 3):
            return None
        if ended.status not in (-number, 128 + number):
            return f"exit status {ended.status}: {log.read_text()[-500:]}"
        counts[SIGNALS[number]] += 1
        instants.append(last_step(output))
    return "not finished after the last attempt"


def last_step(output: Path) -> int:
    """Return the last step in metrics.jsonl, −1 if there is none."""
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return -1


# --- every operation -------------------------------------------------------------------------


def kills_at_operations(base: Path) -> dict[str, Any]:
    """Kill a run before each operation on its files; return what happened."""
    # Few arrays: each is a write of its own.
    settings = ["lora.target_modules=[q_proj]", "lora.num_layers=1", "lora.dropout=0.2"]
    settings += ["train.steps=3", "train.eval_every=2", "train.save_every=1"]
    settings += ["train.memory_check=off"]
    setup = "import os, sys, mlx_simpo.api\nfrom mlx_simpo.cli.main import run_command\n"
    setup += "def end(status): sys.stdout.flush(); os._exit(status)"
    with Forks(setup) as forks:

        def command(arguments: list[str], output: Path, **fault: int) -> Any:
            return forks.run(f"end(run_command({arguments!r}))", output, **fault)

        whole = base / "whole"
        ended = command(tiny_run(base, whole, *settings), whole)
        assert ended.status in (0, 3), ended.err
        expected = content(whole)
        names = Counter(operation.name for operation in ended.operations)
        print(f"{len(ended.operations)} operations: {dict(names)}", flush=True)
        lost, killed = [], 0
        for number in range(1, len(ended.operations) + 1):
            output = base / f"operation {number}"
            first = tiny_run(base, output, *settings)
            dead = command(first, output, kill_at=number)
            killed += dead.status == -9
            end = command(arguments_of(output, first), output)
            problem = (
                f"exit status {end.status}: {end.err[-500:]}"
                if end.status not in (0, 3)
                else differences(content(output), expected)[:5]
            )
            if problem:
                lost.append({"operation": number, "problem": problem})
            else:
                shutil.rmtree(output)
    return {
        "operations": len(ended.operations),
        "by name": dict(names),
        "killed": killed,
        "lost": lost,
    }


# --- the demo's model ------------------------------------------------------------------------


def demo_kills(base: Path, runs: int = 4) -> dict[str, Any]:
    """Kill the real command on the demo's model; return what happened."""
    from smollm2 import smollm2

    rng = random.Random(1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def command(arguments: list[str], kill_after: float | None = None) -> Ended:
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_simpo", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
        return Ended(process.wait(), time.monotonic() - started)

    def first(output: Path) -> list[str]:
        settings = ["lora.dropout=0.1", "train.eval_every=4", "train.save_every=1"]
        settings += [f"train.steps={DEMO_STEPS}", "data.valid=null", "data.valid_fraction=0.05"]
        model = f"model={smollm2('float32')}"
        config = str(ROOT / "configs" / "demo.yaml")
        return ["train", config, model, f"output={output}", *settings]

    os.chdir(ROOT)  # configs/demo.yaml names its pairs relative to it
    whole = command(first(base / "whole demo"))
    assert whole.status == 0
    expected = content(base / "whole demo")
    kills, lost, instants = 0, [], []
    for number in range(runs):
        output = base / f"demo {number}"
        for attempt in range(MOST_KILLS + 1):
            # The time that remains for the steps that are not done yet.
            done = max(0, last_step(output)) / DEMO_STEPS
            last = attempt == MOST_KILLS
            wait = None if last else rng.uniform(0.1, 0.9) * whole.seconds * (1 - done)
            ended = command(arguments_of(output, first(output)), wait)
            if ended.status != -9:
                break
            kills += 1
            instants.append(last_step(output))
            print(f"demo {number}: killed after step {instants[-1]}", flush=True)
        problem = (
            f"exit status {ended.status}"
            if ended.status
            else differences(content(output), expected)
        )
        if problem:
            lost.append({"run": number, "problem": problem})
    return {
        "runs": runs,
        "kills": kills,
        "lost": lost,
        "seconds of an uninterrupted run": round(whole.seconds, 1),
        "steps finished when killed": instants,
    }


def main() -> None:
    """Run the parts that are asked for, and write their results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = ("random", "operations", "demo")
    parser.add_argument("parts", nargs="*", default=parts, choices=parts)
    parser.add_argument("--kills", type=int, default=200, help="by SIGKILL, at random instants")
    options = parser.parse_args()
    command = f"python benchmarks/kill_matrix.py {' '.join(options.parts)} --kills {options.kills}"
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        os.environ["MLX_SIMPO_CACHE"] = str(base / "cache")
        # Here and not in this process: MLX must not have computed before a fork.
        make = (
            "import sys; from benchmarks.kill_matrix import make_inputs; make_inputs(sys.argv[1])"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", make, folder], cwd=ROOT, env=environment, check=True)
        if "random" in options.parts:
            record["random"] = random_kills(base, options.kills)
        if "operations" in options.parts:
            record["operations"] = kills_at_operations(base)
            print(json.dumps(record["operations"]), flush=True)
        if "demo" in options.parts:
            del os.environ["MLX_SIMPO_CACHE"]
            record["demo"] = demo_kills(base)
            print(json.dumps(record["demo"]), flush=True)
    for part, result in record.items():
        print(write_result(f"kill_matrix_{part}", {**provenance(command), "result": result}))


def make_inputs(folder: str) -> None:
    """Write the tiny model and its pairs."""
    tiny_folder(Path(folder, "model"))
    write_jsonl(Path(folder, "pairs.jsonl"), some_pairs(24))


if __name__ == "__main__":
    main()
