"""Prompts that occur more than once: in training and validation, and within a dataset.

The same are prompts that differ in case, white space and punctuation alone (`prompt_words`), nearly
the same those that share most of their words (`near`).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from .encode import TokenizedSequence
from .near import Match, near_matches
from .prompt_words import PromptWords, join_words, read_words
from .tokens import StoredPairs


@dataclass(frozen=True)
class Repeats:
    """What occurs more than once in a dataset. Indices are those of pairs.

    Attributes:
        distinct_prompts: number of different prompts.
        near: of the different prompts, those that nearly repeat an earlier one, by a pair of each.
        pairs: (pair, earlier pair) with the same prompt and the same responses.
        contradictory: (pair, earlier pair) with the same prompt and responses, where the one
            prefers what the other rejects.
    """

    distinct_prompts: int
    near: list[Match]
    pairs: list[tuple[int, int]]
    contradictory: list[tuple[int, int]]


def find_repeats(pairs: StoredPairs, words: PromptWords) -> Repeats:
    """Return the repeated prompts and pairs of a dataset.

    Args:
        words: of the prompts of ``pairs``, from `read_words`.
    """
    _, distinct = np.unique(words.keys, return_index=True)
    near = near_matches(words, np.sort(distinct)) if len(words) else []
    _, which, counts = np.unique(words.conversations, return_inverse=True, return_counts=True)
    # Only pairs whose prompt is repeated are read.
    repeated = np.flatnonzero(counts[which] > 1)
    earlier: dict[tuple[bytes, ...], int] = {}
    same, contradictory = [], []
    for index in repeated.tolist():
        pair, prompt = pairs[index], words.conversations[index]
        chosen, rejected = _digest(pair.chosen), _digest(pair.rejected)
        opposite = earlier.get((prompt, rejected, chosen))
        if opposite is not None:
            contradictory.append((index, opposite))
        first = earlier.setdefault((prompt, chosen, rejected), index)
        if first != index:
            same.append((index, first))
    return Repeats(len(distinct), near, same, contradictory)


def _digest(sequence: TokenizedSequence) -> bytes:
    tokens = np.ascontiguousarray(sequence.tokens[sequence.score_start :])
    return blake2b(tokens.tobytes(), digest_size=16).digest()


def find_leaks(train: PromptWords, valid: PromptWords) -> list[Match]:
    """Return the validation pairs whose prompt occurs in training, exactly or nearly.

    Returns:
        Matches (index of the validation pair, index of a training pair, similarity), in the order
        of the validation pairs.
    """
    if not len(train) or not len(valid):
        return []
    _, first_in_train = np.unique(train.keys, return_index=True)
    train_keys = train.keys[first_in_train]
    position = np.minimum(np.searchsorted(train_keys, valid.keys), len(train_keys) - 1)
    is_same = train_keys[position] == valid.keys
    leaks = [
        Match(index, int(first_in_train[position[index]]), 1.0, is_same=True)
        for index in np.flatnonzero(is_same).tolist()
    ]
    # Each of the other prompts is compared once, and counts for all pairs that have it.
    by_key: dict[bytes, list[int]] = defaultdict(list)
    for index in np.flatnonzero(~is_same).tolist():
        by_key[valid.keys[index]].append(index)
    queries = np.array([indices[0] for indices in by_key.values()], np.int64)
    joined = join_words([valid, train])
    for match in near_matches(joined, queries, len(valid) + np.sort(first_in_train)):
        leaks += [
            Match(index, match.other - len(valid), match.similarity)
            for index in by_key[valid.keys[match.query]]
        ]
    return sorted(leaks)


def leak_warnings(
    train: StoredPairs,
    valid_sets: Mapping[str, StoredPairs],
    advance: Callable[[int], Any] = lambda prompts: None,
) -> list[str]:
    """Return a warning for each validation set with prompts that occur in the training pairs.

    Args:
        valid_sets: by name; the name of an only one may be "".
        advance: called with the number of training prompts that were read since the last call.
    """
    train_words, warnings = read_words(train.prompts(), advance), []
    for name, valid in valid_sets.items():
        leaks = find_leaks(train_words, read_words(valid.prompts()))
        if not leaks:
            continue
        first = first_example(leaks)
        example = (valid[first.query].source, train[first.other].source)
        subject = f"pairs of the validation set {name!r}" if name else "pairs to evaluate on"
        num_near = sum(not leak.is_same for leak in leaks)
        warnings.append(
            f"{leak_text(subject, len(leaks), num_near, len(valid), example)}; their accuracy "
            "says how well they are memorized: remove these prompts from one of the two "
            "(`mlx-simpo data inspect` lists them)"
        )
    return warnings


def first_example(leaks: Sequence[Match]) -> Match:
    """Return the match that shows best what is meant: the first that is the same, if any is."""
    return next((leak for leak in leaks if leak.is_same), leaks[0])


def leak_text(
    subject: str,
    num_leaks: int,
    num_near: int,
    num_pairs: int,
    example: tuple[str, str],
    where: str = "the training pairs",
) -> str:
    """Return "3 of 50 pairs to evaluate on (6.0%) have a prompt that is in …, too, e.g. …"."""
    how = ""
    if num_near:
        number = "all" if num_near == num_leaks else f"{num_near:,}"
        how = f", {number} of them nearly"
    share = num_leaks / num_pairs
    return (
        f"{num_leaks:,} of {num_pairs:,} {subject} ({share:.1%}) have a prompt that is in {where}, "
        f"too{how}, e.g. {example[0]} and {example[1]}"
    )
