"""Shingles: the sets of three words in a row by which prompts are compared, and their sketches."""

from functools import lru_cache

import numpy as np

from .prompt_words import Spans

# The smallest hashes of a prompt's shingles: a random sample of them, the same in equal prompts.
SKETCH_SIZE = 16
NO_HASH = np.uint64(2**64 - 1)  # where a sketch has fewer
# Odd numbers for mixing 64 bits (Stafford's mix13, as in SplitMix64).
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_CHUNK = 2048  # prompts that are hashed at a time, for the memory of it


class ShingleSets:
    """The sets of shingles of texts.

    Attributes:
        sizes: int [N], the number of distinct shingles.
        sketches: uint64 [N, SKETCH_SIZE], the smallest hashes; filled up with NO_HASH.
    """

    def __init__(self, words: np.ndarray, spans: Spans) -> None:
        count = len(spans.starts)
        self.sizes = np.zeros(count, np.int64)
        self.sketches = np.full((count, SKETCH_SIZE), NO_HASH)
        # As many as there are if no shingle is repeated; what is not written takes no memory.
        self._hashes = np.empty(int((spans.ends - spans.starts + 2).sum()), np.uint64)
        filled = 0
        for start in range(0, count, _CHUNK):
            part = spans.take(slice(start, start + _CHUNK))
            hashes, rows = shingles(words, part)
            self.sizes[start : start + _CHUNK] = np.bincount(rows, minlength=len(part.starts))
            rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
            smallest = rank < SKETCH_SIZE
            self.sketches[start + rows[smallest], rank[smallest]] = hashes[smallest]
            self._hashes[filled : filled + len(hashes)] = hashes
            filled += len(hashes)
        self._ends = np.cumsum(self.sizes)
        # A text is compared with several others in a row.
        self._set = lru_cache(maxsize=256)(self._read_set)

    def similarity(self, a: int, b: int) -> float:
        """Return the Jaccard similarity of two texts."""
        return jaccard(self._set(a), self._set(b))

    def share_in(self, row: int, others: "ShingleSets", other: int) -> float:
        """Return how much of a text, from 0 to 1, is in one of other texts."""
        own = self._set(row)
        return len(own & others._set(other)) / len(own)

    def _read_set(self, row: int) -> frozenset[int]:
        end = self._ends[row]
        return frozenset(self._hashes[end - self.sizes[row] : end].tolist())


def similarity(words: np.ndarray, spans: Spans, a: int, b: int) -> float:
    """Return the Jaccard similarity of two of the texts, without remembering anything."""
    one, other = (
        frozenset(shingles(words, spans.take(slice(row, row + 1)))[0].tolist()) for row in (a, b)
    )
    return jaccard(one, other)


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
