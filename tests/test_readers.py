"""Whatever the files hold that come from elsewhere, their readers raise only what they document.

The readers and the valid files are those of `helpers.readers`, which benchmarks/fuzz.py runs for
half an hour, guided by coverage; here each gets a few hundred changed files, the same ones each
time.
"""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import pytest
from helpers.readers import (
    SEPARATOR,
    Reader,
    adapter_seeds,
    change_json,
    checkpoint_seeds,
    config_seeds,
    read_adapter,
    read_checkpoint,
    read_config,
    read_records,
    read_token_cache,
    record_seeds,
    token_cache_seeds,
)
from helpers.tiny import some_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

READERS: dict[str, tuple[Reader, Callable[[Path], list[bytes]]]] = {
    "records": (read_records, lambda folder: record_seeds()),
    "config": (read_config, lambda folder: config_seeds()),
    "adapter": (read_adapter, adapter_seeds),
    "checkpoint": (read_checkpoint, lambda folder: checkpoint_seeds()),
    "token cache": (read_token_cache, token_cache_seeds),
}
# YAML is not JSON: its files are changed byte by byte.
JSON_READERS = [name for name in READERS if name != "config"]
every_reader = pytest.mark.parametrize("name", READERS)
# The same examples each time: a failure of `make test` must not depend on luck.
few = settings(deadline=None, max_examples=150, derandomize=True, database=None)


@cache
def seeds_of(name: str) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return READERS[name][1](Path(folder))


def read(name: str, content: bytes) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return READERS[name][0](content, Path(folder))


@every_reader
def test_valid_files_are_accepted(name: str) -> None:
    """Otherwise what follows would test nothing but the first check of each reader."""
    assert all(read(name, seed) for seed in seeds_of(name))


@pytest.mark.parametrize("name", JSON_READERS)
@few
@given(seed=st.integers(0, 2**32), count=st.integers(1, 3))
def test_changed_values(name: str, seed: int, count: int) -> None:
    random = Random(seed)
    content, separator, rest = random.choice(seeds_of(name)).partition(SEPARATOR)
    for _ in range(count):
        content = change_json(content, random) or content
    read(name, content + separator + rest)


@every_reader
@few
@given(
    index=st.integers(0, 99),
    position=st.floats(0, 1),
    length=st.integers(0, 9),
    inserted=st.binary(max_size=6)
    | st.sampled_from([b'"', b"{", b"\0", b"9" * 400, b"\xed\xa0\x80"]),
)
def test_changed_bytes(
    name: str, index: int, position: float, length: int, inserted: bytes
) -> None:
    seeds = seeds_of(name)
    content = seeds[index % len(seeds)]
    start = round(position * len(content))
    read(name, content[:start] + inserted + content[start + length :])


@every_reader
@few
@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
def test_any_bytes(name: str, content: bytes) -> None:
    read(name, content)


@pytest.mark.parametrize("depth", [100, 400, 480, 495, 900, 985, 1200, 100_000])
@pytest.mark.parametrize("key", ["x", "prompt", "chosen", "tools"])
def test_deeply_nested_records(key: str, depth: int) -> None:
    """As JSON and as JSON in a text: what one function can read, the next one might not."""
    nested = "[" * depth + "]" * depth
    record = json.dumps({k: v for k, v in some_pairs(1)[0].items() if k != key})
    read("records", f'{record[:-1]}, "{key}": {nested}}}'.encode())
    read("records", f'{record[:-1]}, "{key}": "{nested}"}}'.encode())


def test_a_change_of_json_is_a_change() -> None:
    """The tests above need files that are changed and mostly still JSON."""
    seed = seeds_of("checkpoint")[0].partition(SEPARATOR)[0]
    changed = [change_json(seed, Random(n)) for n in range(200)]
    assert sum(c is not None and c != seed for c in changed) > 150
    assert change_json(b"{", Random(0)) is None
