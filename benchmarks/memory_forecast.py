"""The memory check's forecast beside the peak of the training itself.

    python benchmarks/memory_forecast.py --model FOLDER --data train.jsonl [--only NAME …]

For each setting, two processes: one makes the forecast, as a run does before its first step; the
other trains, all steps of an epoch on 16 real pairs with the optimizer, and reads MLX's peak. Cost
is the forecast's processor time in steps of that training. Settings are stored as they are done.
"""

# First, before anything imports MLX: on a Linux CPU it loads a fast BLAS in place of MLX's own.
from mlx_simpo import load_config, prepare
from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.engine.figures import default_figures
from mlx_simpo.reporting.display import Display
from mlx_simpo.training.memory_check import forecast_training

# isort: split
import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from provenance import RESULTS, provenance, write_result
from rich.console import Console
from shapes import SHAPES, tokenized

NAME = "memory_forecast"
BATCHES = 4  # of 4 pairs
# Name → shape of the pairs, and settings. positions: of a micro-batch at most, where it shall be as
# large as on a GPU and not as on a CPU.
SETTINGS: dict[str, dict[str, Any]] = {
    "natural, batch 1": {"train.batch_size": 1},
    "natural, batch 4": {},
    "natural, batch 8": {"train.batch_size": 8},
    "natural, batch 4 × 4": {"train.gradient_accumulation_steps": 4},
    "natural, batch 8, as on a GPU": {"train.batch_size": 8, "positions": 4096},
    "natural, checkpointing": {"train.gradient_checkpointing": "true"},
    "natural, checkpointing, as on a GPU": {
        "train.batch_size": 8,
        "train.gradient_checkpointing": "true",
        "positions": 4096,
    },
    "natural, reference, compiled": {"train.engine": "reference"},
    "natural, reference, not compiled": {"train.engine": "reference", "train.compile": "false"},
    "natural, reference, 1024 tokens": {
        "train.engine": "reference",
        "train.batch_size": 8,
        "train.max_tokens_per_step": 1024,
    },
    "natural, DoRA": {"lora.dora": "true"},
    "natural, 12 layers": {"lora.num_layers": 12},
    "natural, rank 128, dropout": {"lora.rank": 128, "lora.dropout": 0.1},
    "long prompts, batch 4": {"shape": "long_prompts"},
    "long prompts, checkpointing": {
        "shape": "long_prompts",
        "train.gradient_checkpointing": "true",
    },
    "very long, checkpointing": {"shape": "very_long", "train.gradient_checkpointing": "true"},
}


def child(model: str, data: str, name: str, what: str) -> dict[str, Any]:
    """The forecast of one setting, or its training, in this process."""
    settings = {"train.gradient_accumulation_steps": 1, **SETTINGS[name]}
    shape = settings.pop("shape", "natural")
    figures = default_figures()
    figures = replace(figures, max_positions=settings.pop("positions", figures.max_positions))
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"model={model}", f"data.train={data}", "data.valid_fraction=0"]
        fixed += [f"output={folder}/run"]
        overrides = [f"{key}={value}" for key, value in settings.items()]
        config, display = load_config(None, [*fixed, *overrides]), Display(Console(quiet=True))
        session = prepare(config, display, figures=figures)
        batches = SHAPES[shape](tokenized(model, data), BATCHES)
        pairs = itertools.chain.from_iterable(batches)
        session.train = [encoded(pair, i) for i, pair in enumerate(pairs)]
        started, cpu = time.perf_counter(), time.process_time()
        if what == "forecast":
            forecast = forecast_training(
                session.model, session.train, session.config, session.engine
            )
            result: dict[str, Any] = {"peak": forecast.peak}
            result["positions"] = forecast.positions
            result |= {"pairs": forecast.pairs, "weights": forecast.weights}
        else:
            mx.eval(session.model.parameters())
            mx.reset_peak_memory()
            steps = len(list(session.steps()))
            result = {"peak": mx.get_peak_memory(), "steps": steps}
        result["seconds"] = time.perf_counter() - started
        return {**result, "processor_seconds": time.process_time() - cpu}


def encoded(pair: dict, index: int) -> EncodedPair:
    """A pair of `shapes`."""
    sequences = (np.array(pair[name], np.int32) for name in ("chosen", "rejected"))
    return EncodedPair(
        *(TokenizedSequence(tokens, pair["start"]) for tokens in sequences), index=index
    )


def in_a_process(options: argparse.Namespace, name: str, what: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", options.model, "--data", options.data]
    output = subprocess.run(
        [*command, "--child", name, what], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.model, options.data, *options.child)))
        return
    origin = provenance(f"python benchmarks/{NAME}.py --model … --data {Path(options.data).name}")
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text())["settings"] if path.exists() else {}
    for name in options.only:
        forecast, training = (in_a_process(options, name, w) for w in ("forecast", "training"))
        step = training["processor_seconds"] / training["steps"]
        results[name] = {
            "ratio": forecast["peak"] / training["peak"],
            "cost_in_steps": forecast["processor_seconds"] / step,
            "forecast": forecast,
            "training": training,
        }
        print(f"{name}: {results[name]}", flush=True)
        write_result(NAME, {"provenance": origin, "settings": results})


if __name__ == "__main__":
    main()
