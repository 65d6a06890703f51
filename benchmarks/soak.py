"""Whether a long run grows: memory, open files, threads, traces and files over 5 000 steps.

    python benchmarks/soak.py [--steps 5000] [--runs NAME …]

`mlx_simpo.train` on a random two-layer model and pairs of many lengths, so that most batches have
shapes of their own, with evaluations and checkpoints on the way; each run in its own process. Every
100 steps it records what the process and MLX hold. Judged is the second half of a run, by a
straight line through its samples. The sizes of arrays differ from batch to batch, so that the
verdict on memory allows for the line's standard error.

The resident size is the current one on Linux; macOS tells only the largest so far.
"""

# First, before anything imports MLX: on a Linux CPU it loads a fast BLAS in place of MLX's own.
from mlx_simpo import load_config, train

# isort: split
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance, write_result

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.growth import SamplingDisplay, sample
from helpers.tiny import tiny_folder, write_jsonl

RUNS = {
    "shared_prefix": ["train.engine=shared_prefix"],
    "reference, compiled": ["train.engine=reference", "train.compile=true"],
    "gradient checkpointing, dropout": ["train.gradient_checkpointing=true", "lora.dropout=0.1"],
}
COMMON = [
    "train.batch_size=2",
    "train.gradient_accumulation_steps=2",
    "train.learning_rate=1e-4",
    "train.eval_every=250",
    "train.sample_prompts=[What is the sea like]",
    "train.sample_tokens=10",
    "train.save_every=200",
    "data.max_length=256",
    "data.max_prompt_length=128",
    "data.valid_fraction=0.02",
]
STEPS, PAIRS = 5000, 2000
SAMPLE_EVERY = 100
# Bytes per step, beside two standard errors: 100 000 steps would take 50 MB more.
MEMORY_MARGIN = 500
MEMORY = ("resident_bytes", "active_bytes", "cache_bytes")
COUNTS = ("open_files", "threads", "traces")
FILES = ("log_bytes", "other_files_bytes")  # logs have to grow


def pairs(count: int) -> list[dict[str, str]]:
    """Return records of many lengths: prompts of 1 to 60 words, responses of 1 to 80."""
    rng = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "sky", "and", "sea", "0", "1", "2"]

    def text(mean: float, longest: int) -> str:
        return " ".join(
            rng.choice(words, int(np.clip(rng.lognormal(np.log(mean), 0.8), 1, longest)))
        )

    return [
        {"prompt": f"{i} {text(15, 60)}", "chosen": text(20, 80), "rejected": text(20, 80)}
        for i in range(count)
    ]


def soak(settings: list[str], steps: int) -> dict[str, Any]:
    """Run this many steps and return the samples."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MLX_SIMPO_CACHE"] = str(folder / "cache")  # and not the user's
        model = tiny_folder(folder / "model")
        data = write_jsonl(folder / "pairs.jsonl", pairs(PAIRS))
        output = folder / "run"
        where = [f"model={model}", f"data.train={data}", f"output={output}"]
        display = SamplingDisplay(SAMPLE_EVERY, partial(sample, output))
        started = time.perf_counter()
        train(load_config(None, [*where, *COMMON, *settings, f"train.steps={steps}"]), display)
        return {"seconds": time.perf_counter() - started, "samples": display.samples}


def verdict(samples: list[dict[str, int]]) -> dict[str, Any]:
    """Return how much each quantity grows per step in the second half, and which grow too much."""
    half = samples[len(samples) // 2 :]
    steps = np.array([s["step"] for s in half], float)
    steps -= steps.mean()
    growth, errors = {}, {}
    for name in (*MEMORY, *COUNTS, *FILES):
        values = np.array([s[name] for s in half], float)
        growth[name] = float(steps @ values / (steps @ steps))
        rest = values - values.mean() - growth[name] * steps
        errors[name] = float(np.sqrt(rest @ rest / (len(half) - 2) / (steps @ steps)))
    allowed = {name: MEMORY_MARGIN + 2 * errors[name] for name in MEMORY} | dict.fromkeys(COUNTS, 0)
    return {
        "growth_per_step": growth,
        "standard_error": errors,
        "allowed_per_step": allowed,
        "grows": [name for name, most in allowed.items() if growth[name] > most],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of one run
    options = parser.parse_args()
    if options.one:
        print(json.dumps(soak(RUNS[options.one], options.steps)))
        return
    record: dict[str, Any] = {"provenance": provenance("python benchmarks/soak.py"), "runs": {}}
    for name in options.runs:
        arguments = [sys.executable, __file__, "--one", name, "--steps", str(options.steps)]
        ended = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(ended.stdout)
        run = {"settings": RUNS[name], **verdict(result["samples"]), **result}
        record["runs"][name] = run
        print(f"{name}: {', '.join(run['grows']) or 'nothing'} grows", flush=True)
        for quantity, growth in run["growth_per_step"].items():
            error = run["standard_error"][quantity]
            print(f"    {quantity}: {growth:+.4g} per step (± {error:.2g})", flush=True)
    if options.steps == STEPS and options.runs == list(RUNS):
        print(write_result("soak", record))


if __name__ == "__main__":
    main()
