"""Peak memory of one step against the length of a pair, with gradient checkpointing.

    python benchmarks/memory.py --model FOLDER [--layers 4]

One pair, half of it prompt, at 512 to 8192 tokens per sequence, each in a process of its own; for
comparison the compiled stacked step (libraries/stacked.py) and unsloth_zoo, both with
checkpointing too, as far as they fit. Fewer layers than the model has, because a CPU takes minutes
for attention at 8192; what grows with the square of the length does so in every layer alike.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from provenance import provenance, write_result
from step import Worker

LENGTHS = (512, 1024, 2048, 4096, 8192)
LONGEST = {"mlx_simpo": 8192, "stacked, compiled": 4096, "unsloth_zoo": 4096}


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
    options = parser.parse_args()
    origin = provenance(f"python benchmarks/memory.py --model … --layers {options.layers}")
    results: dict[str, dict[int, dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = shallow(options.model, options.layers, Path(folder))
        for name, longest in LONGEST.items():
            for length in LENGTHS:
                if length <= longest:
                    worker = Worker(name, model, checkpoint=True)
                    result = worker.run([pair(length)])
                    worker.close()
                    print(name, length, result, flush=True)
                    results.setdefault(name, {})[length] = result
    print(write_result("memory", {"provenance": origin, "lengths": results}))


def pair(length: int) -> dict:
    rng = np.random.default_rng(length)
    half = length // 2
    prompt, chosen, rejected = (rng.integers(5, 40_000, half).tolist() for _ in range(3))
    return {"chosen": prompt + chosen, "rejected": prompt + rejected, "start": half}


if __name__ == "__main__":
    main()
