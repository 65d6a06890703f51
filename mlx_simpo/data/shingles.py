"""Shingles: the sets of three words in a row by which prompts are compared, and their sketches."""

from functools import lru_cache

import numpy as np

from .prompt_words import Spans

# The smallest hashes of a text's shingles: a random sample of them, the same in equal texts.
SKETCH_SIZE = 16
# By what texts are looked up: some of the smallest hashes again, but neither those that no other
# text has nor those that more than MAX_COMMON have; and the rarest. So a text after instructions
# that thousands have is looked up by its own words.
NUM_RANDOM, NUM_RARE = 8, 4
NUM_KEYS = NUM_RANDOM + NUM_RARE
MAX_COMMON = 64
NO_HASH = np.uint64(2**64 - 1)  # where there are fewer
# Odd numbers for mixing 64 bits (Stafford's mix13, as in SplitMix64).
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_CHUNK = 2048  # texts that are hashed at a time, for the memory of it
_MAX_COUNT = 2**16 - 1


class ShingleSets:
    """The sets of shingles of texts.

    Attributes:
        sizes: int [N], the number of distinct shingles.
        sketches: uint64 [N, SKETCH_SIZE], the smallest hashes.
        keys: uint64 [N, NUM_KEYS], hashes by which similar texts are looked up.
    """

    def __init__(self, words: np.ndarray, spans: Spans) -> None:
        count = len(spans.starts)
        self.sizes = np.zeros(count, np.int64)
        self.sketches = np.full((count, SKETCH_SIZE), NO_HASH)
        self.keys = np.full((count, NUM_KEYS), NO_HASH)
        # As many as there are if no shingle is repeated; what is not written takes no memory.
        self._hashes = np.empty(int((spans.ends - spans.starts + 2).sum()), np.uint64)
        counter, filled = _Counter(len(self._hashes)), 0
        for start in range(0, count, _CHUNK):
            hashes, rows = shingles(words, spans.take(slice(start, start + _CHUNK)))
            part = self.sizes[start : start + _CHUNK]
            part += np.bincount(rows, minlength=len(part))
            _first_per_row(self.sketches[start : start + _CHUNK], hashes, rows)
            self._hashes[filled : filled + len(hashes)] = hashes
            filled += len(hashes)
            counter.add(hashes)
        self._ends = np.cumsum(self.sizes)
        for start in range(0, count, _CHUNK):
            self._choose_keys(start, counter)
        # A text is compared with several others in a row.
        self._set = lru_cache(maxsize=256)(self._read_set)

    def _choose_keys(self, start: int, counter: "_Counter") -> None:
        keys, sizes = (values[start : start + _CHUNK] for values in (self.keys, self.sizes))
        end = self._ends[start + len(sizes) - 1]
        hashes = self._hashes[end - int(sizes.sum()) : end]
        rows, counts = np.repeat(np.arange(len(sizes)), sizes), counter.counts(hashes)
        is_shared = counts > 1
        is_random = is_shared & (counts <= MAX_COMMON)
        _first_per_row(keys[:, :NUM_RANDOM], hashes[is_random], rows[is_random])
        hashes, rows, counts = hashes[is_shared], rows[is_shared], counts[is_shared]
        order = np.lexsort((counts, rows))
        _first_per_row(keys[:, NUM_RANDOM:], hashes[order], rows[order])

    def similarity(self, a: int, b: int) -> float:
        """Return the Jaccard similarity of two texts."""
        return jaccard(self._set(a), self._set(b))

    def read(self, row: int) -> frozenset[int]:
        """Return the hashes of a text's shingles."""
        return self._set(row)

    def _read_set(self, row: int) -> frozenset[int]:
        end = self._ends[row]
        return frozenset(self._hashes[end - self.sizes[row] : end].tolist())


class _Counter:
    """Counts in how many texts a shingle is, at least: two of them may share a counter."""

    def __init__(self, num_hashes: int) -> None:
        # Four times as many counters as shingles.
        bits = max(4, (4 * num_hashes).bit_length())
        self._counts, self._shift = np.zeros(2**bits, np.uint16), np.uint64(64 - bits)

    def add(self, hashes: np.ndarray) -> None:
        """Count distinct shingles of some texts."""
        slots, counts = np.unique(hashes >> self._shift, return_counts=True)
        total = self._counts[slots].astype(np.int64) + counts
        self._counts[slots] = np.minimum(total, _MAX_COUNT)

    def counts(self, hashes: np.ndarray) -> np.ndarray:
        """Return the number of texts of each shingle."""
        return self._counts[hashes >> self._shift]


def _first_per_row(result: np.ndarray, hashes: np.ndarray, rows: np.ndarray) -> None:
    """Write the first hashes of each row into the rows of ``result``, as many as it has room for.

    Args:
        hashes, rows: sorted by row.
    """
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    is_first = rank < result.shape[1]
    result[rows[is_first], rank[is_first]] = hashes[is_first]


def shingle_set(words: np.ndarray, spans: Spans, row: int) -> frozenset[int]:
    """Return the hashes of the shingles of one of the texts."""
    return frozenset(shingles(words, spans.take(slice(row, row + 1)))[0].tolist())


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Return what two sets share, as a part of what both have together."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def shingles(words: np.ndarray, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
    """Return (hashes uint64 [n], rows int [n]): the distinct shingles that a word of each span is
    in, sorted by row and hash.

    Those at the ends of a span reach over them: into marks where a turn begins or ends, so that
    every word is in three shingles.
    """
    counts = spans.ends - spans.starts + 2
    rows = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = spans.starts[rows] - 2 + within
    hashes = np.zeros(len(first), np.uint64)
    for shift in range(3):  # order counts: each word is mixed into what precedes it
        hashes = (hashes ^ words[first + shift]) * _MIX[0]
        hashes ^= hashes >> np.uint64(29)
    hashes = hashes * _MIX[1]
    hashes ^= hashes >> np.uint64(32)
    order = np.lexsort((hashes, rows))
    hashes, rows = hashes[order], rows[order]
    is_new = np.ones(len(hashes), bool)
    is_new[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
    return hashes[is_new], rows[is_new]
