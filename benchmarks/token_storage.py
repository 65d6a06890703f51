"""Tokens in this package's files against tokens in the Arrow files of `datasets`.

    python benchmarks/token_storage.py MODEL DATA [PAIRS] [TURNS]

DATA, a .jsonl file of {prompt, chosen, rejected} strings, is repeated with a number behind each
prompt until there are PAIRS (60 000) of them; every hundredth record has an empty response and must
be quarantined. MODEL is a model's folder, of which the tokenizer is used. Three ways of storing:

    own          mlx_simpo.data.cache as it is
    arrow        Dataset.from_generator over the same encoding threads, named by the same key
    arrow_map    Dataset.from_generator of the rows, then Dataset.map with one process per core

Each builds and opens its cache in processes of its own, TURNS (3) times in turns, because other
programs may load the machine. What is compared: seconds and CPU seconds to build, and to open
(the key, a hash of every file, quarantined records, the columns of numbers and the prompts for the
held-out share); the peak of memory above that of an idle process; the seconds for 5000 pairs in
random order. Importing `datasets` counts apart: not every run needs it otherwise. All three must
give the same tokens. Writes benchmarks/results/token_storage.json. Linux only, as tokenizing.py.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from provenance import core_count, provenance, write_result
from tokenizing import memory

SEED = 0
RANDOM_READS = 5000
BAD_EVERY = 100
KINDS = ("own", "arrow", "arrow_map")
NUMBERS = (
    "chosen_score_start",
    "rejected_score_start",
    "index",
    "boundary_tokens",
    "cut_prompt",
    "cut_response",
)


class Stored(NamedTuple):
    """A tokenized source as training uses it."""

    pairs: Sequence[Any]
    num_tokens: int  # the sum of columns, so that columns are read
    prompts: Iterable[bytes]
    quarantined: int
    from_cache: bool


def write_data(source: Path, path: Path, count: int) -> None:
    """``count`` records: those of ``source`` in turn, each with a prompt of its own."""
    with source.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            record = dict(records[number % len(records)])
            record["prompt"] += f" ({number})"
            if number % BAD_EVERY == BAD_EVERY - 1:
                record["chosen"] = " "
            file.write(json.dumps(record) + "\n")


# --- the three ways of storing -----------------------------------------------------------------


def load_own(encoder: Any, source: Any, folder: Path) -> Stored:
    """This package's cache, in ``folder``."""
    from mlx_simpo.data.cache import load_or_tokenize

    os.environ["MLX_SIMPO_CACHE"] = str(folder)
    result = load_or_tokenize(encoder, source, lambda total: nullcontext(lambda rows: None))
    pairs = result.pairs
    num_tokens = sum(int(pairs.column(name).sum()) for name in ("chosen", "rejected"))
    is_from_cache = "loaded from the cache" in result.note
    return Stored(pairs, num_tokens, pairs.prompts(), len(result.quarantined), is_from_cache)


def features() -> Any:
    """One row per record. Names of files need not be valid text: they are binary."""
    from datasets import Features, List, Value

    numbers = {name: Value("int64" if name == "index" else "int32") for name in NUMBERS}
    tokens = {name: List(Value("int32")) for name in ("chosen", "rejected")}
    text = {name: Value("binary") for name in ("source", "prompt", "reason", "detail")}
    return Features({**numbers, **tokens, **text})


def to_row(outcome: Any) -> dict[str, Any]:
    """An encoded pair with its prompt, or a quarantined record, as a row of `features`."""
    from mlx_simpo.data.pairs import Quarantined

    if isinstance(outcome, Quarantined):
        source, reason, detail = (text.encode("utf-8", "surrogatepass") for text in outcome)
        none = np.zeros(0, np.int32)
        empty = {**dict.fromkeys(NUMBERS, 0), "chosen": none, "rejected": none, "prompt": b""}
        return {**empty, "source": source, "reason": reason, "detail": detail}
    pair, prompt = outcome
    return {
        "chosen_score_start": pair.chosen.score_start,
        "rejected_score_start": pair.rejected.score_start,
        "index": pair.index,
        "boundary_tokens": pair.boundary_tokens,
        "cut_prompt": pair.cut_prompt,
        "cut_response": pair.cut_response,
        "chosen": pair.chosen.tokens,
        "rejected": pair.rejected.tokens,
        "source": pair.source.encode("utf-8", "surrogatepass"),
        "prompt": prompt,
        "reason": None,
        "detail": None,
    }


def build_arrow(encoder: Any, source: Any, folder: Path, key: str) -> Any:
    """Encoded by threads in this process, written by `datasets` as they come."""
    from datasets import Dataset

    from mlx_simpo.data.tokenize import count_workers, encode_chunks

    def rows() -> Iterator[dict[str, Any]]:
        workers = count_workers(encoder.tokenizer)
        for chunk in encode_chunks(encoder, source.rows(), workers):
            yield from map(to_row, chunk)

    return Dataset.from_generator(rows, features(), cache_dir=str(folder), fingerprint=key)


def build_arrow_map(encoder: Any, source: Any, folder: Path, key: str) -> Any:
    """The rows in a first Arrow file, as JSON; encoded by `Dataset.map` into others."""
    from datasets import Dataset, Features, Value

    from mlx_simpo.data.rows import Row
    from mlx_simpo.data.tokenize import encode_row

    names = ("number", "source", "value")
    kinds = Features(
        {"number": Value("int64"), "source": Value("string"), "value": Value("string")}
    )

    def rows() -> Iterator[dict[str, Any]]:
        for row in source.rows():
            values = (row.number, row.source, json.dumps(row.value))
            yield dict(zip(names, values, strict=True))

    def encode(batch: dict[str, list]) -> dict[str, list]:
        columns = zip(*(batch[name] for name in names), strict=True)
        outcomes = [encode_row(encoder, Row(n, p, json.loads(v))) for n, p, v in columns]
        encoded = [to_row(outcome) for outcome in outcomes]
        return {name: [row[name] for row in encoded] for name in features()}

    raw = Dataset.from_generator(rows, kinds, cache_dir=str(folder), fingerprint=f"raw{key}")
    return raw.map(
        encode,
        batched=True,
        batch_size=64,
        num_proc=core_count(),
        remove_columns=list(names),
        features=features(),
        new_fingerprint=key,
    )


class ArrowPairs(Sequence[Any]):
    """The pairs of an Arrow dataset that are not quarantined, one at a time."""

    def __init__(self, dataset: Any, rows: np.ndarray) -> None:
        columns = [*NUMBERS, "chosen", "rejected", "source"]
        self._dataset = dataset.select_columns(columns).with_format("arrow")
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        from mlx_simpo.data.encode import EncodedPair, TokenizedSequence

        row = self._dataset[int(self._rows[index])]
        start, rejected_start, *numbers = (row[name][0].as_py() for name in NUMBERS)
        chosen, rejected = (row[n].combine_chunks().flatten() for n in ("chosen", "rejected"))
        return EncodedPair(
            TokenizedSequence(chosen.to_numpy(), start),
            TokenizedSequence(rejected.to_numpy(), rejected_start),
            numbers[0],
            row["source"][0].as_py().decode("utf-8", "surrogatepass"),
            *numbers[1:],
        )


def load_arrow(build: Callable[..., Any], encoder: Any, source: Any, folder: Path) -> Stored:
    """Arrow files with what this package's cache checks: a key, hashes, quarantined records."""
    from mlx_simpo.data.keys import file_sha256, token_key

    key = token_key(encoder, source)
    manifest = folder / f"{key}.json"
    dataset = build(encoder, source, folder, key)
    hashes = {file["filename"]: file_sha256(Path(file["filename"])) for file in dataset.cache_files}
    is_from_cache = manifest.exists()
    if is_from_cache:
        assert json.loads(manifest.read_text("utf-8")) == hashes
    manifest.write_text(json.dumps(hashes), encoding="utf-8")
    table = dataset.data
    is_valid = table.column("reason").is_null().to_numpy()
    bad = dataset.select(np.flatnonzero(~is_valid)).select_columns(["source", "reason", "detail"])
    num_tokens = sum(
        int(np.diff(chunk.offsets.to_numpy()).sum())
        for name in ("chosen", "rejected")
        for chunk in table.column(name).chunks
    )
    chunks = table.column("prompt").chunks
    prompts = (prompt for chunk in chunks for prompt in chunk.to_pylist() if prompt)
    pairs = ArrowPairs(dataset, np.flatnonzero(is_valid))
    return Stored(pairs, num_tokens, prompts, len(list(bad)), is_from_cache)


# --- measuring ---------------------------------------------------------------------------------


def measure(kind: str, model: str, data: str, folder: Path) -> dict[str, Any]:
    """Measure one start of a run, in this process."""
    from mlx_simpo import DataConfig
    from mlx_simpo.data.encode import Encoder
    from mlx_simpo.data.pairs import held_out
    from mlx_simpo.data.sources import open_source
    from mlx_simpo.model.loading import load_only_tokenizer

    encoder = Encoder(load_only_tokenizer(model), DataConfig())
    encoder.tokenizer.apply_chat_template([{"role": "user", "content": "q"}])  # loads Jinja
    before_import, import_started = memory(), time.perf_counter()
    if kind != "own":  # not counted as part of the build: a run may need `datasets` anyway
        import datasets

        datasets.disable_progress_bars()
    import_seconds = time.perf_counter() - import_started
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of memory
    idle = memory()
    started, cpu_started = time.perf_counter(), cpu_seconds()
    source = open_source(data)
    if kind == "own":
        stored = load_own(encoder, source, folder)
    else:
        build = build_arrow if kind == "arrow" else build_arrow_map
        stored = load_arrow(build, encoder, source, folder)
    held = held_out(stored.prompts, 0.05, 42)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_started
    ready = memory()
    order = np.random.default_rng(SEED).permutation(len(stored.pairs))[:RANDOM_READS]
    content = sha256()
    started = time.perf_counter()
    for index in order.tolist():
        pair = stored.pairs[index]
        content.update(pair.chosen.tokens.astype("<i4").tobytes())
        content.update(pair.rejected.tokens.astype("<i4").tobytes())
        content.update(f"{pair.index} {pair.source} {pair.chosen.score_start}".encode())
    return {
        "from_cache": stored.from_cache,
        "import_seconds": round(import_seconds, 3),
        "import_mb": round(idle["own"] - before_import["own"], 1),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "peak_mb": round(ready["peak"] - idle["peak"], 1),
        "own_mb": round(ready["own"] - idle["own"], 1),
        "peak_of_a_child_mb": round(
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3, 1
        ),
        "random_reads_seconds": round(time.perf_counter() - started, 3),
        "after_random_reads_mb": round(memory()["peak"] - idle["peak"], 1),
        # All that must be equal whichever way the tokens are stored.
        "content": [
            len(stored.pairs),
            stored.quarantined,
            stored.num_tokens,
            int(held.sum()),
            content.hexdigest(),
        ],
    }


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usage)


def measure_in_child(kind: str, model: str, data: Path, folder: Path) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--measure", kind, model, str(data), str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main(model: str, source: str, pairs: int, turns: int) -> None:
    name = Path(model).name if Path(model).is_absolute() else model
    command = f"python benchmarks/token_storage.py …/{name} …/{Path(source).name} {pairs} {turns}"
    record = {"provenance": provenance(command), "pairs": pairs}
    record["provenance"]["versions"] |= {p: metadata.version(p) for p in ("datasets", "pyarrow")}
    runs: dict[str, list[dict[str, Any]]] = {}
    disk: dict[str, float] = {}
    contents = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data.jsonl"
        write_data(Path(source), data, pairs)
        for turn in range(turns):
            for kind in KINDS:
                folder = Path(scratch) / f"{kind}-{turn}"
                folder.mkdir()
                for step in ("build", "open", "open"):
                    run = measure_in_child(kind, model, data, folder)
                    assert run.pop("from_cache") == (step == "open")
                    contents.append(run.pop("content"))
                    runs.setdefault(f"{kind} {step}", []).append(run)
                    print(turn, kind, step, run, file=sys.stderr, flush=True)
                files = [path for path in folder.rglob("*") if path.is_file()]
                disk[kind] = round(sum(file.stat().st_size for file in files) / 1e6, 1)
    assert all(content == contents[0] for content in contents), contents
    medians = {
        step: {field: statistics.median(run[field] for run in rows) for field in rows[0]}
        for step, rows in runs.items()
    }
    ratios = {
        step: {
            field: round(value / own, 2)
            for field, value in fields.items()
            if (own := medians[f"own {step.split()[1]}"][field])
        }
        for step, fields in medians.items()
        if not step.startswith("own")
    }
    record |= {"content": contents[0], "disk_mb": disk, "medians": medians, "ratios": ratios}
    print(write_result("token_storage", {**record, "runs": runs}))


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(*sys.argv[2:5], Path(sys.argv[5]))))
    else:
        pairs, turns = [int(argument) for argument in sys.argv[3:5]] + [60_000, 3][
            len(sys.argv) - 3 :
        ]
        main(sys.argv[1], sys.argv[2], pairs, turns)
