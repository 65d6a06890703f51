"""Divides a step's pairs into the micro-batches that cost least, for either engine.

Costs are counted in positions (tokens through the trunk). A forward pass of its own costs as much
as `Figures.pass_cost` positions, so sequences share a pass where the padding, or the prompt tokens
that run twice for it, cost less than that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..data.encode import EncodedPair, TokenizedSequence
from .figures import Figures

# Stacked sequences are padded to a multiple of this, so that a compiled step meets few shapes.
PAD_MULTIPLE = 16


def plan_stacked(
    pairs: Sequence[EncodedPair], batch_size: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Divide pairs into stacked micro-batches, from short to long.

    Args:
        batch_size: pairs per micro-batch, at most.
        max_tokens: positions per micro-batch, at most; a pair that has more runs alone.

    Returns:
        Indices into ``pairs``, per micro-batch.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(pairs)), key=lambda i: pairs[i].length):
        size = len(batches[-1]) + 1 if batches else batch_size + 1
        # Pairs come in order of length, so the newest is the longest and sets the width.
        positions = 2 * size * padded_length(pairs[i].length)
        if size > batch_size or (max_tokens is not None and positions > max_tokens):
            batches.append([i])
        else:
            batches[-1].append(i)
    return batches


def plan_shared_prefix(
    pairs: Sequence[EncodedPair],
    batch_size: int,
    max_tokens: int | None = None,
    *,
    figures: Figures,
    extends_prefix: bool = False,
) -> list[list[int]]:
    """Divide pairs into the shared-prefix micro-batches in which they cost least.

    Pairs in the order of their prefixes' lengths join the micro-batch before them where that is
    cheaper than one of their own, as long as it has no more than ``figures.max_positions``.

    Args:
        batch_size: pairs per micro-batch, at most.
        max_tokens: positions per micro-batch, at most; a pair that has more runs alone.
        extends_prefix: see `arrange`.

    Returns:
        Indices into ``pairs``, per micro-batch.
    """
    max_positions, pass_cost = figures.max_positions, figures.pass_cost
    if max_tokens is not None:
        max_positions = min(max_positions, max_tokens)
    lengths = [shared_prefix_length(pair) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: (lengths[i], pairs[i].length))
    batches: list[list[int]] = []
    last_cost = None  # of the last micro-batch
    for i in order:
        cost_alone = cost([pairs[i]], lengths[i], pass_cost, extends_prefix)
        if last_cost is not None and len(batches[-1]) < batch_size:
            # In this order, the first pair of a micro-batch has its shortest prefix.
            members = [pairs[j] for j in (*batches[-1], i)]
            joined = cost(members, lengths[batches[-1][0]], pass_cost, extends_prefix)
            is_cheaper = joined.total <= last_cost.total + cost_alone.total
            if joined.positions <= max_positions and is_cheaper:
                batches[-1].append(i)
                last_cost = joined
                continue
        batches.append([i])
        last_cost = cost_alone
    return batches


@dataclass(frozen=True)
class Cost:
    """What a micro-batch costs.

    positions: tokens through the trunk, padding included.
    passes: forward passes of the trunk. pass_cost: of each, in positions.
    """

    positions: int
    passes: int
    pass_cost: int

    @property
    def total(self) -> int:
        """The total cost, in positions."""
        return self.positions + self.pass_cost * self.passes


def cost(
    pairs: Sequence[EncodedPair], prefix_length: int, pass_cost: int, extends_prefix: bool = False
) -> Cost:
    """Return the cost of one micro-batch of pairs, each of which runs its first ``prefix_length``
    tokens once; extends_prefix: see `arrange`."""
    return arrange(pairs, prefix_length, pass_cost, extends_prefix=extends_prefix).cost


class Arrangement(NamedTuple):
    """How the sequences of B pairs run: s < B is the chosen one of pair s, s ≥ B a rejected one.

    first: those that run in the same pass as their prefix, one of each pair, in the pairs' order;
    empty if the prefixes have a pass of their own. groups: the others that share a pass, in the
    order of their pairs, the second of a pair after all first ones.
    """

    first: list[int]
    groups: list[list[int]]
    cost: Cost


def arrange(
    pairs: Sequence[EncodedPair], prefix_length: int, pass_cost: int, *, extends_prefix: bool
) -> Arrangement:
    """Return how sequences that share their first ``prefix_length`` tokens run at the least cost.

    Args:
        extends_prefix: whether a sequence may run in the same pass as its prefix, which saves a
            pass. The state of the model after the prefix has to be within that after the sequence:
            keys and values are, recurrent states are not.
    """
    suffixes = [input_length(p.chosen) - prefix_length for p in pairs]
    suffixes += [input_length(p.rejected) - prefix_length for p in pairs]
    both = [sorted((s, s + len(pairs)), key=lambda i: suffixes[i]) for s in range(len(pairs))]
    options: list[list[int]] = [[]]
    if extends_prefix and prefix_length:
        options += [[longer for _, longer in both], [shorter for shorter, _ in both]]
    arrangements = []
    for first in options:
        others = [s for s in range(len(suffixes)) if s not in first]
        by_length = group_by_length([suffixes[s] for s in others], pass_cost)
        groups = [_in_order([others[i] for i in group], len(pairs)) for group in by_length]
        width = prefix_length + max((suffixes[s] for s in first), default=0)
        positions = len(pairs) * width
        positions += sum(len(group) * max(suffixes[s] for s in group) for group in groups)
        total = Cost(positions, len(groups) + (prefix_length > 0), pass_cost)
        arrangements.append(Arrangement(first, groups, total))
    return min(arrangements, key=lambda a: (a.cost.total, a.cost.passes))


def _in_order(group: list[int], num_pairs: int) -> list[int]:
    """Return the sequences in the order of their pairs; the second of a pair after all first."""
    return sorted(group, key=lambda s: (s - num_pairs in group, s % num_pairs))


def group_by_length(lengths: Sequence[int], pass_cost: int) -> list[list[int]]:
    """Divide sequences into groups of similar length that run in one pass each.

    A sequence joins a group where the padding that it needs costs less than a pass of its own.

    Args:
        pass_cost: of one more pass, in positions.

    Returns:
        Indices into ``lengths``, per group; the longest sequence of each group first.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] - lengths[i] <= pass_cost:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def padded_length(length: int) -> int:
    """Round ``length`` up to a multiple of PAD_MULTIPLE."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def shared_prefix_length(pair: EncodedPair) -> int:
    """Return how many tokens both sequences begin with and have to run only once.

    The prefix ends before the token whose hidden state predicts the first scored one: then nothing
    of it is needed but its keys and values, and most of its last layer is never computed.
    """
    chosen, rejected = pair.chosen, pair.rejected
    length = min(chosen.score_start, rejected.score_start) - 1
    differences = np.flatnonzero(chosen.tokens[:length] != rejected.tokens[:length])
    return int(differences[0]) if len(differences) else length


def input_length(sequence: TokenizedSequence) -> int:
    """Return the number of tokens that predict another one: all but the last."""
    return len(sequence.tokens) - 1
