"""The files equal encoding one pair after the other, whatever the number of threads."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.stored import plain
from helpers.tiny import CHATML, assistant, some_pairs, system, tiny_tokenizer, user, write_jsonl

from mlx_simpo import DataConfig, SimPOError, load_pairs
from mlx_simpo.data import tokenize
from mlx_simpo.data.encode import EncodedPair, Encoder, encode_pairs
from mlx_simpo.data.pairs import Quarantined, prompt_text
from mlx_simpo.data.rows import Row
from mlx_simpo.data.sources import open_source
from mlx_simpo.data.tokenize import CHUNK_ROWS, count_workers, write_tokens
from mlx_simpo.data.tokens import FILES, TokenizedPairs

STRICT = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML
BAD = [
    {"prompt": "q", "chosen": "a", "rejected": "a"},
    {"prompt": "a \ud83d b", "chosen": "x", "rejected": "y"},
    {
        "prompt": [system("s"), user("q")],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    },
    {"prompt": "q", "chosen": "a"},
]


def make_encoder(**config: Any) -> Encoder:
    return Encoder(tiny_tokenizer(), DataConfig(**config))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Five chunks and a bit, with an invalid record in most of them."""
    rows: list[Any] = list(some_pairs(5 * CHUNK_ROWS + 7))
    for index, bad in zip(range(3, len(rows), CHUNK_ROWS), BAD * 2, strict=False):
        rows.insert(index, bad)
    return write_jsonl(tmp_path / "mixed.jsonl", rows)


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": STRICT},
        {"chat_template": STRICT, "max_length": 40, "max_prompt_length": 30},
    ],
)
def test_the_files_equal_encoding_pair_by_pair(
    mixed: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    encoder = make_encoder(**config)
    loaded = load_pairs(str(mixed))
    expected, rejected = encode_pairs(encoder, loaded.pairs)
    count, quarantined = write_tokens(tmp_path, encoder, open_source(str(mixed)).rows())
    written = TokenizedPairs(tmp_path)
    assert count == len(written) == len(expected)
    assert [plain(pair) for pair in written] == [plain(pair) for pair in expected]
    assert sorted(quarantined) == sorted([*loaded.quarantined, *rejected])
    lines = [int(q.source.rpartition(":")[2]) for q in quarantined]
    assert lines == sorted(lines)
    valid = {pair.index for pair in expected}
    texts = [prompt_text(pair).encode() for pair in loaded.pairs if pair.index in valid]
    assert list(written.prompts()) == texts


def test_the_same_bytes_whatever_the_number_of_threads(mixed: Path, tmp_path: Path) -> None:
    encoder, results = make_encoder(chat_template=STRICT), []
    for workers in (1, 2, 5):
        folder = tmp_path / str(workers)
        folder.mkdir()
        _, quarantined = write_tokens(
            folder, encoder, open_source(str(mixed)).rows(), workers=workers
        )
        results.append((quarantined, [(folder / name).read_bytes() for name in FILES]))
    assert results[0] == results[1] == results[2]
    assert len(results[0][0]) == 6


def test_the_settings_of_the_encoder_also_apply_to_parsing(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"chosen": "It is so", "rejected": "It is not"}])
    for implicit in (False, True):
        encoder = make_encoder(implicit_string_prompts=implicit)
        assert write_tokens(tmp_path, encoder, open_source(str(data)).rows())[0] == int(implicit)


def test_progress_counts_every_row(mixed: Path, tmp_path: Path) -> None:
    done: list[int] = []
    write_tokens(tmp_path, make_encoder(), open_source(str(mixed)).rows(), done.append)
    assert sum(done) == len(mixed.read_text().splitlines())
    assert len(done) > 4


def rows_forever() -> Iterator[Row]:
    number = 0
    while True:
        yield Row(number, f"f:{number + 1}", some_pairs(1)[0])
        number += 1


def test_rows_are_read_on_demand(tmp_path: Path) -> None:
    """From an endless source, reading is never far ahead of writing."""
    taken: list[int] = []

    def rows() -> Iterator[Row]:
        for row in rows_forever():
            taken.append(row.number)
            yield row

    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        assert taken[-1] < done + 6 * CHUNK_ROWS
        if done > 20 * CHUNK_ROWS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path, make_encoder(), rows(), advance, workers=2)


def raise_at(error: type[BaseException], at: int, original: Callable) -> Callable:
    def encode(self: Encoder, pair: Any) -> EncodedPair:
        if pair.index == at:
            raise error("here")
        return original(self, pair)

    return encode


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("error", [SimPOError, KeyboardInterrupt, MemoryError])
def test_an_error_in_a_thread_reaches_the_caller_and_stops_the_others(
    error: type[BaseException], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "encode", raise_at(error, 3 * CHUNK_ROWS + 5, Encoder.encode))
    with pytest.raises(error, match="here"):
        write_tokens(tmp_path, make_encoder(), rows_forever(), workers=workers)
    assert [t.name for t in threading.enumerate() if t.name.startswith("tokenize")] == []


def test_a_conversation_without_a_template_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    rows = [
        *some_pairs(2 * CHUNK_ROWS),
        {k: [user("q"), assistant(k)] for k in ("chosen", "rejected")},
    ]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    encoder = Encoder(tiny_tokenizer(None), DataConfig())
    for workers in (1, 2):
        with pytest.raises(SimPOError, match=rf"d\.jsonl:{2 * CHUNK_ROWS + 1} is a conversation"):
            write_tokens(tmp_path, encoder, open_source(str(data)).rows(), workers=workers)


def test_a_row_that_is_not_a_record_is_quarantined() -> None:
    outcome = tokenize.encode_row(make_encoder(), Row(4, "f:5", [1]))
    assert outcome == Quarantined("f:5", "not a JSON object", "it is a list")


def test_one_thread_for_a_tokenizer_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    class InPython:
        is_fast = False

    assert count_workers(InPython()) == count_workers(object()) == 1
    monkeypatch.setattr(tokenize.sys, "platform", "darwin")
    for cores, expected in ((1, 1), (4, 4), (64, 8), (None, 1)):
        monkeypatch.setattr(tokenize.os, "cpu_count", lambda cores=cores: cores)
        assert count_workers(tiny_tokenizer()) == expected


def test_smollm2_in_threads(smollm2_folder: Path, tmp_path: Path) -> None:
    """A real tokenizer, used by several threads at once."""
    from mlx_simpo.model.loading import load_only_tokenizer

    examples = Path(__file__).parents[2] / "examples" / "train.jsonl"
    encoder = Encoder(load_only_tokenizer(str(smollm2_folder)), DataConfig())
    expected, _ = encode_pairs(encoder, load_pairs(str(examples)).pairs)
    assert json.loads(examples.read_text("utf-8").splitlines()[0])
    write_tokens(tmp_path, encoder, open_source(str(examples)).rows(), workers=4)
    assert [plain(pair) for pair in TokenizedPairs(tmp_path)] == [plain(p) for p in expected]
