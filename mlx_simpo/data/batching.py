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
        """What `logps.average_logps` takes, in its order."""
        return self.tokens, self.start, self.end


def stack(pairs: Sequence[EncodedPair]) -> PairBatch:
    """The batch of the given pairs. Padding follows the scored tokens, and causal attention never
    looks ahead, so it changes nothing."""
    rows = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    longest = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), padded(longest)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
    return PairBatch(
        mx.array(tokens),
        mx.array([row.start for row in rows], mx.int32),
        mx.array([len(row.tokens) for row in rows], mx.int32),
        tuple(pairs),
    )


def epoch_steps(count: int, step_pairs: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """One epoch of ``count`` pairs: the indices of each optimizer step's pairs, int [n].

    A permutation drawn from (seed, epoch), cut into steps of ``step_pairs``; the last step takes
    what is left. No step depends on the pairs' lengths: only within a step, whose gradient is a
    mean over its pairs in whatever order, are like ones put together (see `Engine.plan`).
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    for first in range(0, count, step_pairs):
        yield order[first : first + step_pairs]


def plan_stacked(
    pairs: Sequence[EncodedPair], batch_size: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Places in ``pairs`` from short to long, as micro-batches of up to ``batch_size`` pairs and
    ``max_tokens`` positions; a pair that has more than that runs alone."""
    batches: list[list[int]] = []
    for place in sorted(range(len(pairs)), key=lambda place: pairs[place].length):
        size = len(batches[-1]) + 1 if batches else batch_size + 1
        positions = 2 * size * padded(pairs[place].length)
        if size > batch_size or (max_tokens is not None and positions > max_tokens):
            batches.append([place])
        else:
            batches[-1].append(place)
    return batches


def padded(length: int) -> int:
    """``length`` rounded up to a multiple of PAD_MULTIPLE."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def steps_per_epoch(pairs: int, step_pairs: int) -> int:
    """Optimizer steps in which every pair is taken once."""
    return -(-pairs // step_pairs)
