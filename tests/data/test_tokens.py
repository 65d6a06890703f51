"""Pairs on disk are read back as they were written, and their numbers without their tokens."""

import resource
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers.stored import make_pairs, plain, write_and_open
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.data.tokens import (
    COLUMNS,
    FILES,
    RECORD_DTYPE,
    column,
    largest_token_ids,
    lengths,
)

NUMBER = st.integers(0, 2**31 - 1)
SEQUENCE = st.builds(
    lambda tokens, start: TokenizedSequence(
        np.array(tokens, np.int32), min(start, len(tokens) - 1)
    ),
    st.lists(NUMBER, min_size=2, max_size=6),
    st.integers(1, 5),
)
PAIR = st.builds(EncodedPair, SEQUENCE, SEQUENCE, st.integers(0, 2**62), st.text(), *[NUMBER] * 5)


@given(st.lists(st.tuples(PAIR, st.binary(max_size=9)), max_size=5))
@settings(deadline=None, max_examples=60)
def test_pairs_are_read_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, content: list[tuple[EncodedPair, bytes]]
) -> None:
    pairs, prompts = [pair for pair, _ in content], [prompt for _, prompt in content]
    stored = write_and_open(tmp_path_factory.mktemp("tokens") / "a", pairs, prompts)
    assert len(stored) == len(pairs)
    assert [plain(pair) for pair in stored] == [plain(pair) for pair in pairs]
    assert list(stored.prompts()) == prompts
    for name in COLUMNS:
        assert stored.column(name).tolist() == [COLUMNS[name](pair) for pair in pairs]
        assert column(stored, name).tolist() == column(pairs, name).tolist()
    assert lengths(stored).tolist() == [pair.length for pair in pairs]
    largest = [max(*p.chosen.tokens, *p.rejected.tokens) for p in pairs]
    assert largest_token_ids(stored).tolist() == largest_token_ids(pairs).tolist() == largest
    for pair in stored:
        assert pair.chosen.tokens.dtype == pair.rejected.tokens.dtype == np.int32


def test_a_source_need_not_be_valid_unicode(tmp_path: Path) -> None:
    (pair,) = make_pairs(1)
    odd = EncodedPair(pair.chosen, pair.rejected, 0, "p\udcff.jsonl:1")
    assert write_and_open(tmp_path / "a", [odd], [b"q"])[0].source == "p\udcff.jsonl:1"


def test_a_selection_is_a_sequence_like_the_whole(tmp_path: Path) -> None:
    pairs = make_pairs(9)
    stored = write_and_open(tmp_path / "a", pairs, [b"q%d" % i for i in range(9)])
    selection = stored.take(np.array([7, 2, 2, 5]))
    assert [pair.index for pair in selection] == [7, 2, 2, 5]
    assert [pair.index for pair in selection.take(np.array([3, 0]))] == [5, 7]
    assert largest_token_ids(selection).tolist() == [4, 4, 4, 6]
    assert selection.column("chosen").tolist() == [
        len(pairs[i].chosen.tokens) for i in (7, 2, 2, 5)
    ]
    assert list(selection.prompts()) == [b"q7", b"q2", b"q2", b"q5"]
    assert [pair.index for pair in stored[6:]] == [6, 7, 8]
    assert [pair.index for pair in selection[::-2]] == [5, 2]
    assert (stored[-1].index, selection[-1].index) == (8, 5)
    assert stored[np.int64(4)].index == 4  # type: ignore[call-overload]
    assert not stored.take(np.array([], np.int64))
    for sequence in (stored, selection):
        with pytest.raises(IndexError):
            sequence[len(sequence)]


def test_tokens_cannot_be_changed_by_accident(tmp_path: Path) -> None:
    stored = write_and_open(tmp_path / "a", make_pairs(1), [b""])
    with pytest.raises(ValueError, match="read-only"):
        stored[0].chosen.tokens[0] = 1


def test_the_files_may_be_renamed_and_deleted_while_in_use(tmp_path: Path) -> None:
    pairs = make_pairs(50)
    stored = write_and_open(tmp_path / "a", pairs, [b"q"] * 50)
    (tmp_path / "a").rename(tmp_path / "b")
    shutil.rmtree(tmp_path / "b")
    assert [plain(pair) for pair in stored] == [plain(pair) for pair in pairs]
    assert list(stored.prompts()) == [b"q"] * 50


def test_slices_stay_valid_when_memory_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_simpo.data.tokens.READS_BEFORE_RELEASE", 3)
    prompts, pairs = [b"%d" % i * 5000 for i in range(10)], make_pairs(10)
    stored = write_and_open(tmp_path / "a", pairs, prompts)
    assert list(stored.prompts()) == prompts
    assert [plain(pair) for pair in list(stored)] == [plain(pair) for pair in pairs]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_all_pairs_takes_no_memory(tmp_path: Path) -> None:
    """160 MB of tokens; the resident set includes the pages of mapped files."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    sequence = TokenizedSequence(np.arange(10_000, dtype=np.int32), 1)
    pair = EncodedPair(sequence, sequence)
    stored = write_and_open(tmp_path / "a", [pair] * 2000, [b"q"] * 2000)
    before, highest = resident(), 0
    for read in stored:
        assert read.chosen.tokens[-1] == read.rejected.tokens[-1] == 9999
        assert read.chosen.tokens.sum() == 49_995_000
        highest = max(highest, resident())
    assert highest - before < 60e6


def test_memory_per_pair_is_that_of_its_index(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        stored = write_and_open(
            tmp_path / "a", make_pairs(4000), [b"a prompt of some length"] * 4000
        )
        half = stored.take(np.arange(0, 4000, 2))
        assert int(lengths(half).max()) == 8
        allocated, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The list that was written is freed; an index in `half` takes 8 bytes, all else is in files.
    assert allocated < 4000 * 20
    assert RECORD_DTYPE.itemsize <= 80
    assert {path.name for path in (tmp_path / "a").iterdir()} == set(FILES)
