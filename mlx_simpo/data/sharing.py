"""Encoded pairs → a shared prefix, continuations of like length, and the rows that are scored."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .batching import PAD_MULTIPLE
from .encode import EncodedPair, Scored

# A group of continuations is closed before padding makes up more than this share of it.
MAX_PADDING = 0.1
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class SharedBatch:
    """B pairs as one prefix each and 2B continuations; sequence s < B is chosen, s ≥ B rejected.

    prefix: int32 [B, P], the first P tokens of each prompt. groups: of continuations, (tokens
    int32 [n, T], padded on the right with 0; owner int32 [n], whose prefix they follow). rows:
    int32 [N], the hidden rows to score, counted through all groups. targets: int32 [N], the token
    that each predicts. weights: float32 [2B, N]: a row's share in a sequence's mean.
    """

    prefix: mx.array
    groups: tuple[tuple[mx.array, mx.array], ...]
    rows: mx.array
    targets: mx.array
    weights: mx.array

    @property
    def arrays(self) -> tuple:
        return (self.prefix, self.groups, self.rows, self.targets, self.weights)


def share(pairs: Sequence[EncodedPair]) -> SharedBatch:
    """The batch of the given pairs.

    The prefix ends before the last token in front of the first answer, whose hidden row is needed,
    and is as long for all pairs: what is left of a prompt goes in front of its two answers.
    """
    sequences = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    first = min(s.start for s in sequences) - 1
    length = first - first % PAD_MULTIPLE
    prefix = np.stack([p.chosen.tokens[:length] for p in pairs]).astype(np.int32)
    groups, rows, targets, shares = [], [], [], []
    before = 0
    for members in like_lengths([len(s.tokens) - length for s in sequences]):
        block, found = continuations([sequences[s] for s in members], length)
        owner = np.array([s % len(pairs) for s in members], np.int32)
        groups.append((mx.array(block), mx.array(owner)))
        for s, (places, tokens) in zip(members, found, strict=True):
            rows.append(places + before)
            targets.append(tokens)
            shares.append((s, len(tokens)))
        before += block.size
    total = sum(n for _, n in shares)
    missing = -total % ROW_MULTIPLE
    weights = np.zeros((len(sequences), total + missing), np.float32)
    at = 0
    for s, n in shares:
        weights[s, at : at + n] = 1.0 / n
        at += n
    fill = np.zeros(missing, np.int32)
    return SharedBatch(
        mx.array(prefix),
        tuple(groups),
        mx.array(np.concatenate([*rows, fill]).astype(np.int32)),
        mx.array(np.concatenate([*targets, fill]).astype(np.int32)),
        mx.array(weights),
    )


def like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups of like length, from short to long."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        group = [*(groups[-1] if groups else []), i]
        positions = len(group) * padded(lengths[i])
        if len(group) > 1 and sum(lengths[j] for j in group) >= (1 - MAX_PADDING) * positions:
            groups[-1] = group
        else:
            groups.append([i])
    return groups


def padded(length: int) -> int:
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def continuations(
    sequences: Sequence[Scored], prefix: int
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """(tokens [n, T] behind the prefix, and of each row: places of the scoring rows in the
    flattened block, the tokens they predict)."""
    width = padded(max(len(s.tokens) for s in sequences) - prefix)
    block = np.zeros((len(sequences), width), np.int32)
    found = []
    for i, s in enumerate(sequences):
        block[i, : len(s.tokens) - prefix] = s.tokens[prefix:]
        places = i * width + np.arange(s.start - 1, len(s.tokens) - 1) - prefix
        found.append((places, s.tokens[s.start :]))
    return block, found
