"""However many threads there are, the files hold what encoding one pair after the other gives."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import CHATML, assistant, some_pairs, system, tiny_tokenizer, user, write_jsonl

from mlx_simpo import DataConfig, SimPOError, load_pairs
from mlx_simpo.data import tokenize
from mlx_simpo.data.encode import EncodedPair, Encoder, encode_pairs
from mlx_simpo.data.pairs import Quarantined, prompt_text
from mlx_simpo.data.sources import Row, read_rows
from mlx_simpo.data.tokenize import CHUNK, usable_workers, write_tokens
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


def encoder(**config: Any) -> Encoder:
    return Encoder(tiny_tokenizer(), DataConfig(**config))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Five chunks and a bit, with something unusable in most of them."""
    rows: list[Any] = list(some_pairs(5 * CHUNK + 7))
    for place, bad in zip(range(3, len(rows), CHUNK), BAD * 2, strict=False):
        rows.insert(place, bad)
    return write_jsonl(tmp_path / "mixed.jsonl", rows)


def plain(pair: EncodedPair) -> tuple:
    sides = [(side.tokens.tolist(), side.score_start) for side in (pair.chosen, pair.rejected)]
    return (
        *sides,
        pair.index,
        pair.source,
        pair.boundary_tokens,
        pair.cut_prompt,
        pair.cut_response,
    )


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": STRICT},
        {"chat_template": STRICT, "max_length": 40, "max_prompt_length": 30},
    ],
)
def test_the_files_hold_what_encoding_in_turn_gives(
    mixed: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    coder = encoder(**config)
    loaded = load_pairs(str(mixed))
    expected, refused = encode_pairs(coder, loaded.pairs)
    count, quarantined = write_tokens(tmp_path, coder, read_rows(str(mixed)))
    found = TokenizedPairs(tmp_path)
    assert count == len(found) == len(expected)
    assert [plain(pair) for pair in found] == [plain(pair) for pair in expected]
    assert sorted(quarantined) == sorted([*loaded.quarantined, *refused])
    lines = [int(q.source.rpartition(":")[2]) for q in quarantined]
    assert lines == sorted(lines)
    usable = {pair.index for pair in expected}
    texts = [prompt_text(pair).encode() for pair in loaded.pairs if pair.index in usable]
    assert list(found.prompts()) == texts


def test_the_same_bytes_whatever_the_number_of_threads(mixed: Path, tmp_path: Path) -> None:
    coder, results = encoder(chat_template=STRICT), []
    for workers in (1, 2, 5):
        folder = tmp_path / str(workers)
        folder.mkdir()
        _, quarantined = write_tokens(folder, coder, read_rows(str(mixed)), workers=workers)
        results.append((quarantined, [(folder / name).read_bytes() for name in FILES]))
    assert results[0] == results[1] == results[2]
    assert len(results[0][0]) == 6


def test_the_settings_of_the_encoder_are_those_of_the_records(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"chosen": "It is so", "rejected": "It is not"}])
    for implicit in (False, True):
        coder = encoder(implicit_string_prompts=implicit)
        assert write_tokens(tmp_path, coder, read_rows(str(data)))[0] == int(implicit)


def test_progress_counts_every_row(mixed: Path, tmp_path: Path) -> None:
    done: list[int] = []
    write_tokens(tmp_path, encoder(), read_rows(str(mixed)), done.append)
    assert sum(done) == len(mixed.read_text().splitlines())
    assert len(done) > 4


def rows_forever() -> Iterator[Row]:
    number = 0
    while True:
        yield Row(number, f"f:{number + 1}", some_pairs(1)[0])
        number += 1


def test_rows_are_read_as_they_are_needed(tmp_path: Path) -> None:
    """An endless source: it is never far ahead of what is written."""
    taken: list[int] = []

    def rows() -> Iterator[Row]:
        for row in rows_forever():
            taken.append(row.number)
            yield row

    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        assert taken[-1] < done + 6 * CHUNK
        if done > 20 * CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path, encoder(), rows(), advance, workers=2)


def raised(error: type[BaseException], at: int, honest: Callable) -> Callable:
    def encode(self: Encoder, pair: Any) -> EncodedPair:
        if pair.index == at:
            raise error("here")
        return honest(self, pair)

    return encode


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("error", [SimPOError, KeyboardInterrupt, MemoryError])
def test_an_error_in_a_thread_is_the_callers_and_ends_the_others(
    error: type[BaseException], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "encode", raised(error, 3 * CHUNK + 5, Encoder.encode))
    with pytest.raises(error, match="here"):
        write_tokens(tmp_path, encoder(), rows_forever(), workers=workers)
    assert [t.name for t in threading.enumerate() if t.name.startswith("tokenize")] == []


def test_a_conversation_without_a_template_stops_it_with_its_place(tmp_path: Path) -> None:
    rows = [*some_pairs(2 * CHUNK), {k: [user("q"), assistant(k)] for k in ("chosen", "rejected")}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    coder = Encoder(tiny_tokenizer(None), DataConfig())
    for workers in (1, 2):
        with pytest.raises(SimPOError, match=rf"d\.jsonl:{2 * CHUNK + 1} is a conversation"):
            write_tokens(tmp_path, coder, read_rows(str(data)), workers=workers)


def test_a_row_that_is_no_record_is_left_out() -> None:
    found = tokenize.encode_row(encoder(), Row(4, "f:5", [1]))
    assert found == Quarantined("f:5", "not a JSON object", "a JSON list, not an object")


def test_a_tokenizer_in_python_gains_nothing_from_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class InPython:
        is_fast = False

    assert usable_workers(InPython()) == usable_workers(object()) == 1
    monkeypatch.setattr(tokenize.sys, "platform", "darwin")
    for cores, expected in ((1, 1), (4, 4), (64, 8), (None, 1)):
        monkeypatch.setattr(tokenize.os, "cpu_count", lambda cores=cores: cores)
        assert usable_workers(tiny_tokenizer()) == expected


def test_smollm2_in_threads(smollm2_folder: Path, tmp_path: Path) -> None:
    """A real tokenizer, used by several threads at once."""
    from mlx_simpo.model.loading import load_only_tokenizer

    examples = Path(__file__).parents[2] / "examples" / "train.jsonl"
    coder = Encoder(load_only_tokenizer(str(smollm2_folder)), DataConfig())
    expected, _ = encode_pairs(coder, load_pairs(str(examples)).pairs)
    assert json.loads(examples.read_text("utf-8").splitlines()[0])
    write_tokens(tmp_path, coder, read_rows(str(examples)), workers=4)
    assert [plain(pair) for pair in TokenizedPairs(tmp_path)] == [plain(p) for p in expected]
