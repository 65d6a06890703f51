"""Measure time and memory of comparing prompts: within a dataset, and of two datasets.

    python benchmarks/duplicates.py [PAIRS]

PAIRS (60 000) prompts of UltraFeedback's size are generated in four kinds, each measured in a
process of its own: "documents" are pieces of one text (Python's documentation), so that thousands
overlap; "random" are random words; "templates" are short questions after twenty long instructions;
"clones" are a hundred slightly changed copies of each prompt. Every process plants near duplicates
and counts how many are reported. Writes benchmarks/results/duplicates.json. Linux only, where the
peak of memory can be reset.
"""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from provenance import provenance, write_result

SEED = 0
NUM_VALID = 500
NUM_PLANTED = 200
KINDS = ("documents", "random", "templates", "clones")
WORDS = re.sub(r"[*`:=-]{2,}", " ", " ".join(topics.values())).split()


def make_prompts(kind: str, count: int) -> list[str]:
    """Return prompts of a kind, about 90 words each."""
    rng = random.Random(SEED)

    def passage(size: int, rng: random.Random = rng) -> str:
        first = rng.randrange(len(WORDS) - size)
        return " ".join(WORDS[first : first + size])

    def size() -> int:
        return max(5, round(86 * rng.lognormvariate(-0.18, 0.6)))

    instructions = [passage(80) for _ in range(20)]

    def clone(index: int) -> str:
        words = passage(90, random.Random(f"clone {index // 100}")).split()
        words[rng.randrange(len(words))] = f"changed{index}"
        return " ".join(words)

    make: dict[str, Callable[[int], str]] = {
        "documents": lambda index: passage(size()),
        "random": lambda index: " ".join(rng.choices(WORDS, k=size())),
        "templates": lambda index: (
            f"{instructions[index % 20]} {' '.join(rng.choices(WORDS, k=9))}"
        ),
        "clones": clone,
    }
    return [make[kind](index) for index in range(count)]


def plant(prompts: list[str]) -> set[int]:
    """Replace some of the last prompts by near duplicates of earlier ones; return their indices."""
    rng = random.Random(SEED + 1)
    long = [index for index in range(len(prompts) - NUM_VALID) if len(prompts[index].split()) >= 60]
    planted = range(len(prompts) - NUM_PLANTED, len(prompts))
    for index in planted:
        words = prompts[rng.choice(long)].split()
        words.insert(rng.randrange(len(words)), f"planted{index}")
        prompts[index] = " ".join(words)
    return set(planted)


def measure(kind: str, count: int) -> dict[str, Any]:
    """Measure both searches in this process."""
    import numpy as np

    from mlx_simpo.data.duplicates import find_leaks
    from mlx_simpo.data.near import near_matches
    from mlx_simpo.data.prompt_words import read_words

    prompts = make_prompts(kind, count)
    planted = plant(prompts)
    stored = [json.dumps([{"content": text, "role": "user"}]).encode() for text in prompts]
    del prompts
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of memory
    idle, times, peaks = peak(), {}, {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        times[name] = {
            "seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
        }
        peaks[name] = round(peak() - idle, 1)
        return result

    words = timed("read", lambda: read_words(stored))
    valid = read_words(stored[-NUM_VALID:])
    train = read_words(stored[:-NUM_VALID])
    leaks = timed("between", lambda: find_leaks(train, valid))
    _, distinct = np.unique(words.keys, return_index=True)
    near = timed("within", lambda: near_matches(words, np.sort(distinct)))
    last = len(stored) - NUM_VALID
    return {
        "prompts": len(stored),
        "distinct": len(distinct),
        "words_per_prompt": round(float((words.spans.ends - words.spans.starts).mean()), 1),
        "times": times,
        "peak_mb": peaks,
        "near_within": len(near),
        "near_between": len(leaks),
        "planted": len(planted),
        "planted_within": len(planted & {match.query for match in near}),
        "planted_between": len(planted & {match.query + last for match in leaks}),
    }


def peak() -> float:
    """Return the peak of the resident set in megabytes."""
    status = Path("/proc/self/status").read_text()
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+)", status)
    return int(kibibytes) * 1024 / 1e6


def main(count: int) -> None:
    record: dict[str, Any] = {
        "provenance": provenance(f"python benchmarks/duplicates.py {count}"),
        "seed": SEED,
    }
    for kind in KINDS:
        command = [sys.executable, __file__, "--measure", kind, str(count)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record[kind] = json.loads(ended.stdout.splitlines()[-1])
    print(write_result("duplicates", record))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 60_000)
