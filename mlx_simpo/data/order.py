"""The order of training: which pairs each optimizer step of an epoch takes."""

from collections.abc import Iterator

import numpy as np


def epoch_steps(count: int, step_pairs: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Yield the pair indices of each optimizer step in one epoch, int [n] per step.

    The order is a permutation drawn from (seed, epoch), cut into steps of ``step_pairs``; the last
    step takes the remainder.

    Args:
        count: pairs in the dataset.
        step_pairs: pairs per optimizer step.
        seed: of the whole run.
        epoch: number of the epoch, from 0.
    """
    # Sorting by length across steps would bias the gradients of each step. Within a step, whose
    # gradient is a mean over its pairs, the order does not matter: `engine.plan` sorts there.
    order = np.random.default_rng([seed, epoch]).permutation(count)
    for start in range(0, count, step_pairs):
        yield order[start : start + step_pairs]


def steps_per_epoch(pairs: int, step_pairs: int) -> int:
    """Return the number of optimizer steps that take each pair once: ⌈pairs / step_pairs⌉."""
    return -(-pairs // step_pairs)
