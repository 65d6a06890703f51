"""Encoded pairs → one batch of padded sequences, for the reference engine."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..data.encode import EncodedPair
from .plan import padded_length


@dataclass(frozen=True)
class StackedBatch:
    """B pairs as 2B sequences: all chosen, then all rejected, in the same order.

    tokens: int32 [2B, T], padded on the right with token 0.
    score_start: int32 [2B], index of the first scored token.
    score_end: int32 [2B], length of the sequence without padding.
    pairs: the B pairs.
    """

    tokens: mx.array
    score_start: mx.array
    score_end: mx.array
    pairs: tuple[EncodedPair, ...]

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """The arguments of `reference.average_logps` after the model, in their order."""
        return self.tokens, self.score_start, self.score_end


def collate_stacked(pairs: Sequence[EncodedPair]) -> StackedBatch:
    """Stack and pad the pairs' sequences.

    Padding follows the scored tokens and causal attention never looks ahead, so it changes nothing.
    """
    sequences = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    longest = max(len(s.tokens) for s in sequences)
    tokens = np.zeros((len(sequences), padded_length(longest)), np.int32)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence.tokens)] = sequence.tokens
    return StackedBatch(
        mx.array(tokens),
        mx.array([s.score_start for s in sequences], mx.int32),
        mx.array([len(s.tokens) for s in sequences], mx.int32),
        tuple(pairs),
    )
