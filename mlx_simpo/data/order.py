"""The order of training: which pairs each epoch takes, and each optimizer step of it.

Nothing is remembered from one epoch to the next: every order is drawn from the seed of the run and
the number of the epoch, so that a resumed run only needs the number of its last step.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# The last numbers of the seeds of what is not the order of an epoch. NumPy fills up a seed with
# zeros: without them, [seed, 0, 0] of the first source would draw what [seed, 0] of the first epoch
# draws.
_SOURCE, _SAMPLE = 1, 2


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """Which pairs each epoch takes, of one source or of several.

    Without weights, every epoch takes every pair. With weights, it takes of each source as many as
    its share, and no pair twice (`pairs_per_epoch`). A source that has more walks through its pairs
    from epoch to epoch, in blocks of an order that is drawn again when all blocks were taken.

    groups: of each source, the indices of its pairs, int [n]; together 0 to N - 1. weights: of each
    source, greater than 0, or None. seed: of the whole run.
    """

    groups: Sequence[np.ndarray]
    weights: Sequence[float] | None
    seed: int

    @property
    def counts(self) -> list[int]:
        """How many pairs of each source an epoch takes."""
        sizes = [len(group) for group in self.groups]
        return sizes if self.weights is None else pairs_per_epoch(sizes, self.weights)

    @property
    def num_pairs(self) -> int:
        """How many pairs an epoch takes."""
        return sum(self.counts)

    def epoch(self, number: int) -> np.ndarray:
        """Return the pair indices of an epoch in the order of training, int [n].

        Args:
            number: of the epoch, from 0.
        """
        random = np.random.default_rng([self.seed, number])
        if self.weights is None:
            return random.permutation(self.num_pairs)
        blocks = [self._block(source, n, number) for source, n in enumerate(self.counts)]
        return random.permutation(np.concatenate(blocks))

    def _block(self, source: int, count: int, number: int) -> np.ndarray:
        """Return the ``count`` pairs of one source that an epoch takes, int [count]."""
        group = self.groups[source]
        turn, block = divmod(number, len(group) // count)
        order = np.random.default_rng([self.seed, source, turn, _SOURCE]).permutation(group)
        return order[block * count : (block + 1) * count]

    def steps(self, step_pairs: int, done: int = 0) -> Iterator[np.ndarray]:
        """Yield the pair indices of each optimizer step, int [n] per step, epoch after epoch.

        Args:
            step_pairs: pairs per optimizer step; the last step of an epoch takes the remainder.
            done: so many steps are omitted at the beginning.
        """
        per_epoch = steps_per_epoch(self.num_pairs, step_pairs)
        if not per_epoch:
            return
        # Sorting by length across steps would bias the gradients of each step. Within a step, whose
        # gradient is a mean over its pairs, the order does not matter: `engine.plan` sorts there.
        first, skipped = divmod(done, per_epoch)
        begin = skipped * step_pairs
        for number in itertools.count(first):
            order = self.epoch(number)
            for start in range(begin, len(order), step_pairs):
                yield order[start : start + step_pairs]
            begin = 0


def pairs_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many pairs each source gives to an epoch, so that the shares are the weights.

    The epoch is as long as the source allows that runs out first: T = min(N_i / p_i) pairs with the
    shares p_i = w_i / Σw, of which source i gives T·p_i, rounded, but at least 1.

    Args:
        sizes: pairs of each source, N_i ≥ 1. weights: w_i > 0.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    length = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [max(1, round(length * share)) for share in shares]


def steps_per_epoch(pairs: int, step_pairs: int) -> int:
    """Return the number of optimizer steps that take each pair once: ⌈pairs / step_pairs⌉."""
    return -(-pairs // step_pairs)


def draw_sample(count: int, size: int, seed: int) -> np.ndarray:
    """Return ``size`` of the numbers 0 to ``count`` - 1, drawn at random, in ascending order."""
    random = np.random.default_rng([seed, 0, 0, _SAMPLE])
    return np.sort(random.choice(count, size, replace=False))
