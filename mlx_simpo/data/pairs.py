"""The pairs of a source, its quarantined records, and the split into training and validation.

A record that breaks a rule is quarantined, with where it is and the reason: it is never trained on
and never dropped silently.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config.sources import SourceConfig
from ..errors import SimPOError
from .memory import memory_source
from .messages import as_messages
from .records import Pair, parse_pair
from .rows import InvalidRecordError
from .sources import open_source


class Quarantined(NamedTuple):
    """A record that is not trained on.

    source: "file:line". reason: one of a few, so that they can be counted. detail: what exactly.
    """

    source: str
    reason: str
    detail: str = ""

    @property
    def location(self) -> str:
        """Where the record is, with the detail of what is wrong."""
        return self.source + (f" ({self.detail})" if self.detail else "")


@dataclass
class PairSet:
    """The valid pairs of a source, and its quarantined records."""

    pairs: list[Pair]
    quarantined: list[Quarantined] = field(default_factory=list)


def check_share(
    num_pairs: int, quarantined: Sequence[Quarantined], max_quarantined: float, name: str
) -> None:
    """Check that a source has valid pairs, and not too large a share of quarantined records.

    Args:
        num_pairs: valid pairs.
        max_quarantined: the largest share of quarantined records that is allowed, from 0 to 1.
        name: of the source, for messages.

    Raises:
        SimPOError: with the reasons, counted, and the first example of each.
    """
    total = num_pairs + len(quarantined)
    if total == 0:
        raise SimPOError(f"{name} is empty; it must hold at least one preference pair")
    if num_pairs and len(quarantined) / total <= max_quarantined:
        return
    first = {q.reason: q for q in reversed(quarantined)}
    summary = "; ".join(
        f"{count} × {reason}, e.g. {first[reason].location}"
        for reason, count in count_reasons(quarantined).items()
    )
    if num_pairs:
        rule = f"more than data.max_quarantined={max_quarantined:g} allows"
        remedy = "Fix these records, or raise data.max_quarantined"
    else:
        rule = "all of them"
        remedy = "A record needs prompt, chosen and rejected (docs/data.md has every accepted form)"
    raise SimPOError(
        f"{name}: {len(quarantined)} of {total} records are quarantined, {rule}: {summary}. "
        f"{remedy}"
    )


def count_reasons(quarantined: Iterable[Quarantined]) -> dict[str, int]:
    """Return how often each reason occurs, the most frequent first."""
    return dict(Counter(q.reason for q in quarantined).most_common())


def load_pairs(
    data: Any,
    split: str | None = None,
    subset: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    implicit_string_prompts: bool = False,
) -> PairSet:
    """Load all preference pairs of a file, folder or Hugging Face dataset, or of rows in memory.

    Args:
        data: a name, see `sources.open_source`; or rows, see `memory.memory_source`.
        split, subset: of what ``data`` names.
        columns: the data's names for ours, as in ``data.columns``: {"prompt": "question"}.
        implicit_string_prompts: accept {chosen, rejected} strings without a prompt; the whole words
            that both start with become the prompt.

    Raises:
        SimPOError: the source cannot be read, or its columns are not recognized. Invalid records do
            not raise: they are in the result's ``quarantined``.
    """
    if isinstance(data, str | Path):
        mapping = None if columns is None else dict(columns)
        source = open_source(SourceConfig(str(data), split=split, subset=subset, columns=mapping))
    elif split is not None or subset is not None:
        raise SimPOError("rows in memory have no split or subset; remove these arguments")
    else:
        source = memory_source(data, columns=columns)
    result = PairSet([])
    for row in source.rows():
        try:
            result.pairs.append(parse_pair(row, implicit_string_prompts))
        except InvalidRecordError as error:
            result.quarantined.append(Quarantined(row.source, *error.args))
    return result


def prompt_text(pair: Pair) -> str:
    """Return the prompt as ASCII JSON, the same for a string and for one user turn with it."""
    messages = as_messages(pair.prompt, "user")
    return json.dumps(messages, sort_keys=True, ensure_ascii=True, default=str)


def held_out(
    prompts: Iterable[bytes], fraction: float, seed: int, max_pairs: int | None = None
) -> np.ndarray:
    """Return which pairs are held out for validation: bool [N].

    Pairs with the same prompt stay together. Which prompts are held out depends on the prompts and
    the seed, not on their order. At least one is held out if there are two or more.

    Args:
        prompts: `prompt_text` of each pair, encoded.
        fraction: of the distinct prompts, from 0 (none) to below 1.
        seed: of the run.
        max_pairs: no further prompt is held out with which there would be more pairs than this.
    """
    hashes = bytearray()
    for text in prompts:  # 16 bytes of a hash: little memory, and no collisions
        hashes += sha256(b"[%d, %b]" % (seed, text)).digest()[:16]
    # Hashes are random numbers: the first ones in sorted order are a random sample of prompts.
    distinct, rank = np.unique(np.frombuffer(hashes, "S16"), return_inverse=True)
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1) if fraction > 0 else 0
    if max_pairs is not None and count > 0:
        pairs = np.bincount(rank)[:count].cumsum()
        count = max(1, int(np.searchsorted(pairs, max_pairs, "right")))
    return rank < count
