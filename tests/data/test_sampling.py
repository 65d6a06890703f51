"""A sample of records: so many, in their order, the same for a seed, and known to the cache."""

from pathlib import Path

import pytest
from helpers.tiny import some_pairs, tiny_tokenizer, write_jsonl

from mlx_simpo import DataConfig
from mlx_simpo.data.encode import Encoder
from mlx_simpo.data.keys import token_key
from mlx_simpo.data.rows import Source
from mlx_simpo.data.sampling import sample_records
from mlx_simpo.data.sources import open_source


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(str(write_jsonl(tmp_path / "pairs.jsonl", some_pairs(50))))


@pytest.mark.parametrize("size", [1, 7, 49])
def test_so_many_records_in_their_order(size: int, source: Source) -> None:
    sample = sample_records(source, 50, size, seed=3)
    rows = list(sample.rows())
    assert sample.count() == len(rows) == size
    numbers = [row.number for row in rows]
    assert numbers == sorted(set(numbers))
    everything = list(source.rows())
    assert rows == [everything[number] for number in numbers]  # with their lines in the file
    assert list(sample.rows()) == rows
    assert (sample.name, sample.files) == (source.name, source.files)


def test_the_seed_decides_which(source: Source) -> None:
    samples = {
        tuple(row.number for row in sample_records(source, 50, 5, seed).rows())
        for seed in (1, 2, 3, 1)
    }
    assert len(samples) == 3


def test_nothing_is_read_after_the_last_record_of_the_sample(source: Source) -> None:
    read: list[int] = []

    def rows() -> object:
        for row in source.rows():
            read.append(row.number)
            yield row

    counted = Source(source.name, rows, source.count, (), ())  # type: ignore[arg-type]
    last = [row.number for row in sample_records(counted, 50, 3, seed=1).rows()][-1]
    assert read == list(range(last + 1))
    assert last < 49


def test_the_key_of_the_token_cache_covers_the_sample(source: Source) -> None:
    encoder = Encoder(tiny_tokenizer(), DataConfig())
    samples = [sample_records(source, 50, size, seed) for size, seed in ((5, 1), (6, 1), (5, 2))]
    keys = {token_key(encoder, one) for one in (source, *samples)}
    assert len(keys) == 4
    assert token_key(encoder, sample_records(source, 50, 5, 1)) in keys
