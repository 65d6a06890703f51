"""Encoded pairs → batches of fixed shape, in a seeded order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .encode import EncodedPair

# Rows are padded to a multiple of this, so that a compiled step meets few different shapes.
PAD_MULTIPLE = 16


@dataclass(frozen=True)
class PairBatch:
    """B pairs as 2B stacked rows: all chosen, then all rejected, in the same order.

    tokens: int32 [2B, T], padded on the right with token 0. start: int32 [2B], index of the first
    scored token. end: int32 [2B], length of the row without padding. pairs: what the rows are.
    """

    tokens: mx.array
    start: mx.array
    end: mx.array
    pairs: tuple[EncodedPair, ...]

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.tokens, self.start, self.end


def stack(pairs: Sequence[EncodedPair]) -> PairBatch:
    """The batch of the given pairs. Padding follows the scored tokens, and causal attention never
    looks ahead, so it changes nothing."""
    rows = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    longest = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
    return PairBatch(
        mx.array(tokens),
        mx.array([row.start for row in rows], mx.int32),
        mx.array([len(row.tokens) for row in rows], mx.int32),
        tuple(pairs),
    )


def epoch_steps(
    pairs: Sequence[EncodedPair], batch_size: int, accumulation: int, seed: int, epoch: int
) -> Iterator[list[list[EncodedPair]]]:
    """One epoch: for each optimizer step, its micro-batches.

    The order is a permutation drawn from (seed, epoch); each step takes the next
    batch_size · accumulation pairs, the last step what is left. Within a step, whose gradient is a
    mean over its pairs in whatever order, pairs of like length share a micro-batch: less padding.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(pairs))
    size = batch_size * accumulation
    for first in range(0, len(order), size):
        step = [pairs[i] for i in order[first : first + size]]
        yield [[step[place] for place in part] for part in length_sorted(step, batch_size)]


def length_sorted(pairs: Sequence[EncodedPair], batch_size: int) -> list[list[int]]:
    """Places in ``pairs`` from short to long, in lists of ``batch_size`` (the last one may be
    smaller)."""
    ordered = sorted(range(len(pairs)), key=lambda place: pairs[place].length)
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def steps_per_epoch(pairs: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps in which every pair is taken once."""
    return -(-pairs // (batch_size * accumulation))
