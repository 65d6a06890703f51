"""A source's rows → its pairs as tokens in files: encoded on all cores and written as they come.

Encoding takes threads, not processes: three quarters of it is the tokenizer's Rust code, during
which other threads run, and threads need no copy of the tokenizer, no start-up, and nothing of the
script that called. What is in memory does not grow with the number of rows.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from .encode import EncodedPair, Encoder
from .pairs import Quarantined, prompt_text
from .records import InvalidRecordError, parse_pair
from .sources import Row
from .tokens import TokenWriter

# Rows that a thread takes at a time: a tenth of a second's work.
CHUNK = 64
# What Python does between two calls of the tokenizer runs on one core at a time; more threads than
# this would wait for each other.
MOST_WORKERS = 8

# A pair and its prompt's text, or why there is none.
Outcome = tuple[EncodedPair, bytes] | Quarantined


def write_tokens(
    folder: Path,
    encoder: Encoder,
    rows: Iterable[Row],
    advance: Callable[[int], None] = lambda rows: None,
    workers: int | None = None,
) -> tuple[int, list[Quarantined]]:
    """Write the pairs of ``rows`` into ``folder`` (see `tokens`), in the order of the rows.

    Args:
        advance: called with the number of rows done.
        workers: threads; by default one a core. The files are the same whatever it is.

    Returns:
        (pairs written, rows that are no pair or that template or rules refuse).

    Raises:
        SimPOError: the source cannot be read, or cannot be encoded at all.
        OSError: the files cannot be written.
    """
    quarantined: list[Quarantined] = []
    with TokenWriter(folder) as writer:
        for outcomes in encoded_chunks(encoder, rows, workers or usable_workers(encoder.tokenizer)):
            for outcome in outcomes:
                if isinstance(outcome, Quarantined):
                    quarantined.append(outcome)
                else:
                    writer.add(*outcome)
            advance(len(outcomes))
    return writer.pairs, quarantined


def encoded_chunks(encoder: Encoder, rows: Iterable[Row], workers: int) -> Iterator[list[Outcome]]:
    """What became of the rows, in their order, a chunk at a time; a few chunks are under way."""
    chunks = iter(rows)
    with ThreadPoolExecutor(workers, "tokenize") as pool:
        waiting: deque[Future[list[Outcome]]] = deque()
        try:
            while chunk := list(islice(chunks, CHUNK)):
                waiting.append(pool.submit(encode_chunk, encoder, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after Ctrl-C, or an error in one chunk, the others are not begun
            pool.shutdown(wait=True, cancel_futures=True)


def encode_chunk(encoder: Encoder, rows: Iterable[Row]) -> list[Outcome]:
    """Some rows in turn: encoded pairs with their prompts, and what is refused."""
    return [encode_row(encoder, row) for row in rows]


def encode_row(encoder: Encoder, row: Row) -> Outcome:
    """The row's pair as tokens, with the text of its prompt; or why it has none."""
    try:
        pair = parse_pair(row, encoder.config.implicit_string_prompts)
        return encoder.encode(pair), prompt_text(pair).encode()
    except InvalidRecordError as refusal:
        return Quarantined(row.source, *refusal.args)


def usable_workers(tokenizer: Any) -> int:
    """Threads that help: one a core for a tokenizer in Rust, one for a tokenizer in Python."""
    if not getattr(tokenizer, "is_fast", False):
        return 1
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)
