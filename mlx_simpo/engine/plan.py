"""A step's pairs → micro-batches that cost least, each engine's way.

A forward pass of its own costs as much as `pass_cost` positions, so sequences share a pass where
the padding, or the prompt tokens that run twice for it, come to less.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..data.encode import EncodedPair, TokenizedSequence

# Rows are padded to a multiple of this, so that a compiled step meets few different shapes.
PAD_MULTIPLE = 16
# Positions (tokens through the trunk) that one more forward pass is worth. Measured on the CPU
# (docs/engine.md); an estimate for GPUs, which take some microseconds to start each operation.
PASS_COST_CPU, PASS_COST_GPU = 16, 32
# A micro-batch of so many positions keeps the device busy; more would only take more memory.
ENOUGH_CPU, ENOUGH_GPU = 512, 4096


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


def plan_shared_prefix(
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


def padded(length: int) -> int:
    """``length`` rounded up to a multiple of PAD_MULTIPLE."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def shared_length(pair: EncodedPair) -> int:
    """Tokens that both sequences begin with and that only have to be run once.

    It ends before the token whose hidden row predicts the first scored one: of the prefix, nothing
    but keys and values is needed, and its last block stays half undone.
    """
    chosen, rejected = pair.chosen, pair.rejected
    length = min(chosen.score_start, rejected.score_start) - 1
    differ = np.flatnonzero(chosen.tokens[:length] != rejected.tokens[:length])
    return int(differ[0]) if len(differ) else length


def run_length(sequence: TokenizedSequence) -> int:
    """Tokens of a sequence that predict another one."""
    return len(sequence.tokens) - 1
