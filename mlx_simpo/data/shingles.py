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
        parts = [np.zeros(0, np.uint64)]
        for start in range(0, count, _CHUNK):
            part = spans.take(slice(start, start + _CHUNK))
            hashes, rows = shingles(words, part)
            self.sizes[start : start + _CHUNK] = np.bincount(rows, minlength=len(part.starts))
            rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
            smallest = rank < SKETCH_SIZE
            self.sketches[start + rows[smallest], rank[smallest]] = hashes[smallest]
            parts.append(hashes)
        self._hashes, self._ends = np.concatenate(parts), np.cumsum(self.sizes)
        # A text is compared with several others in a row, which are often alike.
        self._set = lru_cache(maxsize=8192)(self._read_set)

    def similarity(self, a: int, b: int) -> float:
        """Return the Jaccard similarity of two texts."""
        return jaccard(self._set(a), self._set(b))

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
    """Return (hashes uint64 [n], rows int [n]): the distinct shingles of each text, sorted by row
    and hash.

    Two marks stand before the words and two after them, so that every word is in three shingles.
    """
    sizes = spans.ends - spans.starts
    offsets = np.cumsum(sizes + 4) - (sizes + 4)
    padded = np.full(int(sizes.sum()) + 4 * len(sizes), 2**32, np.uint64)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    padded[offsets[rows] + 2 + within] = words[spans.starts[rows] + within]
    for mark in (2, 3):
        padded[offsets + sizes + mark] = 2**32 + 1
    hashes = np.zeros(max(0, len(padded) - 2), np.uint64)
    for shift in range(3):  # order counts: each word is mixed into what precedes it
        hashes = (hashes ^ padded[shift : shift + len(hashes)]) * _MIX[0]
        hashes ^= hashes >> np.uint64(29)
    hashes = hashes * _MIX[1]
    hashes ^= hashes >> np.uint64(32)
    rows = np.repeat(np.arange(len(sizes)), sizes + 4)[: len(hashes)]
    # The last two positions of each text reach into the next one.
    is_inside = np.arange(len(hashes)) < (offsets + sizes + 2)[rows]
    hashes, rows = hashes[is_inside], rows[is_inside]
    order = np.lexsort((hashes, rows))
    hashes, rows = hashes[order], rows[order]
    is_new = np.ones(len(hashes), bool)
    is_new[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
    return hashes[is_new], rows[is_new]
