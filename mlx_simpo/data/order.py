"""The order of an epoch: which pairs each optimizer step takes."""

from collections.abc import Iterator

import numpy as np


def epoch_steps(count: int, step_pairs: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """One epoch of ``count`` pairs: the indices of each optimizer step's pairs, int [n].

    A permutation drawn from (seed, epoch), cut into steps of ``step_pairs``; the last step takes
    what is left. No step depends on the pairs' lengths: only within a step, whose gradient is a
    mean over its pairs in whatever order, are like ones put together (see `Engine.plan`).
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    for first in range(0, count, step_pairs):
        yield order[first : first + step_pairs]


def steps_per_epoch(pairs: int, step_pairs: int) -> int:
    """Optimizer steps in which every pair is taken once."""
    return -(-pairs // step_pairs)
