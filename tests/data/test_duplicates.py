"""Repeated, nearly repeated and contradictory pairs, and leaks, planted and counted."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.stored import write_and_open
from helpers.tiny import assistant, system, user

from mlx_simpo.data.duplicates import (
    Repeats,
    find_leaks,
    find_repeats,
    leak_warnings,
)
from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.data.near import Match
from mlx_simpo.data.prompt_words import read_words
from mlx_simpo.data.tokens import TokenizedPairs

TEXTS = [
    "My sourdough bread has a dense crumb although I let the dough rise for six hours at room "
    "temperature and fold it four times. What could be the reason, and what should I change first?",
    "Please write a polite letter to my landlord in which I ask for a new washing machine, since "
    "the old one has leaked three times this month and the plumber says it cannot be repaired.",
    "Explain to a child of eight years why the moon looks different every night, without using "
    "any word that is longer than ten letters, and end with a question that makes it think.",
    "What is the capital of France?",
]
OTHERS = [
    f"How do I {verb} a {noun} at home?" for verb in ("fix", "clean") for noun in ("bike", "car")
]


def stored(
    folder: Path, prompts: list, responses: list[tuple[int, int]] | None = None
) -> TokenizedPairs:
    """Pairs with these prompts (texts or messages); responses are numbers of tokens."""
    texts = [json.dumps([user(p)] if isinstance(p, str) else p).encode() for p in prompts]
    numbers = responses or [(2 * n, 2 * n + 1) for n in range(len(prompts))]
    pairs = []
    for index, both in enumerate(numbers):
        chosen, rejected = (TokenizedSequence(np.array([7, 7, n, n], np.int32), 2) for n in both)
        pairs.append(EncodedPair(chosen, rejected, index, f"{folder.name}.jsonl:{index + 1}"))
    return write_and_open(folder, pairs, texts)


def repeats_of(pairs: TokenizedPairs) -> Repeats:
    return find_repeats(pairs, read_words(pairs.prompts()))


def leaks_of(train: TokenizedPairs, valid: TokenizedPairs) -> list[Match]:
    return find_leaks(read_words(train.prompts()), read_words(valid.prompts()))


def test_repeated_prompts_are_counted_once(tmp_path: Path) -> None:
    prompts = [
        TEXTS[0],
        TEXTS[3],
        f" {TEXTS[0].upper()} ",
        *OTHERS,
        "what is the capital of france",
    ]
    repeats = repeats_of(stored(tmp_path / "a", prompts))
    assert repeats == Repeats(6, [], [], [])


def test_near_prompts_are_those_of_different_ones(tmp_path: Path) -> None:
    near = TEXTS[0].replace("six", "seven")
    repeats = repeats_of(stored(tmp_path / "a", [*OTHERS, TEXTS[0], TEXTS[0], near, near + "!"]))
    assert repeats.distinct_prompts == 6
    assert [(match.query, match.other) for match in repeats.near] == [(6, 4)]
    assert not repeats.near[0].is_same


def test_repeated_and_contradictory_pairs(tmp_path: Path) -> None:
    prompts = [TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[0].upper(), TEXTS[0], TEXTS[1], TEXTS[0]]
    responses = [(1, 2), (1, 3), (1, 2), (2, 1), (1, 2), (2, 3), (2, 1)]
    repeats = repeats_of(stored(tmp_path / "a", prompts, responses))
    assert repeats.pairs == [(4, 0), (6, 3)]
    assert repeats.contradictory == [(3, 0), (4, 3), (6, 0)]
    assert repeats.distinct_prompts == 2


def test_another_system_prompt_is_another_pair(tmp_path: Path) -> None:
    """It may be the reason for the preference; the prompt counts as repeated."""
    prompts = [[system(text), user(TEXTS[0])] for text in ("Be brief.", "Be thorough.", "be brief")]
    repeats = repeats_of(stored(tmp_path / "a", prompts, [(1, 2), (2, 1), (2, 1)]))
    assert repeats.distinct_prompts == 1
    assert repeats.contradictory == [(2, 0)]


def test_leaks_are_exact_or_near(tmp_path: Path) -> None:
    train = stored(tmp_path / "train", [*OTHERS, *TEXTS, TEXTS[0]])
    valid = [
        "Is this prompt in the training data, too?",
        TEXTS[3].lower(),
        TEXTS[1].replace("three", "two"),
        "What is the capital of Spain?",
        TEXTS[1].replace("three", "two") + "  ",
        [system("Be kind."), user(TEXTS[0])],
        [user(TEXTS[2]), assistant("Why?"), user("Because I said so, please do it now.")],
    ]
    leaks = leaks_of(train, stored(tmp_path / "valid", valid))
    assert [(leak.query, leak.other, leak.is_same) for leak in leaks] == [
        (1, 7, True),
        (2, 5, False),
        (4, 5, False),
        (5, 4, True),
    ]
    assert leaks[1].similarity == leaks[2].similarity < 1.0


def test_no_leaks(tmp_path: Path) -> None:
    train = stored(tmp_path / "train", OTHERS)
    valid = stored(tmp_path / "valid", TEXTS)
    assert leaks_of(train, valid) == []
    assert leaks_of(train.take(np.zeros(0, int)), valid) == []
    assert leaks_of(train, valid.take(np.zeros(0, int))) == []
    assert leak_warnings(train, {"": valid, "more": valid}) == []


@pytest.mark.parametrize(
    ("name", "prompts", "expected"),
    [
        (
            "",
            [*TEXTS[:2], OTHERS[0].upper(), "Why not, by the way?"],
            "1 of 4 pairs to evaluate on (25.0%) have a prompt that is in the training pairs, too, "
            "e.g. valid.jsonl:3 and train.jsonl:1; their accuracy says how well they are "
            "memorized: remove these prompts from one of the two (`mlx-simpo data inspect` lists "
            "them)",
        ),
        (
            "chat",
            [TEXTS[2].replace("child", "kid"), OTHERS[3]],
            "2 of 2 pairs of the validation set 'chat' (100.0%) have a prompt that is in the "
            "training pairs, too, 1 of them nearly, e.g. valid.jsonl:2 and train.jsonl:4; ",
        ),
        (
            "",
            [TEXTS[2].replace("child", "kid")],
            "1 of 1 pairs to evaluate on (100.0%) have a prompt that is in the training pairs, "
            "too, all of them nearly, e.g. valid.jsonl:1 and train.jsonl:5; ",
        ),
    ],
)
def test_a_warning_says_how_many_and_which(
    name: str, prompts: list[str], expected: str, tmp_path: Path
) -> None:
    train = stored(tmp_path / "train", [*OTHERS, TEXTS[2]])
    valid, clean = stored(tmp_path / "valid", prompts), stored(tmp_path / "clean", TEXTS[:1])
    (warning,) = leak_warnings(train, {name: valid, "clean": clean})
    assert warning.startswith(expected)


def test_progress_counts_the_training_prompts(tmp_path: Path) -> None:
    train = stored(tmp_path / "train", [f"Question {n} of very many, is it?" for n in range(2500)])
    calls: list[int] = []
    leak_warnings(train, {"": train.take(np.arange(3))}, calls.append)
    assert calls == [1000, 1000]


def test_every_set_is_compared(tmp_path: Path) -> None:
    train = stored(tmp_path / "train", TEXTS)
    clean, leaky = stored(tmp_path / "clean", OTHERS), stored(tmp_path / "leaky", TEXTS[:2])
    (warning,) = leak_warnings(train, {"first": clean, "second": leaky})
    assert warning.startswith("2 of 2 pairs of the validation set 'second' (100.0%)")


def test_responses_that_differ_in_their_first_token_alone_are_not_repeated(tmp_path: Path) -> None:
    sequences = [TokenizedSequence(np.array([7, 7, n, 9], np.int32), 2) for n in range(4)]
    encoded = [
        EncodedPair(sequences[0], sequences[1], 0),
        EncodedPair(sequences[2], sequences[3], 1),
    ]
    prompt = json.dumps([user(TEXTS[0])]).encode()
    pairs = write_and_open(tmp_path / "pairs", encoded, [prompt] * 2)
    assert find_repeats(pairs, read_words(pairs.prompts())).pairs == []
