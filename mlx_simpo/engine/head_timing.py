"""How many logits the head is best computed with at once."""

from typing import Any, NamedTuple

import mlx.core as mx

from ..kernels.choice import Implementation
from ..kernels.launch import MOST_ROWS
from .head import Head
from .prefix_cache import empty_caches
from .stopwatch import ABOUT_AS_QUICK, Stopwatch, Work
from .token_logps import chunk_rows, token_logps
from .trunk import run_trunk

CHUNKS = (2**20, 2**22, 2**24)  # logits
PROBE_ROWS = 8  # hidden states of a first run, which tells what more would take


class HeadCosts(NamedTuple):
    """Seconds that a hidden state takes, and the chunk that it takes them in; None: not measured"""

    row_s: float
    chunk_logits: int | None


def time_head(
    watch: Stopwatch, model: Any, head: Head, implementation: Implementation, row_s: float
) -> HeadCosts | None:
    """Time value and gradient of the log-probabilities of one chunk of each size, from small to
    large, as far as the budget goes.

    Args:
        row_s: the most that a hidden state should take.

    Returns:
        Of the smallest chunk that is about as quick as the quickest; None if there is no time.
    """
    output = run_trunk(model, mx.zeros((1, 1), mx.int32), empty_caches(model))  # not evaluated
    vocab_size = head.raw_logits(model, output[0]).shape[-1]
    rows_of = {chunk_rows(MOST_ROWS, vocab_size, c): c for c in reversed(CHUNKS)}
    probed, timings = None, {}
    for rows in (PROBE_ROWS, *reversed(rows_of)):
        hidden = mx.random.normal((rows, output.shape[-1]), key=mx.random.key(0))
        work = _work(model, head, implementation, hidden.astype(output.dtype), CHUNKS[-1])
        measured = watch.measure(work, row_s * rows, is_new=True)
        if measured is None:
            break
        row_s = measured.seconds / rows
        if rows in rows_of:
            timings[rows_of[rows]] = row_s
        else:
            probed = HeadCosts(row_s, None)
    return best_chunk(timings) if timings else probed


def _work(
    model: Any, head: Head, implementation: Implementation, hidden: mx.array, chunk_logits: int
) -> Work:
    targets = mx.zeros((len(hidden),), mx.int32)

    def total(weights: dict, hidden: mx.array) -> mx.array:
        model.update(weights)
        logps = token_logps(
            model,
            head,
            hidden,
            targets,
            training=True,
            implementation=implementation,
            chunk_logits=chunk_logits,
        )
        return logps.sum()

    # Of the weights, too: a head that trains runs again for them.
    gradient = mx.value_and_grad(total, argnums=(0, 1))
    return lambda: gradient(model.trainable_parameters(), hidden)


def best_chunk(row_s: dict[int, float]) -> HeadCosts:
    """Return the smallest chunk that is about as quick as the quickest.

    Args:
        row_s: seconds per hidden state by the logits of a chunk.
    """
    bound = ABOUT_AS_QUICK * min(row_s.values())
    chunk = min(chunk for chunk, seconds in row_s.items() if seconds <= bound)
    return HeadCosts(row_s[chunk], chunk)
