"""Encoded pairs → prompts that run once, answers of like length on top of them, and the rows that
are scored.

Nothing is padded unless that is cheaper: a forward pass of its own costs as much as `pass_cost`
positions, so sequences share a pass where the padding, or the prompt tokens that run twice for it,
come to less.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..data.encode import EncodedPair, TokenizedSequence
from .plan import like_lengths, run_length, shared_length


@dataclass(frozen=True)
class SharedPrefixBatch:
    """B pairs as one prefix each and 2B continuations; sequence s < B is chosen, s ≥ B rejected.

    prefix: int32 [B, P], the first P tokens of each pair, P ≥ 0. groups: of continuations, (tokens
    int32 [n, T], padded on the right with 0; owner int32 [n], whose prefix they follow). rows:
    int32 [N], the hidden rows to score, counted through all groups. targets: int32 [N], the token
    that each predicts. places: int32 [2B, S], which of them are a sequence's, padded on the right
    with 0; lengths: int32 [2B], how many. padding: positions in ``groups`` that hold no token.
    """

    prefix: mx.array
    groups: tuple[tuple[mx.array, mx.array], ...]
    rows: mx.array
    targets: mx.array
    places: mx.array
    lengths: mx.array
    padding: int

    @property
    def arrays(self) -> tuple:
        """What `logps.shared_prefix_logps` takes, in its order."""
        return (self.prefix, self.groups, self.rows, self.targets, self.places, self.lengths)

    @property
    def positions(self) -> int:
        """Tokens that the trunk processes, padding included."""
        return self.prefix.size + sum(tokens.size for tokens, _ in self.groups)


def collate_shared(pairs: Sequence[EncodedPair]) -> SharedPrefixBatch:
    """The batch of the given pairs; what is left of a longer prompt goes in front of its answers.

    The last token of a sequence predicts nothing and is not run.
    """
    sequences = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    length = min(shared_length(pair) for pair in pairs)
    prefix = np.stack([p.chosen.tokens[:length] for p in pairs])
    places = np.zeros((len(sequences), max(s.num_scored for s in sequences)), np.int32)
    groups, rows, targets = [], [], []
    positions = scored = padding = 0
    for members in like_lengths([run_length(s) - length for s in sequences]):
        block = continuations([sequences[s] for s in members], length)
        owner = np.array([s % len(pairs) for s in members], np.int32)
        groups.append((mx.array(block), mx.array(owner)))
        for i, s in enumerate(members):
            sequence, first = sequences[s], positions + i * block.shape[1] - length
            rows.append(first + np.arange(sequence.score_start - 1, run_length(sequence)))
            targets.append(sequence.tokens[sequence.score_start :])
            places[s, : sequence.num_scored] = np.arange(scored, scored + sequence.num_scored)
            scored += sequence.num_scored
            padding += block.shape[1] - (run_length(sequence) - length)
        positions += block.size
    return SharedPrefixBatch(
        mx.array(prefix.astype(np.int32)),
        tuple(groups),
        mx.array(np.concatenate(rows).astype(np.int32)),
        mx.array(np.concatenate(targets).astype(np.int32)),
        mx.array(places),
        mx.array([s.num_scored for s in sequences], mx.int32),
        padding,
    )


def continuations(sequences: Sequence[TokenizedSequence], prefix: int) -> np.ndarray:
    """What is run behind the first ``prefix`` tokens: int32 [n, T]."""
    width = max(run_length(s) for s in sequences) - prefix
    block = np.zeros((len(sequences), width), np.int32)
    for row, s in zip(block, sequences, strict=True):
        row[: run_length(s) - prefix] = s.tokens[prefix:-1]
    return block
