"""How long tokenizing takes, and how much memory: UltraFeedback-sized pairs, made for the purpose.

    python benchmarks/tokenizing.py MODEL [PAIRS]

MODEL is a model's folder, of which the tokenizer is used; PAIRS (60 000) and a tenth of them are
tokenized, each in a process of its own, by one thread, by one a core, and from what was kept. What
each process does is what a run does: `tokenized`, then the held-out share, then, to use them, the
tokens of 2000 pairs in random order. Writes benchmarks/results/tokenizing.json. Linux only, whose
highest memory use can be counted from a moment on.
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
USED = 2000


def write_pairs(path: Path, count: int) -> None:
    """Chats of real sentences (Python's own documentation), of about UltraFeedback's lengths."""
    rng = random.Random(SEED)
    words = re.sub(r"[*`:=-]{2,}", " ", " ".join(topics.values())).split()

    def text(tokens: int) -> str:
        length = max(5, round(tokens / 1.75 * rng.lognormvariate(-0.18, 0.6)))
        first = rng.randrange(len(words) - length)
        return " ".join(words[first : first + length])

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt = text(150)
            asked = {"role": "user", "content": prompt}
            answers = [{"role": "assistant", "content": text(300)} for _ in range(2)]
            record: dict[str, Any] = {"prompt": prompt}
            record |= {"chosen": [asked, answers[0]], "rejected": [asked, answers[1]]}
            file.write(json.dumps(record) + "\n")


def measure(model: str, data: str, workers: int) -> dict[str, Any]:
    """One start, in this process."""
    import numpy as np

    from mlx_simpo import DataConfig
    from mlx_simpo.data import tokenize
    from mlx_simpo.data.cache import tokenized
    from mlx_simpo.data.encode import Encoder
    from mlx_simpo.data.pairs import held_out
    from mlx_simpo.data.sources import open_source
    from mlx_simpo.model.loading import load_only_tokenizer

    tokenize.MOST_WORKERS = workers
    encoder = Encoder(load_only_tokenizer(model), DataConfig())
    encoder.tokenizer.apply_chat_template([{"role": "user", "content": "q"}])  # all is imported
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    idle, started = memory(), time.perf_counter()
    found = tokenized(encoder, open_source(data), lambda total: nullcontext(lambda rows: None))
    seconds = time.perf_counter() - started
    held = held_out(found.pairs.prompts(), 0.05, 42)
    with_split = time.perf_counter() - started
    ready = memory()
    rows = np.random.default_rng(SEED).permutation(len(found.pairs))[:USED].tolist()
    tokens = sum(int(found.pairs[row].chosen.tokens[-1] >= 0) for row in rows)
    return {
        "pairs": len(found.pairs),
        "held_out": int(held.sum()),
        "mean_tokens": {
            name: round(float(found.pairs.numbers(name).mean()), 1)
            for name in ("chosen_score_start", "chosen", "rejected")
        },
        "seconds": round(seconds, 2),
        "seconds_with_split": round(with_split, 2),
        "pairs_per_second": round(len(found.pairs) / seconds),
        "idle_mb": idle,
        "ready_mb": ready,
        f"after_{tokens}_random_pairs_mb": memory(),
        "from_cache": found.note.startswith("tokens are those"),
    }


def memory() -> dict[str, float]:
    """Megabytes: the highest resident set so far, and now the part that is in no mapped file."""
    status = Path("/proc/self/status").read_text()
    fields = {"peak": "VmHWM", "own": "RssAnon"}
    found = {name: re.findall(rf"{field}:\s+(\d+)", status)[0] for name, field in fields.items()}
    return {name: round(int(kibibytes) * 1024 / 1e6, 1) for name, kibibytes in found.items()}


def in_a_child(model: str, data: Path, workers: int, cache: Path) -> dict[str, Any]:
    """`measure` in a new process; with the seconds it took from start to end."""
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
    made_by = provenance(f"python benchmarks/tokenizing.py …/{shown} {pairs}")
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (pairs // 10, pairs):
            data = Path(folder) / f"{count}.jsonl"
            write_pairs(data, count)
            of_count: dict[str, Any] = {"data_mb": round(data.stat().st_size / 1e6, 1)}
            for workers in sorted({1, core_count()}):
                cache = Path(folder) / f"cache-{count}-{workers}"
                of_count[f"{workers} threads"] = in_a_child(model, data, workers, cache)
            files = [path for path in cache.rglob("*") if path.is_file()]
            of_count["kept_mb"] = round(sum(f.stat().st_size for f in files) / 1e6, 1)
            of_count["kept, opened"] = in_a_child(model, data, core_count(), cache)
            runs[f"{count} pairs"] = of_count
    few, many = runs.values()
    growth = {
        name: round((ready(many[name]) - ready(few[name])) * 1e6 / (pairs - pairs // 10), 1)
        for name in few
        if isinstance(few[name], dict)
    }
    record = {"provenance": made_by, "seed": SEED, "peak_growth_bytes_a_pair": growth, **runs}
    print(write_result("tokenizing", record))


def ready(run: dict[str, Any]) -> float:
    """Megabytes at the peak, beyond those of a process that has not begun."""
    return run["ready_mb"]["peak"] - run["idle_mb"]["peak"]


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60_000)
