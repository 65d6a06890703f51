"""Peak memory of one step against the length of a pair, with gradient checkpointing and without.

    python benchmarks/memory.py --model FOLDER [--layers 4] [--libraries mlx_simpo]

One pair, half of it prompt, at 512 to 8192 tokens per sequence, each in a process of its own; for
comparison the compiled stacked step (libraries/stacked.py) and all other libraries that have
checkpointing, as far as they fit; up to 1024 tokens without checkpointing, too. Fewer layers than
the model has, because a CPU takes minutes for attention at 8192; what grows with the square of the
length does so in every layer alike. Some peaks differ from run to run, because MLX allocates ahead
of the device; each is the highest of RUNS processes up to 1024 tokens. With --libraries, what an
earlier run has measured of the others stays, with its provenance as "earlier".
"""

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from provenance import RESULTS, provenance, write_result
from step import Worker

LENGTHS = (512, 1024, 2048, 4096, 8192)
LONGEST = {
    "mlx_simpo": 8192,
    "stacked, compiled": 4096,
    "unsloth_zoo": 8192,
    "mlx-train-perf loss": 4096,
    "mlx-tune": 8192,
    "mlx-lm-lora CPO": 8192,
}
LONGEST_WITHOUT = 1024  # checkpointing
RUNS = 3


def shallow(model: str, layers: int, folder: Path) -> str:
    """The model's first layers as a model of their own."""
    import mlx.core as mx

    config = json.loads((Path(model) / "config.json").read_text())
    for file in Path(model).iterdir():
        if file.suffix in (".json", ".jinja", ".txt"):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    weights = {
        name: weight
        for name, weight in mx.load(str(Path(model) / "model.safetensors")).items()  # type: ignore
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--libraries", nargs="+", default=list(LONGEST), choices=LONGEST)
    options = parser.parse_args()
    origin = provenance(f"python benchmarks/memory.py --model … --layers {options.layers}")
    results: dict[bool, dict[str, dict[str, dict]]] = {True: {}, False: {}}
    with tempfile.TemporaryDirectory() as folder:
        model = shallow(options.model, options.layers, Path(folder))
        for checkpoint in (True, False):
            for length in LENGTHS:
                for name in options.libraries:
                    longest = min(options.longest, LONGEST[name] if checkpoint else LONGEST_WITHOUT)
                    if length <= longest:
                        result = highest(name, model, length, checkpoint)
                        print(name, length, checkpoint, result, flush=True)
                        results[checkpoint].setdefault(name, {})[str(length)] = result
    record: dict[str, Any] = {"provenance": origin}
    before = {}
    if set(options.libraries) < set(LONGEST):
        before = json.loads((RESULTS / "memory.json").read_text())
        record["earlier"] = before["provenance"]
    for checkpoint, name in ((True, "lengths"), (False, "without_checkpointing")):
        merged = before.get(name, {}) | results[checkpoint]
        record[name] = {library: merged[library] for library in LONGEST if library in merged}
    print(write_result("memory", record))


def highest(name: str, model: str, length: int, checkpoint: bool) -> dict:
    """The result with the highest peak; an error is the highest. peaks_gb: of all runs."""
    count = RUNS if length <= LONGEST_WITHOUT else 1
    runs = [step(name, model, length, checkpoint) for _ in range(count)]
    result = max(runs, key=lambda run: run.get("peak_gb", math.inf))
    return {**result, "peaks_gb": sorted(run["peak_gb"] for run in runs if "peak_gb" in run)}


def step(name: str, model: str, length: int, checkpoint: bool) -> dict:
    """The result of one step in a process of its own."""
    worker = Worker(name, model, checkpoint=checkpoint)
    result = {"error": worker.error} if worker.error else worker.run([pair(length)])
    worker.close()
    return result


def pair(length: int) -> dict:
    rng = np.random.default_rng(length)
    half = length // 2
    prompt, chosen, rejected = (rng.integers(5, 40_000, half).tolist() for _ in range(3))
    return {"chosen": prompt + chosen, "rejected": prompt + rejected, "start": half}


if __name__ == "__main__":
    main()
