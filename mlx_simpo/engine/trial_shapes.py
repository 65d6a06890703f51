"""Pairs to try an engine with, and micro-batches to time: how many pairs of which lengths."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..data.encode import EncodedPair, TokenizedSequence
from .plan import input_length, shared_prefix_length

SAMPLED_PAIRS = 512


class Lengths(NamedTuple):
    """Tokens of a run's typical pair: of the prefix of both sequences, and of each after it."""

    prefix: int
    continuation: int

    @property
    def positions(self) -> int:
        """Positions of the pair: the prefix runs once."""
        return self.prefix + 2 * self.continuation


class Shape(NamedTuple):
    """A micro-batch to be timed: so many pairs of these lengths.

    passes: 2, of the prefixes and of all continuations; or 3, if the rejected ones have one token
    less than the chosen ones and a pass of their own.
    """

    pairs: int
    lengths: Lengths
    passes: int = 2

    @property
    def positions(self) -> int:
        """Positions of all pairs."""
        return self.pairs * (self.lengths.positions - (self.passes - 2))


def typical_lengths(pairs: Sequence[EncodedPair]) -> Lengths:
    """Return the lengths of the pairs in which the middle one of all positions lies.

    Half of a run's time is spent in pairs at least as long. They are rounded to powers of √2, so
    that a dataset of a few more pairs has the same.
    """
    chosen = np.unique(np.linspace(0, len(pairs) - 1, SAMPLED_PAIRS).astype(int))
    sample = [pairs[i] for i in chosen.tolist()]
    prefixes = np.array([shared_prefix_length(pair) for pair in sample])
    totals = np.array([input_length(s) for pair in sample for s in (pair.chosen, pair.rejected)])
    continuations = totals.reshape(-1, 2).mean(axis=1) - prefixes
    weights = prefixes + 2 * continuations
    return Lengths(_middle(prefixes, weights), _middle(continuations, weights))


def _middle(values: np.ndarray, weights: np.ndarray) -> int:
    """Return the weighted median, rounded to a power of √2, at least 4."""
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    middle = max(4.0, float(values[order][np.searchsorted(below, below[-1] / 2)]))
    return round(2 ** (round(2 * np.log2(middle)) / 2))


def shape_of(positions: int, lengths: Lengths) -> Shape:
    """Return a micro-batch of about so many positions, in pairs of these lengths; or in one pair
    that is shorter in proportion."""
    if positions >= lengths.positions:
        return Shape(positions // lengths.positions, lengths)
    prefix = max(2, positions * lengths.prefix // lengths.positions)
    return Shape(1, Lengths(prefix, max(2, (positions - prefix) // 2)))


def pairs_of(shape: Shape, vocabulary: int) -> list[EncodedPair]:
    """Return pairs of this shape, of tokens below ``vocabulary`` (2 or more): other ones in each
    pair, of which each sequence's last is scored."""
    prefix, continuation = shape.lengths
    pairs = []
    for number in range(shape.pairs):
        sequences = []
        for kind in (0, 1):
            # The last token is not run. The first one after the prefix differs, where it ends.
            length = prefix + continuation + 1 - (kind if shape.passes == 3 else 0)
            tokens = (np.arange(length, dtype=np.int32) + number) % vocabulary
            tokens[prefix] = kind
            sequences.append(TokenizedSequence(tokens, length - 1))
        pairs.append(EncodedPair(*sequences))
    return pairs


def random_pairs(vocabulary: int, lengths: Sequence[tuple[int, int, int]]) -> list[EncodedPair]:
    """Return pairs of random tokens, the same each time: (prompt, chosen, rejected) tokens of
    each. MLX's random numbers are not touched."""
    random = np.random.default_rng(0)
    pairs = []
    for index, (prompt, *responses) in enumerate(lengths):
        before = random.integers(0, vocabulary, prompt)
        chosen, rejected = (
            np.concatenate([before, random.integers(0, vocabulary, n)]).astype(np.int32)
            for n in responses
        )
        sequences = (TokenizedSequence(chosen, prompt), TokenizedSequence(rejected, prompt))
        pairs.append(EncodedPair(*sequences, index, f"random pair {index + 1}"))
    return pairs
