"""Several sources as one sequence: the same as the list of all their pairs, in any selection."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.stored import make_pairs, plain, write_and_open

from mlx_simpo.data.encode import EncodedPair
from mlx_simpo.data.mixing import Mixture, epoch_order
from mlx_simpo.data.tokens import COLUMNS, column, content_sha256, largest_token_ids, lengths

SIZES = {"chat": 4, "empty": 0, "code": 7, "safety": 1}
SELECTIONS = {
    "whole": np.arange(12),
    "ascending": np.array([0, 3, 4, 9, 11]),
    "any order, repeated": np.array([11, 2, 2, 7, 0]),
    "one source": np.array([5, 4]),
    "none": np.array([], np.int64),
}


class Mixed:
    """A mixture, and the same pairs, prompts and names of sources as lists."""

    def __init__(self, folder: Path) -> None:
        self.pairs: list[EncodedPair] = []
        self.prompts: list[bytes] = []
        self.sources: list[str] = []
        parts = {}
        for name, size in SIZES.items():
            pairs, prompts = (
                make_pairs(size, name),
                [f"{name}{i}".encode() for i in range(size)],
            )
            parts[name] = write_and_open(folder / name, pairs, prompts)
            self.pairs += pairs
            self.prompts += prompts
            self.sources += [name] * size
        self.mixture = Mixture(parts, [1.0, 2.0, 3.0, 4.0])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed(tmp_path_factory.mktemp("mixed"))


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_is_that_of_the_list(name: str, mixed: Mixed) -> None:
    indices = SELECTIONS[name]
    selection, expected = mixed.mixture.take(indices), [mixed.pairs[i] for i in indices]
    assert len(selection) == len(expected)
    assert [plain(pair) for pair in selection] == [plain(pair) for pair in expected]
    assert list(selection.prompts()) == [mixed.prompts[i] for i in indices]
    assert content_sha256(selection) == content_sha256(expected)
    assert largest_token_ids(selection).tolist() == largest_token_ids(expected).tolist()
    assert lengths(selection).tolist() == [pair.length for pair in expected]
    for column_name in COLUMNS:
        actual = column(selection, column_name).tolist()
        assert actual == column(expected, column_name).tolist()
    sources = [mixed.sources[i] for i in indices]
    assert [selection.names[n] for n in selection.source_numbers] == sources
    assert selection.sizes == {source: Counter(sources)[source] for source in SIZES}
    again = selection.take(np.arange(len(selection))[::-1])
    assert [plain(pair) for pair in again] == [plain(pair) for pair in expected[::-1]]


def test_indices_and_slices_are_those_of_a_list(mixed: Mixed) -> None:
    mixture, pairs = mixed.mixture, mixed.pairs
    assert plain(mixture[-1]) == plain(pairs[-1])
    assert plain(mixture[np.int64(4)]) == plain(pairs[4])  # type: ignore[call-overload]
    for part in (slice(2, 9), slice(None, None, -1), slice(9, 2, -3), slice(50, 60)):
        assert [plain(pair) for pair in mixture[part]] == [plain(pair) for pair in pairs[part]]
    for index in (12, -13):
        with pytest.raises(IndexError):
            mixture[index]


def test_only_the_tokens_of_a_selection_are_read(
    mixed: Mixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are held out are not read for the training pairs, too."""
    part = mixed.mixture.take(np.array([4]))
    read: list[int] = []
    for stored in mixed.mixture._parts:
        tokens = stored._tokens.read  # type: ignore[attr-defined]
        monkeypatch.setattr(
            stored._tokens,  # type: ignore[attr-defined]
            "read",
            lambda tokens=tokens: read.append(1) or tokens(),
        )
    part.largest_token_ids()
    assert len(read) == 1


def test_the_order_of_a_mixture_follows_its_weights(mixed: Mixed) -> None:
    selection = mixed.mixture.take(np.array([0, 1, 2, 3, 4, 5, 6, 7, 11]))
    parts = {n: selection._parts[i] for i, n in enumerate(selection.names) if n != "empty"}
    weighted = Mixture(parts, [2.0, 1.0, 1.0])
    order = epoch_order(weighted, 5)
    assert order.counts == [2, 1, 1]
    taken = Counter(weighted.names[n] for n in weighted.source_numbers[order.epoch(0)])
    assert taken == {"chat": 2, "code": 1, "safety": 1}
    # In a selection too, whose sources need not be one after the other.
    shuffled = weighted.take(np.random.default_rng(0).permutation(12))
    for number in range(8):
        epoch = epoch_order(shuffled, 5).epoch(number)
        assert shuffled.take(epoch).sizes == taken


def test_the_order_without_weights_is_that_of_any_sequence(mixed: Mixed) -> None:
    unweighted = Mixture(dict(zip(mixed.mixture.names, mixed.mixture._parts, strict=True)))
    order = epoch_order(unweighted, 3)
    assert order.counts == list(SIZES.values())
    assert order.epoch(1).tolist() == epoch_order(mixed.pairs, 3).epoch(1).tolist()
