"""How much of training's wall time the device could stand idle, and how full its batches are.

    python benchmarks/overhead.py --model FOLDER --data train.jsonl [--steps 6]

Trains through `mlx_simpo.prepare` and `Session.steps`, writes one line of metrics per step, and
counts all time that is not spent inside mx.eval or mx.async_eval (reading pairs, making batches,
building graphs, metrics), and the part of it in which nothing was handed over to the device. Then
counts one epoch's positions without running it: padding, and prompt tokens that run more than once.
"""

# First, before anything imports MLX: on a Linux CPU it loads a fast BLAS in place of MLX's own.
from mlx_simpo import load_config, prepare
from mlx_simpo.data.mixing import epoch_order
from mlx_simpo.engine.collate_shared import collate_shared
from mlx_simpo.engine.collate_stacked import collate_stacked
from mlx_simpo.engine.figures import default_figures
from mlx_simpo.engine.plan import (
    input_length,
    plan_shared_prefix,
    plan_stacked,
    shared_prefix_length,
)
from mlx_simpo.engine.prefix_cache import can_extend_prefix

# isort: split
import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from provenance import provenance, write_result


class Clock:
    """Wall time inside of mx.eval and mx.async_eval, and with nothing handed over to the device."""

    def __init__(self) -> None:
        self.queue: list[tuple] = []  # what has been handed over and not been waited for
        self.inside = self.idle = 0.0
        self._emptied = time.perf_counter()

    def hand_over(self, *arrays: Any) -> None:
        """mx.async_eval, in which operations are handed over one by one, the first at once."""
        started = time.perf_counter()
        self.idle += 0 if self.queue else started - self._emptied
        ASYNC_EVAL(*arrays)
        self.inside += time.perf_counter() - started
        self.queue.append(arrays)

    def wait(self, *arrays: Any) -> None:
        """mx.eval of something that has been handed over, and so of all before it."""
        started = time.perf_counter()
        if not self.queue:
            self.idle += started - self._emptied
        EVAL(*arrays)
        self._emptied = time.perf_counter()
        self.inside += self._emptied - started
        waited_for = [
            i for i, queued in enumerate(self.queue) if any(a is arrays[0] for a in queued)
        ]
        self.queue = self.queue[waited_for[0] + 1 :] if waited_for else []


EVAL, ASYNC_EVAL = mx.eval, mx.async_eval


def overhead(session: Any, steps: int) -> dict[str, float]:
    """Seconds of all steps but the first; the share of them outside of evaluation; the share in
    which the device had nothing to do."""
    clock = Clock()
    mx.eval, mx.async_eval = clock.wait, clock.hand_over
    with tempfile.TemporaryFile("w") as log:
        running = session.steps()
        next(running)
        clock.inside = clock.idle = 0.0
        started = time.perf_counter()
        for step in itertools.islice(running, steps):
            log.write(json.dumps(step.as_dict()) + "\n")
        seconds = time.perf_counter() - started
    mx.eval, mx.async_eval = EVAL, ASYNC_EVAL
    outside, idle = 1 - clock.inside / seconds, clock.idle / seconds
    return {"steps": steps, "seconds": seconds, "outside": outside, "idle": idle}


def epoch_counts(session: Any, batch_size: int, step_pairs: int, seed: int) -> dict[str, Any]:
    """Positions of one epoch: of the stacked way and of ours."""
    pairs, extends = session.train, can_extend_prefix(session.model)
    ours = {"positions": 0, "padding": 0, "needed": 0, "micro_batches": 0, "passes": 0}
    stacked = {"positions": 0, "tokens": 0}
    figures = default_figures()
    epoch = epoch_order(pairs, seed).epoch(0)
    for start in range(0, len(epoch), step_pairs):
        order = epoch[start : start + step_pairs]
        step = [pairs[i] for i in order]
        for indices in plan_shared_prefix(
            step, batch_size, figures=figures, extends_prefix=extends
        ):
            members = [step[i] for i in indices]
            batch = collate_shared(members, figures.pass_cost, extends_prefix=extends)
            ours["positions"] += batch.positions
            ours["padding"] += batch.padding
            ours["micro_batches"] += 1
            ours["passes"] += batch.passes
        for pair in step:
            once = shared_prefix_length(pair)
            ours["needed"] += once + sum(
                input_length(s) - once for s in (pair.chosen, pair.rejected)
            )
        for indices in plan_stacked(step, batch_size):
            stacked["positions"] += collate_stacked([step[i] for i in indices]).tokens.size
        stacked["tokens"] += sum(len(p.chosen.tokens) + len(p.rejected.tokens) for p in step)
    rows = int(sum(p.chosen.num_scored + p.rejected.num_scored for p in pairs))
    return {
        "batch_size": batch_size,
        "step_pairs": step_pairs,
        "ours": ours,
        "head_rows": {"ours": rows, "padding": 0, "stacked": stacked["positions"]},
        "stacked": stacked,
        "padding_share": ours["padding"] / ours["positions"],
        "padding_share_trunk_and_head": ours["padding"] / (ours["positions"] + rows),
        "prompt_twice_share": 1 - (ours["needed"] + ours["padding"]) / ours["positions"],
        "padding_share_stacked": 1 - stacked["tokens"] / stacked["positions"],
        "positions_ratio": stacked["positions"] / ours["positions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    origin = provenance(
        f"python benchmarks/overhead.py --model … --data {Path(options.data).name} "
        f"--steps {options.steps}"
    )
    settings = [f"model={options.model}", f"data.train={options.data}", "data.valid_fraction=0"]
    with tempfile.TemporaryDirectory() as folder:
        session = prepare(load_config(None, [*settings, f"output={folder}/run"]))
        epoch = [epoch_counts(session, 4, n, 42) for n in (4, 16)]
        print(json.dumps(epoch, indent=1), flush=True)
        measured = []
        for micro, accumulation in ((4, 4), (1, 1)):
            size = [
                f"train.batch_size={micro}",
                f"train.gradient_accumulation_steps={accumulation}",
                f"output={folder}/run",
            ]
            session = prepare(load_config(None, [*settings, *size]))
            figures = overhead(session, options.steps)
            measured.append({"batch_size": micro, "accumulation": accumulation, **figures})
            print(measured[-1], flush=True)
    print(write_result("overhead", {"provenance": origin, "runs": measured, "epoch": epoch}))


if __name__ == "__main__":
    main()
