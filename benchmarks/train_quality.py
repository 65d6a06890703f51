"""Does training help? Reward accuracy on held-out pairs before and after one run, with the record.

    python benchmarks/train_quality.py RESULT_NAME model=… data.train=… data.valid=… [name=value …]

Runs `mlx_simpo.train` with the given settings and writes benchmarks/results/RESULT_NAME.json: the
evaluations, every step's metrics, and where the numbers come from. Paths are recorded by their last
two parts.
"""

import json
import sys
from pathlib import Path

from provenance import provenance, write_result

from mlx_simpo import load_config, train


def main() -> None:
    name, *settings = sys.argv[1:]
    config = load_config(None, settings)
    source = provenance(
        " ".join(["python benchmarks/train_quality.py", name, *map(shortened, settings)])
    )
    result = train(config)
    lines = (result.adapter / "metrics.jsonl").read_text().splitlines()
    summary = result.as_dict() | {"adapter": shortened(str(result.adapter))}
    record = {
        "provenance": source,
        "seed": config.seed,
        "result": summary,
        "steps": [rounded(json.loads(line)) for line in lines],
    }
    print(write_result(name, record))


def shortened(setting: str) -> str:
    """A setting whose path says no more than its last two parts."""
    key, equals, value = setting.rpartition("=")
    path = Path(value)
    return key + equals + ("/".join(path.parts[-2:]) if path.is_absolute() else value)


def rounded(record: dict) -> dict:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}


if __name__ == "__main__":
    main()
