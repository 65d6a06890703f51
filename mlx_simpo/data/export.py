"""Pairs of any source as clean JSON Lines: {prompt, chosen, rejected}, and tools if there are."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .pairs import Quarantined
from .records import Pair, parse_pair
from .rows import InvalidRecordError, Source


@dataclass
class Export:
    """What `export_pairs` has done: the number of pairs written, and the quarantined records."""

    num_pairs: int = 0
    quarantined: list[Quarantined] = field(default_factory=list)


def export_pairs(
    source: Source, write: Callable[[bytes], Any], *, implicit_string_prompts: bool = False
) -> Export:
    """Write the pairs of a source as JSON Lines that give the same tokens.

    Args:
        write: called with each line and its line break. implicit_string_prompts: see `load_pairs`.

    Raises:
        SimPOError: the source cannot be read. Invalid records do not raise: they are in the
            result's ``quarantined``.
    """
    result = Export()
    for row in source.rows():
        try:
            pair = parse_pair(row, implicit_string_prompts)
        except InvalidRecordError as error:
            result.quarantined.append(Quarantined(row.source, *error.args))
            continue
        write(json_line(pair))
        result.num_pairs += 1
    return result


def json_line(pair: Pair) -> bytes:
    """Return a pair as a line of JSON in UTF-8."""
    names = ("prompt", "chosen", "rejected", "tools")
    record = {name: getattr(pair, name) for name in names if getattr(pair, name) is not None}
    text = json.dumps(record, ensure_ascii=False, default=str)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8
        return f"{json.dumps(record, default=str)}\n".encode()
