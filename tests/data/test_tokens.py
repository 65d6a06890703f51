"""Pairs in files are the pairs that were written, whole or in part, and need no tokens to be
counted."""

import resource
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.data.tokens import (
    FILES,
    NUMBERS,
    RECORD,
    TokenizedPairs,
    TokenWriter,
    column,
    lengths,
)

NUMBER = st.integers(0, 2**31 - 1)
SIDE = st.builds(
    lambda tokens, start: TokenizedSequence(
        np.array(tokens, np.int32), min(start, len(tokens) - 1)
    ),
    st.lists(NUMBER, min_size=2, max_size=6),
    st.integers(1, 5),
)
PAIR = st.builds(EncodedPair, SIDE, SIDE, st.integers(0, 2**62), st.text(), NUMBER, NUMBER, NUMBER)


def written(folder: Path, pairs: list[EncodedPair], prompts: list[bytes]) -> TokenizedPairs:
    folder.mkdir()
    with TokenWriter(folder) as writer:
        for pair, prompt in zip(pairs, prompts, strict=True):
            writer.add(pair, prompt)
    assert writer.pairs == len(pairs)
    return TokenizedPairs(folder)


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


def some(count: int) -> list[EncodedPair]:
    def side(n: int) -> TokenizedSequence:
        return TokenizedSequence(np.arange(n, dtype=np.int32), 1)

    return [EncodedPair(side(3 + i % 5), side(2 + i % 7), i, f"f:{i}") for i in range(count)]


@given(st.lists(st.tuples(PAIR, st.binary(max_size=9)), max_size=5))
@settings(deadline=None, max_examples=60)
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, given: list[tuple[EncodedPair, bytes]]
) -> None:
    pairs, prompts = [pair for pair, _ in given], [prompt for _, prompt in given]
    found = written(tmp_path_factory.mktemp("tokens") / "a", pairs, prompts)
    assert len(found) == len(pairs)
    assert [plain(pair) for pair in found] == [plain(pair) for pair in pairs]
    assert list(found.prompts()) == prompts
    for name in NUMBERS:
        assert found.numbers(name).tolist() == [NUMBERS[name](pair) for pair in pairs]
        assert column(found, name).tolist() == column(pairs, name).tolist()
    assert lengths(found).tolist() == [pair.length for pair in pairs]
    for pair in found:
        assert pair.chosen.tokens.dtype == pair.rejected.tokens.dtype == np.int32


def test_the_source_may_be_no_text(tmp_path: Path) -> None:
    (pair,) = some(1)
    odd = EncodedPair(pair.chosen, pair.rejected, 0, "p\udcff.jsonl:1")
    assert written(tmp_path / "a", [odd], [b"q"])[0].source == "p\udcff.jsonl:1"


def test_a_part_is_a_sequence_like_the_whole(tmp_path: Path) -> None:
    pairs = some(9)
    found = written(tmp_path / "a", pairs, [b"q%d" % i for i in range(9)])
    part = found.take(np.array([7, 2, 2, 5]))
    assert [pair.index for pair in part] == [7, 2, 2, 5]
    assert [pair.index for pair in part.take(np.array([3, 0]))] == [5, 7]
    assert part.numbers("chosen").tolist() == [len(pairs[i].chosen.tokens) for i in (7, 2, 2, 5)]
    assert list(part.prompts()) == [b"q7", b"q2", b"q2", b"q5"]
    assert [pair.index for pair in found[6:]] == [6, 7, 8]
    assert [pair.index for pair in part[::-2]] == [5, 2]
    assert (found[-1].index, part[-1].index, found[np.int64(4)].index) == (8, 5, 4)
    assert not found.take(np.array([], np.int64))
    for sequence in (found, part):
        with pytest.raises(IndexError):
            sequence[len(sequence)]


def test_tokens_cannot_be_changed_by_accident(tmp_path: Path) -> None:
    found = written(tmp_path / "a", some(1), [b""])
    with pytest.raises(ValueError, match="read-only"):
        found[0].chosen.tokens[0] = 1


def test_the_files_may_be_renamed_and_deleted_while_in_use(tmp_path: Path) -> None:
    pairs = some(50)
    found = written(tmp_path / "a", pairs, [b"q"] * 50)
    (tmp_path / "a").rename(tmp_path / "b")
    shutil.rmtree(tmp_path / "b")
    assert [plain(pair) for pair in found] == [plain(pair) for pair in pairs]
    assert list(found.prompts()) == [b"q"] * 50


def test_what_was_read_stays_when_its_memory_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_simpo.data.tokens.READS_KEPT", 3)
    prompts, pairs = [b"%d" % i * 5000 for i in range(10)], some(10)
    found = written(tmp_path / "a", pairs, prompts)
    assert list(found.prompts()) == prompts
    assert [plain(pair) for pair in list(found)] == [plain(pair) for pair in pairs]


@pytest.mark.skipif(sys.platform != "linux", reason="counts what /proc tells")
def test_reading_all_pairs_takes_no_memory(tmp_path: Path) -> None:
    """160 MB of tokens; the resident set in pages counts mapped files as well."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    side = TokenizedSequence(np.arange(10_000, dtype=np.int32), 1)
    pair = EncodedPair(side, side)
    found = written(tmp_path / "a", [pair] * 2000, [b"q"] * 2000)
    before, highest = resident(), 0
    for read in found:
        assert read.chosen.tokens[-1] == read.rejected.tokens[-1] == 9999
        assert read.chosen.tokens.sum() == 49_995_000
        highest = max(highest, resident())
    assert highest - before < 60e6


def test_what_is_in_memory_does_not_grow_with_the_pairs(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        found = written(tmp_path / "a", some(4000), [b"a prompt of some length"] * 4000)
        half = found.take(np.arange(0, 4000, 2))
        assert int(lengths(half).max()) == 8
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The list that was written is gone; a place in `half` has 8 bytes, all else is in files.
    assert held < 4000 * 20
    assert RECORD.itemsize <= 72
    assert {path.name for path in (tmp_path / "a").iterdir()} == set(FILES)
