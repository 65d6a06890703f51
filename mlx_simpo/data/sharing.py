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

from .encode import EncodedPair, Scored

# Positions (tokens through the trunk) that one more forward pass is worth. Measured on the CPU
# (docs/engine.md); an estimate for GPUs, which take some microseconds to start each operation.
PASS_COST_CPU, PASS_COST_GPU = 16, 32
# A micro-batch of so many positions keeps the device busy; more would only take more memory.
ENOUGH_CPU, ENOUGH_GPU = 512, 4096


@dataclass(frozen=True)
class SharedBatch:
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
        """What `logps.shared_logps` takes, in its order."""
        return (self.prefix, self.groups, self.rows, self.targets, self.places, self.lengths)

    @property
    def positions(self) -> int:
        """Tokens that the trunk processes, padding included."""
        return self.prefix.size + sum(tokens.size for tokens, _ in self.groups)


def share(pairs: Sequence[EncodedPair]) -> SharedBatch:
    """The batch of the given pairs; what is left of a longer prompt goes in front of its answers.

    The last token of a sequence predicts nothing and is not run.
    """
    sequences = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    length = min(shared_length(pair) for pair in pairs)
    prefix = np.stack([p.chosen.tokens[:length] for p in pairs])
    places = np.zeros((len(sequences), max(s.scored for s in sequences)), np.int32)
    groups, rows, targets = [], [], []
    positions = scored = padding = 0
    for members in like_lengths([run_length(s) - length for s in sequences]):
        block = continuations([sequences[s] for s in members], length)
        owner = np.array([s % len(pairs) for s in members], np.int32)
        groups.append((mx.array(block), mx.array(owner)))
        for i, s in enumerate(members):
            sequence, first = sequences[s], positions + i * block.shape[1] - length
            rows.append(first + np.arange(sequence.start - 1, run_length(sequence)))
            targets.append(sequence.tokens[sequence.start :])
            places[s, : sequence.scored] = np.arange(scored, scored + sequence.scored)
            scored += sequence.scored
            padding += block.shape[1] - (run_length(sequence) - length)
        positions += block.size
    return SharedBatch(
        mx.array(prefix.astype(np.int32)),
        tuple(groups),
        mx.array(np.concatenate(rows).astype(np.int32)),
        mx.array(np.concatenate(targets).astype(np.int32)),
        mx.array(places),
        mx.array([s.scored for s in sequences], mx.int32),
        padding,
    )


def plan_shared(
    pairs: Sequence[EncodedPair], batch_size: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Places in ``pairs``, as the micro-batches in which they cost least.

    Pairs in the order of their prefixes' lengths join the micro-batch before them where that is
    cheaper than one of their own, up to ``batch_size`` pairs and ``max_tokens`` positions, and no
    further than keeps the device busy. A pair that has more positions than that runs alone.
    """
    enough = on_device(ENOUGH_CPU, ENOUGH_GPU)
    most = enough if max_tokens is None else min(enough, max_tokens)
    shared = [shared_length(pair) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: (shared[i], pairs[i].length))
    batches: list[list[int]] = []
    last = None  # what the last of them costs
    for i in order:
        alone = cost([pairs[i]], shared[i])
        if last is not None and len(batches[-1]) < batch_size:
            # In this order, the first of a micro-batch has its shortest prefix.
            joined = cost([pairs[j] for j in (*batches[-1], i)], shared[batches[-1][0]])
            if joined.positions <= most and joined.total <= last.total + alone.total:
                batches[-1].append(i)
                last = joined
                continue
        batches.append([i])
        last = alone
    return batches


@dataclass(frozen=True)
class Cost:
    """positions: through the trunk, padding included. passes: forward passes they take."""

    positions: int
    passes: int

    @property
    def total(self) -> int:
        """In positions."""
        return self.positions + pass_cost() * self.passes


def pass_cost() -> int:
    """What a forward pass costs on the default device beside its positions, in positions."""
    return on_device(PASS_COST_CPU, PASS_COST_GPU)


def on_device(cpu: int, gpu: int) -> int:
    """The one of two figures that holds for MLX's default device."""
    return cpu if mx.default_device().type == mx.cpu else gpu


def cost(pairs: Sequence[EncodedPair], length: int) -> Cost:
    """Of pairs that share their first ``length`` tokens, each pair for itself."""
    rests = [run_length(s) - length for p in pairs for s in (p.chosen, p.rejected)]
    groups = like_lengths(rests)
    positions = sum(len(group) * max(rests[s] for s in group) for group in groups)
    return Cost(len(pairs) * length + positions, len(groups) + (length > 0))


def like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups of like length: one joins a group where the padding it needs there costs
    less than a pass of its own."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] - lengths[i] <= pass_cost():
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def shared_length(pair: EncodedPair) -> int:
    """Tokens that both sequences begin with and that only have to be run once.

    It ends before the token whose hidden row predicts the first scored one: of the prefix, nothing
    but keys and values is needed, and its last block stays half undone.
    """
    chosen, rejected = pair.chosen, pair.rejected
    length = min(chosen.start, rejected.start) - 1
    differ = np.flatnonzero(chosen.tokens[:length] != rejected.tokens[:length])
    return int(differ[0]) if len(differ) else length


def run_length(sequence: Scored) -> int:
    """Tokens of a sequence that predict another one."""
    return len(sequence.tokens) - 1


def continuations(sequences: Sequence[Scored], prefix: int) -> np.ndarray:
    """What is run behind the first ``prefix`` tokens: int32 [n, T]."""
    width = max(run_length(s) for s in sequences) - prefix
    block = np.zeros((len(sequences), width), np.int32)
    for row, s in zip(block, sequences, strict=True):
        row[: run_length(s) - prefix] = s.tokens[prefix:-1]
    return block
