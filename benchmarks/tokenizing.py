"""Measure time and memory of tokenizing pairs of UltraFeedback's size, generated for the purpose.

    python benchmarks/tokenizing.py MODEL [PAIRS]

MODEL is a model's folder, of which the tokenizer is used. PAIRS (60 000) and a tenth of them are
tokenized, each in a process of its own: with one thread, with one per core, and from the cache.
Each process does what a run does: `load_or_tokenize`, then the validation split, then reading the
tokens of 2000 pairs in random order. Writes benchmarks/results/tokenizing.json. Linux only, where
the peak of memory can be reset.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from provenance import core_count, provenance, write_result

SEED = 0
RANDOM_READS = 2000


def write_pairs(path: Path, count: int) -> None:
    """Write chats of real sentences (Python's documentation) of about UltraFeedback's lengths."""
    rng = random.Random(SEED)
    words = re.sub(r"[*`:=-]{2,}", " ", " ".join(topics.values())).split()

    def text(tokens: int) -> str:
        length = max(5, round(tokens / 1.75 * rng.lognormvariate(-0.18, 0.6)))
        first = rng.randrange(len(words) - length)
        return " ".join(words[first : first + length])

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt = text(150)
            question = {"role": "user", "content": prompt}
            responses = [{"role": "assistant", "content": text(300)} for _ in range(2)]
            record: dict[str, Any] = {"prompt": prompt}
            record |= {"chosen": [question, responses[0]], "rejected": [question, responses[1]]}
            file.write(json.dumps(record) + "\n")


def measure(model: str, data: str, workers: int) -> dict[str, Any]:
    """Measure one start of a run, in this process."""
    import numpy as np

    from mlx_simpo import DataConfig
    from mlx_simpo.data import tokenize
    from mlx_simpo.data.cache import load_or_tokenize
    from mlx_simpo.data.encode import Encoder
    from mlx_simpo.data.pairs import held_out
    from mlx_simpo.data.sources import open_source
    from mlx_simpo.model.loading import load_only_tokenizer

    tokenize.MAX_WORKERS = workers
    encoder = Encoder(load_only_tokenizer(model), DataConfig())
    encoder.tokenizer.apply_chat_template([{"role": "user", "content": "q"}])  # imports the rest
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of memory
    idle, started = memory(), time.perf_counter()
    result = load_or_tokenize(
        encoder, open_source(data), lambda total: nullcontext(lambda rows: None)
    )
    seconds = time.perf_counter() - started
    held = held_out(result.pairs.prompts(), 0.05, 42)
    with_split = time.perf_counter() - started
    ready = memory()
    rows = np.random.default_rng(SEED).permutation(len(result.pairs))[:RANDOM_READS].tolist()
    tokens = sum(int(result.pairs[row].chosen.tokens[-1] >= 0) for row in rows)
    return {
        "pairs": len(result.pairs),
        "held_out": int(held.sum()),
        "mean_tokens": {
            name: round(float(result.pairs.column(name).mean()), 1)
            for name in ("chosen_score_start", "chosen", "rejected")
        },
        "seconds": round(seconds, 2),
        "seconds_with_split": round(with_split, 2),
        "pairs_per_second": round(len(result.pairs) / seconds),
        "idle_mb": idle,
        "ready_mb": ready,
        f"after_{tokens}_random_pairs_mb": memory(),
        "from_cache": "loaded from the cache" in result.note,
    }


def memory() -> dict[str, float]:
    """Return megabytes: the peak of the resident set, and its present part outside mapped files."""
    status = Path("/proc/self/status").read_text()
    fields = {"peak": "VmHWM", "own": "RssAnon"}
    kibibytes = {
        name: re.findall(rf"{field}:\s+(\d+)", status)[0] for name, field in fields.items()
    }
    return {name: round(int(value) * 1024 / 1e6, 1) for name, value in kibibytes.items()}


def in_a_child(model: str, data: Path, workers: int, cache: Path) -> dict[str, Any]:
    """Return `measure` of a new process, and the seconds of the whole process."""
    command = [sys.executable, __file__, "--measure", model, str(data), str(workers)]
    started = time.perf_counter()
    ended = subprocess.run(
        command,
        env={**os.environ, "MLX_SIMPO_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    whole = time.perf_counter() - started
    return {**json.loads(ended.stdout.splitlines()[-1]), "process_seconds": round(whole, 2)}


def main(model: str, pairs: int) -> None:
    shown = Path(model).name if Path(model).is_absolute() else model
    record = {
        "provenance": provenance(f"python benchmarks/tokenizing.py …/{shown} {pairs}"),
        "seed": SEED,
    }
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (pairs // 10, pairs):
            data = Path(folder) / f"{count}.jsonl"
            write_pairs(data, count)
            by_workers: dict[str, Any] = {"data_mb": round(data.stat().st_size / 1e6, 1)}
            for workers in sorted({1, core_count()}):
                cache = Path(folder) / f"cache-{count}-{workers}"
                by_workers[f"{workers} threads"] = in_a_child(model, data, workers, cache)
            files = [path for path in cache.rglob("*") if path.is_file()]
            by_workers["disk_mb"] = round(sum(f.stat().st_size for f in files) / 1e6, 1)
            by_workers["from cache"] = in_a_child(model, data, core_count(), cache)
            runs[f"{count} pairs"] = by_workers
    few, many = runs.values()
    growth = {
        name: round((ready(many[name]) - ready(few[name])) * 1e6 / (pairs - pairs // 10), 1)
        for name in few
        if isinstance(few[name], dict)
    }
    record |= {"peak_growth_bytes_per_pair": growth, **runs}
    print(write_result("tokenizing", record))


def ready(run: dict[str, Any]) -> float:
    """Return the peak in megabytes, beyond that of the process before it started."""
    return run["ready_mb"]["peak"] - run["idle_mb"]["peak"]


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60_000)
