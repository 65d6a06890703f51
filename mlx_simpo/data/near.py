"""Nearly equal prompts among many: candidates from small sketches, verified by what both contain.

Two prompts are near duplicates if the Jaccard similarity of their shingles is at least THRESHOLD,
and that of their last turns is, too. Of a prompt with a preamble that several prompts share
(`preambles`), the rest has to be in the other prompt to the same degree.

An edit within a text changes three shingles, and the ends of the text count as words: one word may
differ in a prompt of 25 words, none in one of 10. "What is 7 times 8?" is not "What is 7 times 9?".
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .preambles import bodies
from .prompt_words import PromptWords, Spans
from .shingles import NO_HASH, NUM_KEYS, NUM_RANDOM, ShingleSets, jaccard, shingle_set

THRESHOLD = 0.8
# Two prompts are candidates if they share a key (see `shingles`) and this part of their sketches.
# At a similarity of 0.8, a pair is missed with a probability of 3e-5 for its sketches, and less
# than 0.2^8 for its keys; the more similar, the less.
MIN_SHARED = 6 / 16
# Bounds on what one prompt costs where hundreds are nearly equal: others with one key, those of the
# most similar size; and candidates that are verified, those that share most first.
MAX_NEIGHBOURS = 16
MAX_VERIFIED = 8
_CHUNK = 2048  # prompts whose candidates are in memory at a time
_SIZE_BITS = np.uint64(16)


class Match(NamedTuple):
    """A prompt and another one like it, by their indices.

    similarity: from THRESHOLD to 1. is_same: they are equal after normalization.
    """

    query: int
    other: int
    similarity: float
    is_same: bool = False


def near_matches(
    prompts: PromptWords, queries: np.ndarray, others: np.ndarray | None = None
) -> list[Match]:
    """Return for each query that has a near duplicate one of them, in the order of the queries.

    Args:
        queries: indices of prompts that differ from each other after normalization.
        others: indices of prompts that differ from these; None: each query is compared with the
            queries before it.
    """
    everything = queries if others is None else np.concatenate([queries, others])
    compare = _Comparison(prompts, everything)
    result, previous, verified = [], -1, 0
    for query, other in _candidates(compare.sets, len(queries), others is None):
        verified = verified + 1 if query == previous else 1
        previous = query
        if verified <= MAX_VERIFIED and (value := compare.similarity(query, other)) >= THRESHOLD:
            result.append(Match(int(everything[query]), int(everything[other]), value))
            verified = MAX_VERIFIED
    return result


class _Comparison:
    """Some of the prompts, ready to be compared by their row."""

    def __init__(self, prompts: PromptWords, indices: np.ndarray) -> None:
        self._words, whole = prompts.words, prompts.spans.take(indices)
        self.sets = ShingleSets(prompts.words, whole)
        self._body = bodies(prompts, whole)
        self._last = Spans(prompts.last_turns[indices], whole.ends)
        self._has_turns = self._last.starts > whole.starts
        self._has_preamble = (self._body.ends - self._body.starts) < (whole.ends - whole.starts)
        # A prompt is compared with several others in a row.
        self._body_set = lru_cache(maxsize=256)(self._read_body)

    def _read_body(self, row: int) -> frozenset[int]:
        return shingle_set(self._words, self._body, row)

    def similarity(self, a: int, b: int) -> float:
        """Return the least of the similarities that count."""
        value = self.sets.similarity(a, b)
        if value >= THRESHOLD and (self._has_turns[a] or self._has_turns[b]):
            last = (shingle_set(self._words, self._last, row) for row in (a, b))
            value = min(value, jaccard(*last))
        for one, other in ((a, b), (b, a)):
            if value >= THRESHOLD and self._has_preamble[one]:
                body = self._body_set(one)
                share = len(body & self.sets.read(other)) / len(body)
                # The similarity of two sets of one size that share so much.
                value = min(value, share / (2 - share))
        return value


def _candidates(
    sets: ShingleSets, num_queries: int, only_earlier: bool
) -> Iterator[tuple[int, int]]:
    """Yield (query, other) whose sketches have enough in common, those with the most first.

    The first ``num_queries`` rows are the queries; the other rows are the others, or with
    ``only_earlier`` the queries before.
    """
    first = 0 if only_earlier else num_queries
    # Equal keys stand together in the order of their sizes, which take the place of the last bits.
    keys = (sets.keys & ~((np.uint64(1) << _SIZE_BITS) - np.uint64(1))) | np.minimum(
        sets.sizes, 2 ** int(_SIZE_BITS) - 1
    ).astype(np.uint64)[:, None]
    order = np.argsort(keys[first:], axis=None, kind="stable")
    sorted_keys, rows = keys[first:].ravel()[order], first + order // NUM_KEYS
    for start in range(0, num_queries, _CHUNK):
        end = min(start + _CHUNK, num_queries)
        is_key = sets.keys[start:end].ravel() != NO_HASH
        asked = keys[start:end].ravel()[is_key]
        queries = np.repeat(np.arange(start, end), NUM_KEYS)[is_key]
        middle = np.searchsorted(sorted_keys, asked)
        pairs = [np.zeros(0, np.int64)]
        for offset in range(-MAX_NEIGHBOURS, MAX_NEIGHBOURS + 1):
            position = np.clip(middle + offset, 0, len(rows) - 1)
            is_one = (sorted_keys[position] ^ asked) >> _SIZE_BITS == 0
            if only_earlier:
                is_one &= rows[position] < queries
            # One number per pair, so that they are sorted and made unique at once.
            pairs.append(queries[is_one] * len(keys) + rows[position[is_one]])
        a, b = np.divmod(_unique(np.concatenate(pairs)), len(keys))
        smaller, larger = np.sort([sets.sizes[a], sets.sizes[b]], axis=0)
        is_possible = smaller >= THRESHOLD * larger
        yield from _similar(sets, a[is_possible], b[is_possible])


def _similar(
    sets: ShingleSets, queries: np.ndarray, others: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Yield those of the pairs that share enough of their sketches, the most similar first."""
    rare = sets.keys[:, NUM_RANDOM:]
    for start in range(0, len(queries), _CHUNK):
        a, b = queries[start : start + _CHUNK], others[start : start + _CHUNK]
        shared = _count_shared(sets.sketches[a], sets.sketches[b])
        sizes = np.minimum(np.maximum(sets.sizes[a], sets.sizes[b]), sets.sketches.shape[1])
        # Where many share the same instructions, those that share rare words, too, come first.
        rank = shared + sets.sketches.shape[1] * _count_shared(rare[a], rare[b])
        order = np.lexsort((-rank, a))
        order = order[(shared >= MIN_SHARED * sizes)[order]]
        yield from zip(a[order].tolist(), b[order].tolist(), strict=True)


def _count_shared(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return how many hashes of each row, uint64 [n, k] both, are in the other's row: int [n]."""
    is_equal = one[:, :, None] == other[:, None, :]
    return (is_equal & (one != NO_HASH)[:, :, None]).sum((1, 2))


def _unique(values: np.ndarray) -> np.ndarray:
    """Return the distinct values, sorted; for so many, faster than np.unique."""
    values.sort()
    is_new = np.ones(len(values), bool)
    is_new[1:] = values[1:] != values[:-1]
    return values[is_new]
