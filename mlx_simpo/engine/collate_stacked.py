"""Encoded pairs → batches of fixed shape, in a seeded order."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..data.encode import EncodedPair
from .plan import padded


@dataclass(frozen=True)
class StackedBatch:
    """B pairs as 2B stacked rows: all chosen, then all rejected, in the same order.

    tokens: int32 [2B, T], padded on the right with token 0. score_start: int32 [2B], index of the first
    scored token. score_end: int32 [2B], length of the row without padding. pairs: what the rows are.
    """

    tokens: mx.array
    score_start: mx.array
    score_end: mx.array
    pairs: tuple[EncodedPair, ...]

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """What `logps.average_logps` takes, in its order."""
        return self.tokens, self.score_start, self.score_end


def collate_stacked(pairs: Sequence[EncodedPair]) -> StackedBatch:
    """The batch of the given pairs. Padding follows the scored tokens, and causal attention never
    looks ahead, so it changes nothing."""
    rows = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    longest = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), padded(longest)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
    return StackedBatch(
        mx.array(tokens),
        mx.array([row.score_start for row in rows], mx.int32),
        mx.array([len(row.tokens) for row in rows], mx.int32),
        tuple(pairs),
    )
