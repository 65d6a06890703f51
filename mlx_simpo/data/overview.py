"""Several sources taken together: what repeats itself, and what is in training and validation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .duplicates import Match, Repeats, find_leaks, find_repeats
from .pairs import Quarantined
from .prompt_words import PromptWords, join_words, read_words
from .tokens import StoredPairs

TRAIN, VALID = "train", "valid"


class InspectedSource(NamedTuple):
    """A source that was read. role: TRAIN, VALID, or "" if it is not said what it is for."""

    name: str
    role: str
    pairs: StoredPairs
    quarantined: list[Quarantined]


class Leaks(NamedTuple):
    """The pairs of a source whose prompts occur elsewhere.

    source: name of the source. others: names of those that it was compared with.
    checked: number of its pairs. matches: (its pair, another's pair, similarity) by their indices
    in the sequence of all pairs.
    """

    source: str
    others: tuple[str, ...]
    checked: int
    matches: list[Match]


@dataclass(frozen=True)
class Overview:
    """What is seen when sources are looked at together.

    Attributes:
        pairs: of all sources, one source after the other; indices below are those of this sequence.
        names: of the sources.
        starts: index of the first pair of each source, and the number of all pairs.
        distinct: number of different prompts in each source.
        repeats: of all training sources together, and of each other source. Its
            ``distinct_prompts`` is that of all sources.
        leaks: of each validation set in the training pairs. Without training pairs, and of sources
            without a role: of each in all before it.
    """

    pairs: StoredPairs
    names: tuple[str, ...]
    starts: tuple[int, ...]
    distinct: tuple[int, ...]
    repeats: Repeats
    leaks: tuple[Leaks, ...]

    @property
    def repeated_prompts(self) -> int:
        """Number of pairs whose prompt an earlier pair has."""
        return self.starts[-1] - self.repeats.distinct_prompts

    def as_dict(self) -> dict[str, Any]:
        """Return all of it with the pairs' sources ("file:line"), ready for JSON."""

        def where(*indices: int) -> list[str]:
            return [self.pairs[index].source for index in indices]

        def listed(matches: Sequence[Match]) -> list[dict[str, Any]]:
            return [
                {
                    "pair": self.pairs[match.query].source,
                    "like": self.pairs[match.other].source,
                    "similarity": round(match.similarity, 3),
                    "is_same": match.is_same,
                }
                for match in matches
            ]

        repeats = self.repeats
        return {
            "distinct_prompts": repeats.distinct_prompts,
            "repeated_prompts": self.repeated_prompts,
            "near_prompts": listed(repeats.near),
            "repeated_pairs": [where(*pair) for pair in repeats.pairs],
            "contradictory_pairs": [where(*pair) for pair in repeats.contradictory],
            "leaks": [
                {
                    "source": leaks.source,
                    "in": list(leaks.others),
                    "checked": leaks.checked,
                    "pairs": len(leaks.matches),
                    "records": listed(leaks.matches),
                }
                for leaks in self.leaks
            ],
        }


def overview(sources: Sequence[InspectedSource], pairs: StoredPairs) -> Overview:
    """Compare the prompts of sources, of which those to train on come first.

    Args:
        pairs: those of all sources as one sequence.
    """
    words = [read_words(source.pairs.prompts()) for source in sources]
    starts = np.cumsum([0, *map(len, words)])
    groups = _groups(sources)
    near, same, contradictory = [], [], []
    for first, end in groups:
        shift = int(starts[first])
        part = find_repeats(pairs[shift : int(starts[end])], join_words(words[first:end]))
        near += [_shifted(match, shift, shift) for match in part.near]
        same += [(pair + shift, other + shift) for pair, other in part.pairs]
        contradictory += [(pair + shift, other + shift) for pair, other in part.contradictory]
    distinct = [len(np.unique(part.keys)) for part in words]
    in_all = len(np.unique(join_words(words).keys))
    return Overview(
        pairs,
        tuple(source.name for source in sources),
        tuple(starts.tolist()),
        tuple(distinct),
        Repeats(in_all, near, same, contradictory),
        tuple(_leaks(sources, words, starts, groups)),
    )


def _groups(sources: Sequence[InspectedSource]) -> list[tuple[int, int]]:
    """Return (first, end) of the sources that belong together: all to train on; each other one."""
    num_train = sum(source.role == TRAIN for source in sources)
    others = [(index, index + 1) for index in range(num_train, len(sources))]
    return [(0, num_train), *others] if num_train else others


def _leaks(
    sources: Sequence[InspectedSource],
    words: Sequence[PromptWords],
    starts: np.ndarray,
    groups: Sequence[tuple[int, int]],
) -> list[Leaks]:
    has_train = sources[0].role == TRAIN
    result = []
    for first, _ in groups[1:]:
        end = groups[0][1] if has_train and sources[first].role == VALID else first
        matches = find_leaks(join_words(words[:end]), words[first])
        shift = int(starts[first])
        result.append(
            Leaks(
                sources[first].name,
                tuple(source.name for source in sources[:end]),
                len(words[first]),
                [_shifted(match, shift, 0) for match in matches],
            )
        )
    return result


def _shifted(match: Match, query: int, other: int) -> Match:
    return match._replace(query=match.query + query, other=match.other + other)
