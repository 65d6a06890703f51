"""One training step, library by library: seconds, positions and memory on the same batches.

    make bench                     (installs the other libraries, then runs this with its defaults)
    python benchmarks/step.py --model FOLDER --data train.jsonl --shapes natural --batches 4

Each library runs in a process of its own (worker.py) with the same pairs, model, LoRA layers and
dtype. The processes take turns, batch by batch, in an order that moves on, so that a machine that
grows slow is slow for all. With --warm-up each, a first run of every batch is not counted, so that
no compiled step is charged for tracing a shape; first: only the first batch's. Ratios are of the
batches' sums. What is written: benchmarks/results/step_<name>.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flops import matmul_rate, needed_flops
from provenance import provenance, write_result
from shapes import SHAPES, tokenized

LIBRARIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlx_simpo": ("ours", {}),
    "mlx_simpo reference": ("ours", {"engine": "reference"}),
    "stacked, compiled": ("stacked", {}),
    "unsloth_zoo": ("unsloth_zoo", {}),
    "mlx-train-perf loss": ("mlx_train_perf", {}),
    "mlx-tune": ("mlx_tune_simpo", {}),
    "mlxsmith": ("mlxsmith_simpo", {}),
    "mlx-lm-lora CPO": ("mlx_lm_lora_step", {"variant": "cpo"}),
    "mlx-lm-lora CPO, compiled": ("mlx_lm_lora_step", {"variant": "cpo_compiled"}),
    "mlx-lm-lora DPO": ("mlx_lm_lora_step", {"variant": "dpo"}),
    "TRL (torch)": ("trl_cpo", {}),
}
SPEC = {
    "rank": 16,
    "scale": 2.0,
    "beta": 2.0,
    "gamma_beta_ratio": 0.5,
    "learning_rate": 0.0,  # so that every step's loss is that of the same weights
    "seed": 0,
    "pad_to": 32,
    "checkpoint": False,
}
BASELINE = "stacked, compiled"


class Worker:
    """A library in its process."""

    def __init__(self, name: str, model: str, **changes: Any) -> None:
        module, settings = LIBRARIES[name]
        spec = {**SPEC, "model": model, **settings, **changes}
        environment = dict(os.environ)
        if module == "trl_cpo":  # torch brings a BLAS of its own
            environment.pop("LD_PRELOAD", None)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "worker.py"), module, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.error = self._read().get("error")

    def run(self, batch: list[dict]) -> dict[str, Any]:
        """The result that worker.py writes for one batch."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(batch) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"died with {self.process.wait()}"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(
    workers: dict[str, Worker], batches: list[list[dict]], repeats: int, warm_up: str
) -> Iterator[dict[str, Any]]:
    """A record for every counted run."""
    names = list(workers)
    for number, batch in enumerate(batches):
        warm = warm_up == "each" or (warm_up == "first" and number == 0)
        for repeat in range(0 if warm else 1, repeats + 1):
            first = (number + repeat) % len(names)
            for name in names[first:] + names[:first]:
                if workers[name].error is not None:
                    continue
                result = workers[name].run(batch)
                workers[name].error = result.get("error")
                if repeat and "error" not in result:
                    print(
                        f"  {number} {name:28} {result['seconds']:7.2f} s {result['loss']:.6f} "
                        f"{result.get('peak_gb', result['process_gb']):6.2f} GB",
                        file=sys.stderr,
                        flush=True,
                    )
                    yield {"library": name, "batch": number, "repeat": repeat, **result}


def summary(runs: list[dict], batches: list[list[dict]], rate: float, config: dict) -> list[dict]:
    """One line per library, and its ratios to the baseline."""
    needed = sum(needed_flops(batch, config, SPEC["rank"]) for batch in batches)
    tokens = sum(len(p["chosen"]) + len(p["rejected"]) for batch in batches for p in batch)
    pairs = sum(map(len, batches))
    lines = []
    for name in dict.fromkeys(run["library"] for run in runs):
        own = [run for run in runs if run["library"] == name]
        by_batch = [[r for r in own if r["batch"] == number] for number in range(len(batches))]
        if not all(by_batch):
            continue
        seconds = sum(statistics.median(r["seconds"] for r in repeats) for repeats in by_batch)
        first = [repeats[0] for repeats in by_batch]
        lines.append(
            {
                "library": name,
                "seconds_per_pair": seconds / pairs,
                "real_tokens_per_second": tokens / seconds,
                "peak_gb": max((r["peak_gb"] for r in own if "peak_gb" in r), default=None),
                "process_gb": max(r["process_gb"] for r in own),
                "positions": sum(r["positions"] for r in first),
                "logit_rows": sum(r["logit_rows"] for r in first),
                "share_of_matmul_rate": needed / seconds / rate,
                "losses": [r["loss"] for r in first],
                "note": own[0].get("note"),
            }
        )
    base = next((line for line in lines if line["library"] == BASELINE), None)
    for line in lines if base else ():
        line["speed_ratio"] = base["seconds_per_pair"] / line["seconds_per_pair"]
        if line["peak_gb"]:
            line["memory_ratio"] = line["peak_gb"] / base["peak_gb"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a float32 model")
    parser.add_argument("--data", required=True, help="pairs, .jsonl")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--batches", type=int, default=3, help="of 4 pairs, a shape")
    parser.add_argument("--repeats", type=int, default=1, help="counted runs of each batch")
    parser.add_argument("--warm-up", default="each", choices=["each", "first", "none"])
    parser.add_argument("--alone", action="store_true", help="one library after the other")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    parser.add_argument("--name", default="all", help="the result's: results/step_NAME.json")
    options = parser.parse_args()
    shown = [a if a not in (options.model, options.data) else Path(a).name for a in sys.argv[1:]]
    origin = provenance(" ".join(["python benchmarks/step.py", *shown]))
    config = json.loads((Path(options.model) / "config.json").read_text())
    pairs = tokenized(options.model, options.data)
    record: dict[str, Any] = {"provenance": origin, "shapes": {}}
    for shape in options.shapes:
        batches = SHAPES[shape](pairs, options.batches)
        rate = matmul_rate()
        print(f"{shape}: {rate / 1e9:.0f} GFLOP/s of matrix products", file=sys.stderr, flush=True)
        started = time.perf_counter()
        runs, errors = [], {}
        # At once, so that they can take turns; or one after the other, as memory has room for one.
        groups = [[n] for n in options.libraries] if options.alone else [options.libraries]
        for group in groups:
            workers = {n: Worker(n, options.model, checkpoint=options.checkpoint) for n in group}
            runs += compare(workers, batches, options.repeats, options.warm_up)
            errors |= {n: w.error for n, w in workers.items() if w.error is not None}
            for worker in workers.values():
                worker.close()
        record["shapes"][shape] = {
            "batches": [
                [
                    (p["start"], len(p["chosen"]) - p["start"], len(p["rejected"]) - p["start"])
                    for p in b
                ]
                for b in batches
            ],
            "matmul_gflops": rate / 1e9,
            "libraries": summary(runs, batches, rate, config),
            "errors": errors,
            "runs": [{k: v for k, v in r.items() if k != "note"} for r in runs],
            "seconds": time.perf_counter() - started,
        }
        write_result(f"step_{options.name}", record)
    print(json.dumps({k: v["libraries"] for k, v in record["shapes"].items()}, indent=1))


if __name__ == "__main__":
    main()
