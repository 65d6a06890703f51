"""The micro-batch of a run that needs the most memory, found by the lengths of its pairs."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config.simpo_config import SimPOConfig, TrainConfig
from ..data.encode import EncodedPair, TokenizedSequence
from ..data.mixing import epoch_order
from ..data.tokens import COLUMNS, column, lengths
from ..engine.choice import Engine

# How many of a run's first pairs are ranked (17 epochs of 60,000), and how many steps planned.
MAX_RANKED_PAIRS = 2**20
PLANNED_STEPS = 64
# Attention scores grow with the square of the length: a sequence of so many tokens counts twice per
# position. A rough weight: it only decides between micro-batches of about equally many positions.
ATTENTION_TOKENS = 1024


@dataclass(frozen=True)
class LargestMicroBatch:
    """The pairs of a micro-batch, and what is known of it.

    step: number of its optimizer step, from 1. positions: tokens that the trunk processes, padding
    included. is_alone: whether its step has no other micro-batch.
    """

    pairs: list[EncodedPair]
    step: int
    positions: int
    is_alone: bool

    @property
    def longest(self) -> EncodedPair:
        """The pair with the longest sequence."""
        return max(self.pairs, key=lambda pair: pair.length)


def largest_micro_batch(
    pairs: Sequence[EncodedPair], config: SimPOConfig, engine: Engine, steps: int
) -> LargestMicroBatch:
    """Return the largest micro-batch of a run's first ``steps`` optimizer steps.

    Planning every step would take seconds, so the steps are ranked by the lengths of their pairs
    first, and only the ones at the top are divided into micro-batches, as the engine does it (0.2 s
    for 60,000 pairs). What prompts save is not part of the ranking: a micro-batch of another step
    may be larger by a few per cent.

    Args:
        engine: of the run. Its micro-batches are compared by positions and longest sequence.
    """
    size = config.train.step_pairs
    every = epoch_order(pairs, config.seed).steps(size)
    orders = list(itertools.islice(every, min(steps, max(1, MAX_RANKED_PAIRS // size))))
    options = config.train
    ranked = _largest_steps(orders, pairs, options.batch_size)
    by_length = _LengthsOnly(pairs)
    sizes = {step: _plan(by_length, orders[step], engine, options)[0] for step in ranked}
    step = max(sizes, key=sizes.__getitem__)
    # With the tokens: two prompts may differ before the responses begin, and then share less.
    _, largest, count = _plan(pairs, orders[step], engine, options)
    positions = engine.collate(largest).positions
    return LargestMicroBatch(largest, step + 1, positions, is_alone=count == 1)


def _largest_steps(
    orders: list[np.ndarray], pairs: Sequence[EncodedPair], batch_size: int
) -> list[int]:
    """Return the numbers of the steps that may have the largest micro-batch, from 0.

    They have the longest pairs (a long pair runs alone), or the most tokens in as many pairs as
    one micro-batch holds.
    """
    longest, tokens = lengths(pairs), column(pairs, "chosen") + column(pairs, "rejected")
    width = max(map(len, orders))
    # One row per step; the last step of an epoch has fewer pairs, the others of its row are empty.
    table = np.zeros((2, len(orders), width), np.int64)
    for row, order in enumerate(orders):
        table[:, row, : len(order)] = longest[order], tokens[order]
    by_pair = table[0].max(axis=1)
    by_batch = np.sort(table[1], axis=1)[:, -batch_size:].sum(axis=1)
    tops = (np.argsort(-score, kind="stable")[:PLANNED_STEPS] for score in (by_pair, by_batch))
    return sorted(set(np.concatenate(list(tops)).tolist()))


def _plan(
    pairs: Sequence[EncodedPair], order: np.ndarray, engine: Engine, options: TrainConfig
) -> tuple[float, list[EncodedPair], int]:
    """Divide a step into micro-batches; return the size and pairs of the largest, and how many
    there are. A size orders micro-batches by the memory that they need; it is in no unit."""
    members = [pairs[i] for i in order.tolist()]
    plan = engine.plan(members, options.batch_size, options.max_tokens_per_step)
    parts = [[members[i] for i in indices] for indices in plan]
    sizes = [
        engine.collate(part).positions * (1 + max(p.length for p in part) / ATTENTION_TOKENS)
        for part in parts
    ]
    index = int(np.argmax(sizes))
    return sizes[index], parts[index], len(parts)


class _LengthsOnly(Sequence[EncodedPair]):
    """Pairs of the same lengths whose tokens are all 0, so that no token is read from the disk."""

    def __init__(self, pairs: Sequence[EncodedPair]) -> None:
        names = ("chosen", "chosen_score_start", "rejected", "rejected_score_start")
        assert set(names) <= COLUMNS.keys()
        self._rows = np.stack([column(pairs, name) for name in names], axis=1)
        self._zeros = np.zeros(int(self._rows.max()), np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> EncodedPair:  # type: ignore[override]
        chosen, chosen_start, rejected, rejected_start = self._rows[index].tolist()
        return EncodedPair(
            TokenizedSequence(self._zeros[:chosen], chosen_start),
            TokenizedSequence(self._zeros[:rejected], rejected_start),
        )
