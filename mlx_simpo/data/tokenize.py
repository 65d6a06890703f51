"""Tokenize the rows of a source into files, on all cores, writing pairs as they are encoded.

Encoding runs in threads, not processes: three quarters of it is the tokenizer's Rust code, during
which other threads run, and threads need no copy of the tokenizer, no start-up time and no import
of the calling script. Memory does not grow with the number of rows.
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
from .records import parse_pair
from .rows import InvalidRecordError, Row
from .tokens import TokenWriter

# Rows per task of a thread: about a tenth of a second's work.
CHUNK_ROWS = 64
# The Python code between calls of the tokenizer runs on one core at a time (the GIL): more threads
# than this would only wait for each other.
MAX_WORKERS = 8

# A pair with the text of its prompt, or the quarantined record.
Outcome = tuple[EncodedPair, bytes] | Quarantined


def write_tokens(
    folder: Path,
    encoder: Encoder,
    rows: Iterable[Row],
    advance: Callable[[int], None] = lambda rows: None,
    workers: int | None = None,
) -> tuple[int, list[Quarantined]]:
    """Encode ``rows`` and write the pairs into ``folder`` (see `tokens`), in the order of the rows.

    Args:
        advance: called with the number of rows done since the last call.
        workers: threads; by default one per core. The files do not depend on it.

    Returns:
        (number of pairs written, quarantined records).

    Raises:
        SimPOError: the source cannot be read, or the encoder does not fit the data at all.
        OSError: the files cannot be written.
    """
    quarantined: list[Quarantined] = []
    with TokenWriter(folder) as writer:
        for outcomes in encode_chunks(encoder, rows, workers or count_workers(encoder.tokenizer)):
            for outcome in outcomes:
                if isinstance(outcome, Quarantined):
                    quarantined.append(outcome)
                else:
                    writer.add(*outcome)
            advance(len(outcomes))
    return writer.num_pairs, quarantined


def encode_chunks(encoder: Encoder, rows: Iterable[Row], workers: int) -> Iterator[list[Outcome]]:
    """Yield the outcomes of the rows in their order, one list per chunk of CHUNK_ROWS."""
    remaining = iter(rows)
    with ThreadPoolExecutor(workers, "tokenize") as pool:
        waiting: deque[Future[list[Outcome]]] = deque()
        try:
            while chunk := list(islice(remaining, CHUNK_ROWS)):
                waiting.append(pool.submit(_encode_chunk, encoder, chunk))
                # A bounded queue: rows are read only as fast as they are encoded.
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after Ctrl-C, or an error in one chunk, no further chunk is started
            pool.shutdown(wait=True, cancel_futures=True)


def _encode_chunk(encoder: Encoder, rows: Iterable[Row]) -> list[Outcome]:
    return [encode_row(encoder, row) for row in rows]


def encode_row(encoder: Encoder, row: Row) -> Outcome:
    """Parse and encode one row; an invalid record is returned as `Quarantined`."""
    try:
        pair = parse_pair(row, encoder.config.implicit_string_prompts)
        return encoder.encode(pair), prompt_text(pair).encode()
    except InvalidRecordError as error:
        return Quarantined(row.source, *error.args)


def count_workers(tokenizer: Any) -> int:
    """Return how many threads help: one per core for a tokenizer in Rust, one for one in Python."""
    if not getattr(tokenizer, "is_fast", False):
        return 1
    # On Linux the process may be restricted to fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)
