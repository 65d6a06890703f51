"""The pairs of a source, what is left out of it and why, and the split into two parts.

A row that breaks a rule is quarantined with its place and the reason: never trained on, never
silently dropped.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from ..errors import SimPOError
from .records import InvalidRecordError, Pair, as_messages, parse_pair
from .sources import read_rows


class Quarantined(NamedTuple):
    """A row that is not used, where it is, and why. ``reason`` is one of few, to be counted."""

    source: str
    reason: str
    detail: str = ""

    @property
    def place(self) -> str:
        """Where the record stands, with the detail of what is wrong."""
        return self.source + (f" ({self.detail})" if self.detail else "")


@dataclass
class PairSet:
    """The usable pairs of a source, and the rows that are not."""

    pairs: list[Pair]
    quarantined: list[Quarantined] = field(default_factory=list)


def check_share(
    usable: int, quarantined: Sequence[Quarantined], max_quarantined: float, name: str
) -> None:
    """Refuse a source without a usable record, or with too many unusable ones.

    Raises:
        SimPOError: with the reasons, counted, and the first example of each.
    """
    total = usable + len(quarantined)
    if total == 0:
        raise SimPOError(f"{name} is empty; it must hold at least one preference pair")
    if usable and len(quarantined) / total <= max_quarantined:
        return
    first = {q.reason: q for q in reversed(quarantined)}
    summary = "; ".join(
        f"{count} × {reason}, e.g. {first[reason].place}"
        for reason, count in count_reasons(quarantined).items()
    )
    rule = f"more than data.max_quarantined={max_quarantined:g} allows" if usable else "all of them"
    raise SimPOError(
        f"{name}: {len(quarantined)} of {total} records are unusable, {rule}: {summary}"
    )


def count_reasons(quarantined: Iterable[Quarantined]) -> dict[str, int]:
    """How often each reason stands, the most frequent first."""
    return dict(Counter(q.reason for q in quarantined).most_common())


def load_pairs(
    name: str,
    split: str | None = None,
    subset: str | None = None,
    *,
    implicit_string_prompts: bool = False,
) -> PairSet:
    """All preference pairs of a file, folder or Hugging Face data set.

    Args:
        name, split, subset: see `sources.read_rows`.
        implicit_string_prompts: accept {chosen, rejected} strings without a prompt; what they begin
            with, up to the last white space, becomes the prompt.

    Raises:
        SimPOError: the source cannot be read. Rows that cannot be used raise nothing: they are in
            the result's ``quarantined``.
    """
    found = PairSet([])
    for row in read_rows(name, split, subset):
        try:
            found.pairs.append(parse_pair(row, implicit_string_prompts))
        except InvalidRecordError as refusal:
            found.quarantined.append(Quarantined(row.source, *refusal.args))
    return found


def prompt_text(pair: Pair) -> str:
    """The prompt as JSON in ASCII, the same for text and for one user turn with that text."""
    asked = as_messages(pair.prompt, "user")
    return json.dumps(asked, sort_keys=True, ensure_ascii=True, default=str)


def held_out(prompts: Iterable[bytes], fraction: float, seed: int) -> np.ndarray:
    """Which pairs with these prompts (of `prompt_text`) are held out: bool [N].

    Pairs with the same prompt stay on one side, and which prompts are held out depends on the
    prompts and the seed, not on their order. At least one prompt is held out if there are two.
    """
    digests = bytearray()
    for text in prompts:  # 16 bytes: short in memory, and no two prompts collide
        digests += sha256(b"[%d, %b]" % (seed, text)).digest()[:16]
    found, group = np.unique(np.frombuffer(digests, "S16"), return_inverse=True)
    held = min(max(1, round(fraction * len(found))), len(found) - 1) if fraction > 0 else 0
    return group < held
