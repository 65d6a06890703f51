"""What calibration says a step will take, beside what it takes, on natural steps of 16 pairs.

    python benchmarks/calibration.py --model FOLDER --data train.jsonl [--steps 3] [--budget 3]

Calibrates on the model with LoRA as a run on a GPU does (on a CPU, a run does not: it takes longer
than 3 seconds to learn anything there, hence --budget). Then the same steps run as the built-in
figures divide them and as the calibrated ones do, in turns, after one step of each that does not
count. --processor-time counts the process's processor seconds instead of the wall's, for a machine
that others use as well; set OMP_NUM_THREADS=1 with it, as threads of a BLAS spin while they wait.
"""

# First, before anything imports MLX: on a Linux CPU it loads a fast BLAS in place of MLX's own.
from mlx_simpo import load_config, prepare
from mlx_simpo.data.mixing import epoch_order
from mlx_simpo.engine.calibration import Calibration, calibrate, calibration_table
from mlx_simpo.engine.choice import Engine, configured_engine
from mlx_simpo.engine.figures import default_figures
from mlx_simpo.engine.pass_timing import PassCosts
from mlx_simpo.engine.trial_shapes import typical_lengths
from mlx_simpo.training.step import collate_step, step_gradients
from mlx_simpo.training.trainer import create_gradient_function

# isort: split
import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from provenance import provenance, write_result

STEP_PAIRS = 16


def counts(engine: Engine, pairs: list, options: Any) -> dict[str, int]:
    """What a step has: micro-batches, passes, positions, and hidden states for the head."""
    batches = collate_step(pairs, engine, options).micro_batches
    return {
        "micro_batches": len(batches),
        "passes": sum(len(b.arrays[1]) + (b.arrays[0].size > 0) for b in batches),
        "positions": sum(b.positions for b in batches),
        "rows": sum(b.head_positions for b in batches),
    }


def predicted(calibration: Calibration, step: dict[str, int]) -> float | None:
    """Seconds of a step without its update."""
    if not calibration.pass_s or not calibration.position_s or not calibration.row_s:
        return None
    trunk = PassCosts(calibration.pass_s, calibration.position_s)
    return trunk.seconds(step["passes"], step["positions"]) + calibration.row_s * step["rows"]


def measure(
    session: Any, engines: dict[str, Engine], steps: list[list], clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of the gradient of each step, by engine; the first of each does not count."""
    model, config = session.model, session.config
    model.train()
    functions = {n: create_gradient_function(model, config, e) for n, e in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for pairs in [steps[0], *steps]:
        for name, engine in engines.items():
            batch = collate_step(pairs, engine, config.train)
            started = clock()
            mx.eval(step_gradients(functions[name], batch))
            seconds[name].append(clock() - started)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--budget", type=float, default=3.0)
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    origin = provenance(
        f"python benchmarks/calibration.py --model … --data {Path(options.data).name} --steps "
        f"{options.steps} --budget {options.budget:g}"
        + (" --processor-time" if options.processor_time else "")
    )
    threads = os.environ.get("OMP_NUM_THREADS")
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"model={options.model}", f"data.train={options.data}", f"output={folder}/run"]
        settings += ["data.valid_fraction=0", "engine.calibration=off"]
        session = prepare(load_config(None, settings))
    config, pairs = session.config, session.train
    lengths = typical_lengths(pairs)
    calibration = calibrate(session.model, config, lengths, options.budget, clock)
    print(calibration.figures.note)
    for row in calibration_table(calibration, config.train.batch_size):
        print(row)
    figures = {"built-in": default_figures(), "calibrated": calibration.figures}
    engines = {n: configured_engine(config, session.model, f) for n, f in figures.items()}
    orders = epoch_order(pairs, config.seed).steps(STEP_PAIRS, 0)
    steps = [[pairs[i] for i in order] for order in itertools.islice(orders, options.steps)]
    seconds = measure(session, engines, steps, clock)
    results = {}
    for name, engine in engines.items():
        planned = [counts(engine, step, config.train) for step in steps]
        rows = [
            {**step, "predicted_s": predicted(calibration, step), "measured_s": measured}
            for step, measured in zip(planned, seconds[name], strict=True)
        ]
        results[name] = {"figures": asdict(figures[name]), "steps": rows}
        for row in rows:
            print(name, row, flush=True)
    record = {
        "provenance": origin,
        "OMP_NUM_THREADS": threads,
        "lengths": lengths._asdict(),
        "calibration": asdict(calibration),
        "results": results,
    }
    print(write_result("calibration", record))


if __name__ == "__main__":
    main()
