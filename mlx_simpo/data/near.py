"""Nearly equal prompts among many: candidates from small sketches, verified by what both contain.

Two prompts are near duplicates if the Jaccard similarity of their shingles is at least THRESHOLD,
and that of their last turns is, too. Of a prompt with a preamble that several prompts share
(`preambles`), the rest has to be in the other prompt to the same degree.

An edit within a text changes three shingles, and the ends of the text count as words: one word may
differ in a prompt of 25 words, none in one of 10. "What is 7 times 8?" is not "What is 7 times 9?".
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .preambles import bodies
from .prompt_words import PromptWords, Spans
from .shingles import NO_HASH, ShingleSets, similarity

THRESHOLD = 0.8
# Two prompts are candidates if they share one of the first hashes of their sketches, and this part
# of the whole sketches. At a similarity of 0.8, a pair is missed with a probability of
# 0.2^8 + 3e-5; the more similar, the less.
BUCKET_HASHES = 8
MIN_SHARED = 6 / 16
# Bounds on what one prompt costs where hundreds are nearly equal: others that share a hash with it,
# and those of them that are verified, the most similar by their sketches first.
MAX_NEIGHBOURS = 16
MAX_VERIFIED = 8
_CHUNK = 2048  # prompts whose candidates are in memory at a time


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
    prompts_to_compare = _Comparison(prompts, everything)
    matches: dict[int, Match] = {}
    for candidates in prompts_to_compare.candidates(len(queries), others is None):
        previous, verified = -1, 0
        for query, other in candidates:
            verified = verified + 1 if query == previous else 1
            previous = query
            if verified > MAX_VERIFIED or query in matches:
                continue
            value = prompts_to_compare.similarity(query, other)
            if value >= THRESHOLD:
                matches[query] = Match(int(everything[query]), int(everything[other]), value)
    return [matches[query] for query in sorted(matches)]


class _Comparison:
    """Some of the prompts, ready to be compared by their row."""

    def __init__(self, prompts: PromptWords, indices: np.ndarray) -> None:
        self._words = prompts.words
        whole = prompts.spans.take(indices)
        body = bodies(prompts, whole)
        last = np.maximum(prompts.last_turns[indices], whole.starts)
        self._last = Spans(last, whole.ends)
        self._has_turns = last > whole.starts
        self._has_preamble = (body.ends - body.starts) < (whole.ends - whole.starts)
        self._whole = self._bodies = ShingleSets(prompts.words, whole)
        if self._has_preamble.any():
            self._bodies = ShingleSets(prompts.words, body)

    def candidates(
        self, num_queries: int, only_earlier: bool
    ) -> Iterator[Iterator[tuple[int, int]]]:
        """Yield the candidates, once or twice: see `_candidates`."""
        yield _candidates(self._bodies, num_queries, only_earlier)
        # Where the preamble itself differs in a word, it is part of the body of one of the two.
        if self._has_preamble.any():
            yield _candidates(self._whole, num_queries, only_earlier, self._has_preamble)

    def similarity(self, a: int, b: int) -> float:
        """Return the least of the similarities that count."""
        value = self._whole.similarity(a, b)
        if value >= THRESHOLD and (self._has_turns[a] or self._has_turns[b]):
            value = min(value, similarity(self._words, self._last, a, b))
        for one, other in ((a, b), (b, a)):
            if value >= THRESHOLD and self._has_preamble[one]:
                share = self._bodies.share_in(one, self._whole, other)
                # The similarity of two sets of one size that share so much.
                value = min(value, share / (2 - share))
        return value


def _candidates(
    sets: ShingleSets,
    num_queries: int,
    only_earlier: bool,
    differ_in: np.ndarray | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield (query, other) whose sketches have enough in common, those with the most first.

    The first ``num_queries`` rows are the queries; the other rows are the others, or with
    ``only_earlier`` the queries before. If there is ``differ_in`` (bool [N]), the two differ in it.
    """
    first = 0 if only_earlier else num_queries
    hashes = sets.sketches[first:, :BUCKET_HASHES].ravel()
    # Stable: among equal hashes, rows stay in their order.
    order = np.argsort(hashes, kind="stable")
    hashes, rows = hashes[order], first + order // BUCKET_HASHES
    positions = np.empty(len(order), np.int64)
    positions[order] = np.arange(len(order))
    for start in range(0, num_queries, _CHUNK):
        asked = sets.sketches[start : min(start + _CHUNK, num_queries), :BUCKET_HASHES].ravel()
        queries = start + np.arange(len(asked)) // BUCKET_HASHES
        low = np.searchsorted(hashes, asked)
        high = np.searchsorted(hashes, asked, side="right")
        if only_earlier:  # the nearest ones before itself
            high = positions[start * BUCKET_HASHES :][: len(asked)]
            low = np.maximum(low, high - MAX_NEIGHBOURS)
        high = np.where(asked == NO_HASH, 0, high)
        # One number per pair, so that they are sorted and made unique at once.
        is_one = [low + offset < high for offset in range(MAX_NEIGHBOURS)]
        pairs = [
            queries[which] * len(sets.sizes) + rows[(low + offset)[which]]
            for offset, which in enumerate(is_one)
        ]
        a, b = np.divmod(_unique(np.concatenate(pairs)), len(sets.sizes))
        smaller, larger = np.sort([sets.sizes[a], sets.sizes[b]], axis=0)
        is_possible = smaller >= THRESHOLD * larger
        if differ_in is not None:
            is_possible &= differ_in[a] != differ_in[b]
        yield from _similar_sketches(sets.sketches, a[is_possible], b[is_possible])


def _similar_sketches(
    sketches: np.ndarray, queries: np.ndarray, others: np.ndarray
) -> Iterator[tuple[int, int]]:
    for start in range(0, len(queries), _CHUNK):
        a, b = queries[start : start + _CHUNK], others[start : start + _CHUNK]
        one, other = sketches[a], sketches[b]
        is_shared = (one[:, :, None] == other[:, None, :]) & (one != NO_HASH)[:, :, None]
        shared = is_shared.sum((1, 2))
        sizes = np.maximum((one != NO_HASH).sum(1), (other != NO_HASH).sum(1))
        order = np.lexsort((-shared, a))
        order = order[(shared >= MIN_SHARED * sizes)[order]]
        yield from zip(a[order].tolist(), b[order].tolist(), strict=True)


def _unique(values: np.ndarray) -> np.ndarray:
    """Return the distinct values, sorted; for so many, faster than np.unique."""
    values.sort()
    is_new = np.ones(len(values), bool)
    is_new[1:] = values[1:] != values[:-1]
    return values[is_new]
