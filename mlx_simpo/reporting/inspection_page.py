"""The page of ``mlx-simpo data inspect --html``: one file that needs nothing else.

Its records come from other people: every text is escaped by Jinja, control characters are shown as
escapes, and the page's content security policy allows its own script and style alone.
"""

import json
import re
from base64 import b64encode
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..data.dropped import Dropped
from ..data.duplicates import Match
from ..data.encode import EncodedPair, Encoder, TokenizedSequence
from ..data.inspection import Pieces
from ..data.overview import Overview
from ..data.prompt_words import user_text
from ..data.tokens import StoredPairs, column
from ..errors import visible
from ..version import __version__
from .display import count_text
from .histogram import HEIGHT, WIDTH, Histogram, histogram
from .remarks import remarks, template_text

MAX_PAIRS = 500
MAX_LISTED = 50  # of the pairs that repeat others, of leaks, and of quarantined records
_EXCERPT = 160  # characters of a prompt in its line
# Embeddings, overrides and isolates of Unicode's bidirectional algorithm.
_DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069]")
_HERE = Path(__file__).parent


class ShownSequence(NamedTuple):
    """A response as the page shows it.

    before: unscored text of it. pieces: (text, number of tokens) of the scored part, which has
    num_tokens in all.
    """

    before: str
    pieces: list[tuple[str, int]]
    num_tokens: int


class ShownPair(NamedTuple):
    """A pair as the page shows it. number: as for --pair. flags: (kind, what is said of it)."""

    number: int
    source: str
    dataset: str
    excerpt: str
    prompt: str
    prompt_tokens: int
    chosen: ShownSequence
    rejected: ShownSequence
    flags: list[tuple[str, str]]


class ShownMatch(NamedTuple):
    """Two pairs that are alike: (number or None if it is not on the page, source) of each.

    similarity: how alike their prompts are, or "".
    """

    pair: tuple[int | None, str]
    other: tuple[int | None, str]
    similarity: str


def inspection_page(
    overview: Overview,
    summary: Mapping[str, Any],
    encoder: Encoder,
    model: str,
    max_pairs: int = MAX_PAIRS,
) -> str:
    """Return the page as HTML.

    Args:
        overview, summary, encoder: of an `api.Inspection`. model: name of the tokenizer's model.
        max_pairs: so many pairs are shown at most; those that stand out come first.
    """
    style, script = (_read(f"inspection.{ending}") for ending in ("css", "js"))
    flags = _flags(overview)
    indices = chosen_indices(len(overview.pairs), flags, max_pairs)
    shown = _Shower(overview, encoder, flags).shown(indices)
    template = _environment().from_string(_read("inspection.html.jinja"))
    numbers = set(indices)

    def listed(pairs: Sequence[Match] | Sequence[tuple[int, int]]) -> list[ShownMatch]:
        return [_shown_match(pair, overview, numbers) for pair in pairs[:MAX_LISTED]]

    repeats = overview.repeats
    return template.render(
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        version=__version__,
        model=model,
        summary=summary,
        remarks=remarks(summary),
        charts=_charts(overview.pairs),
        chart_size=(WIDTH, HEIGHT),
        template=encoder.renderer.text,
        leaks=[(leaks, listed(leaks.matches)) for leaks in overview.leaks],
        near=listed(repeats.near),
        repeated=listed(repeats.pairs),
        contradictory=listed(repeats.contradictory),
        pairs=shown,
        kinds=sorted({kind for pair in shown for kind, _ in pair.flags}),
        datasets=list(dict.fromkeys(pair.dataset for pair in shown)),
        max_listed=MAX_LISTED,
    )


def _shown_match(
    pair: Match | tuple[int, int], overview: Overview, numbers: Collection[int]
) -> ShownMatch:
    query, other = (
        (index if index in numbers else None, overview.pairs[index].source) for index in pair[:2]
    )
    alike = ""
    if isinstance(pair, Match):
        # Of prompts that are not the same, "100 %" would say that they are.
        alike = "the same" if pair.is_same else f"{min(pair.similarity, 0.99):.0%} alike"
    return ShownMatch(query, other, alike)


def chosen_indices(count: int, flagged: Iterable[int], limit: int) -> list[int]:
    """Return which pairs are shown: all, or at most ``limit`` of them.

    The first half of them are flagged ones, if there are so many; the others are drawn evenly.
    """
    if count <= limit:
        return list(range(count))
    first = sorted(flagged)[: limit // 2]
    others = np.setdiff1d(np.arange(count), first)
    even = np.linspace(0, len(others) - 1, limit - len(first)).round().astype(int)
    return sorted({*first, *others[even].tolist()})


def _flags(overview: Overview) -> dict[int, list[tuple[str, str]]]:
    """Return what is said of each pair that stands out."""
    pairs, repeats = overview.pairs, overview.repeats
    flags: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for leaks in overview.leaks:
        for match in leaks.matches:
            how = "" if match.is_same else "nearly "
            text = f"prompt is {how}also at {pairs[match.other].source}"
            flags[match.query].append(("leak", text))
    for name, matches, what in (
        ("contradiction", repeats.contradictory, "contradicts"),
        ("repeated pair", repeats.pairs, "repeats"),
        ("near duplicate", repeats.near, "prompt is nearly that of"),
    ):
        for query, other, *_ in matches:
            flags[query].append((name, f"{what} {pairs[other].source}"))
    cut_prompt, cut_response, dropped = (
        column(pairs, name) for name in ("cut_prompt", "cut_response", "dropped")
    )
    for index in np.flatnonzero(cut_prompt | cut_response | dropped).tolist():
        for name, values in (("prompt cut", cut_prompt), ("response cut", cut_response)):
            if values[index]:
                flags[index].append((name, f"{count_text(int(values[index]), 'token')} cut"))
        for flag in Dropped(int(dropped[index])):
            what = template_text(str(flag.name).lower())
            flags[index].append(("dropped", f"the chat template {what}"))
    return dict(flags)


class _Shower:
    """Prepares pairs for the template."""

    def __init__(
        self, overview: Overview, encoder: Encoder, flags: Mapping[int, list[tuple[str, str]]]
    ) -> None:
        self._overview, self._flags = overview, flags
        self._tokenizer = encoder.tokenizer
        self._pieces = Pieces(encoder.tokenizer)

    def shown(self, indices: Sequence[int]) -> list[ShownPair]:
        """Return these pairs."""
        stored = self._overview.pairs.take(np.array(indices, np.int64))
        prompts = stored.prompts()
        return [
            self._pair(index, pair, prompt)
            for index, pair, prompt in zip(indices, stored, prompts, strict=True)
        ]

    def _pair(self, index: int, pair: EncodedPair, prompt: bytes) -> ShownPair:
        start = min(pair.chosen.score_start, pair.rejected.score_start)
        source = int(np.searchsorted(self._overview.starts, index, "right")) - 1
        text = " ".join(user_text(json.loads(prompt)).split())
        return ShownPair(
            index,
            pair.source,
            self._overview.names[source],
            text if len(text) <= _EXCERPT else f"{text[: _EXCERPT - 1]}…",
            self._tokenizer.decode(pair.chosen.tokens[:start].tolist()),
            start,
            self._sequence(pair.chosen, start),
            self._sequence(pair.rejected, start),
            self._flags.get(index, []),
        )

    def _sequence(self, sequence: TokenizedSequence, start: int) -> ShownSequence:
        before = sequence.tokens[start : sequence.score_start].tolist()
        return ShownSequence(
            self._tokenizer.decode(before) if before else "",
            self._pieces.split(sequence.tokens[sequence.score_start :].tolist()),
            sequence.num_scored,
        )


def _charts(pairs: StoredPairs) -> list[tuple[str, Histogram]]:
    start = {name: column(pairs, f"{name}_score_start") for name in ("chosen", "rejected")}
    responses = {name: column(pairs, name) - values for name, values in start.items()}
    return [
        ("Prompts", histogram({"prompt": start["chosen"]})),
        ("Responses", histogram(responses)),
    ]


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Every text of the page goes through here.
        finalize=lambda value: _shown(value) if type(value) is str else value,
    )
    environment.filters |= {
        "thousands": "{:,}".format,
        "template_text": template_text,
        "percent": "{:.0%}".format,
        "breaks": lambda text: text.replace("\n", "↵\n"),
    }
    return environment


def _shown(text: str) -> str:
    """Return text with escapes for control characters, and for those that turn text around: a
    record must not look different from what it is."""
    return _DIRECTIONS.sub(lambda match: f"\\u{ord(match[0]):04x}", visible(text))


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
