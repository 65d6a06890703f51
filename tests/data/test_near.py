"""Near duplicates: against the definition, computed for all pairs; and what is none."""

import json
from itertools import combinations

import numpy as np
import pytest
from helpers.tiny import assistant, system, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.near import THRESHOLD, near_matches
from mlx_simpo.data.prompt_words import PromptWords, read_words, words_of

SENTENCE = (
    "I have a small garden behind my house and would like to grow tomatoes, beans and herbs in it. "
    "Which of them get along well with each other, how much water do they need in a hot summer, "
    "and when should I sow them if the last frost comes in the middle of May?"
)


def prompts(*texts: str | list[dict]) -> PromptWords:
    messages = ([user(text)] if isinstance(text, str) else text for text in texts)
    return read_words(json.dumps(list(m)).encode() for m in messages)


def are_near(one: str | list[dict], other: str | list[dict]) -> bool:
    return bool(near_matches(prompts(one, other), np.arange(2)))


def similarity(one: str, other: str) -> float:
    """The definition, by the words themselves."""
    first, second = (
        {tuple(padded[i : i + 3]) for i in range(len(padded) - 2)}
        for padded in ([b"<", b"<", *words_of(text), b">", b">"] for text in (one, other))
    )
    return len(first & second) / len(first | second)


def edited(text: str, rng: np.random.Generator) -> str:
    """Change some words of a text, more or fewer of them."""
    words = text.split()
    for _ in range(int(rng.integers(0, 6))):
        index = int(rng.integers(len(words)))
        action = rng.integers(3)
        if action == 0:
            words[index] = f"word{rng.integers(1000)}"
        elif action == 1:
            words.insert(index, f"word{rng.integers(1000)}")
        elif len(words) > 10:
            del words[index]
    return " ".join(words)


def random_prompts(seed: int, groups: int, copies: int) -> list[str]:
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(groups):
        words = [f"word{n}" for n in rng.integers(1000, size=rng.integers(12, 80))]
        texts += [edited(" ".join(words), rng) for _ in range(copies)]
    distinct = {tuple(words_of(text)): text for text in texts}
    return [list(distinct.values())[i] for i in rng.permutation(len(distinct))]


@pytest.mark.parametrize("seed", range(2))
def test_every_near_duplicate_and_nothing_else(seed: int) -> None:
    """Four copies each: too few for a preamble, so that the definition is the similarity alone."""
    texts = random_prompts(seed, groups=45, copies=4)
    expected = {
        j
        for i, j in combinations(range(len(texts)), 2)
        if similarity(texts[i], texts[j]) >= THRESHOLD
    }
    matches = near_matches(prompts(*texts), np.arange(len(texts)))
    assert {match.query for match in matches} == expected
    assert 10 < len(expected) < 135
    for match in matches:
        assert match.other < match.query
        assert match.similarity == similarity(texts[match.query], texts[match.other])


@pytest.mark.parametrize("seed", range(2))
def test_every_near_duplicate_between_two_sets(seed: int) -> None:
    texts = random_prompts(seed, groups=45, copies=4)
    queries, others = np.arange(0, 40), np.arange(40, len(texts))
    expected = {
        i for i in range(40) if any(similarity(texts[i], texts[j]) >= THRESHOLD for j in others)
    }
    matches = near_matches(prompts(*texts), queries, others)
    assert {match.query for match in matches} == expected
    assert len(expected) > 3
    assert all(match.other >= 40 for match in matches)


def test_a_missed_threshold_would_be_seen() -> None:
    """The random prompts have pairs on both sides, close to it."""
    texts = random_prompts(0, groups=45, copies=4)
    values = [similarity(a, b) for a, b in combinations(texts, 2)]
    assert THRESHOLD == 0.8
    assert any(THRESHOLD <= v < THRESHOLD + 0.03 for v in values)
    assert any(THRESHOLD - 0.03 < v < THRESHOLD for v in values)


def test_the_result_does_not_depend_on_what_else_there_is() -> None:
    texts = random_prompts(5, groups=60, copies=4)
    alone = near_matches(prompts(*texts), np.arange(len(texts)))
    assert alone == near_matches(prompts(*texts, "x", "y z"), np.arange(len(texts)))


def test_small_changes_of_a_long_prompt_are_near() -> None:
    assert are_near(SENTENCE, SENTENCE.replace("tomatoes", "tomatos"))
    assert are_near(SENTENCE, "Hello! " + SENTENCE)
    assert are_near(SENTENCE, SENTENCE + " Thanks.")
    assert not are_near(SENTENCE, SENTENCE[: len(SENTENCE) // 2])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 7 times 8?", "What is 7 times 9?"),
        ("Write a haiku about autumn leaves", "Write a haiku about winter leaves"),
        (
            "Translate 'good morning' into French, please.",
            "Translate 'good night' into French, please.",
        ),
        (
            "Write a short poem of exactly four lines about the beauty of autumn",
            "Write a short poem of exactly four lines about the beauty of winter",
        ),
        ("a", "b"),
    ],
)
def test_short_prompts_that_differ_in_a_word_are_not_near(one: str, other: str) -> None:
    assert not are_near(one, other)


def test_a_long_system_prompt_makes_nothing_near() -> None:
    rules = system(SENTENCE * 5)
    first, second = (user(f"What do you know about {x} and its history?") for x in ("Rome", "Oslo"))
    assert not are_near([rules, first], [rules, second])


def test_examples_in_earlier_turns_make_nothing_near() -> None:
    shots = [user(SENTENCE), assistant("A."), user(SENTENCE[::-1]), assistant("B.")]
    assert not are_near([*shots, user("What is a comet?")], [*shots, user("What is a quark?")])
    assert are_near(
        [*shots, user("What is a comet?")], [*shots, user("What is a comet, pray?")]
    ) is (similarity("What is a comet?", "What is a comet, pray?") >= THRESHOLD)


def test_examples_in_the_same_turn_make_nothing_near() -> None:
    """Neither before the questions nor after them."""
    questions = [f"What is the {noun} of {noun}ing, and why?" for noun in "abcdefgh"]
    for form in (SENTENCE + " {}", "{} " + SENTENCE, SENTENCE + " {} " + SENTENCE[::-1]):
        texts = [form.format(question) for question in questions]
        assert similarity(*texts[:2]) > 0.7
        assert near_matches(prompts(*texts), np.arange(8)) == []


def test_one_question_about_different_passages_is_not_near() -> None:
    passages = [" ".join(f"{letter}{n}" for n in range(90)) for letter in "abcdef"]
    questions = [
        "Summarize the passage in three short sentences.",
        "What is its main idea?",
        "What does it say about cats?",
        "What would a critic reply?",
        "Who wrote it, and when?",
    ]
    texts = [f"{passage} {question}" for passage in passages for question in questions]
    assert near_matches(prompts(*texts), np.arange(len(texts))) == []


def test_many_copies_with_small_changes_are_near() -> None:
    """They share beginnings, too, but go on alike: no preamble. Only where five of them begin (or
    end) differently, and are alike otherwise, are they taken for questions with instructions."""
    words = SENTENCE.split()
    texts = [" ".join([*words[:n], f"new{n}", *words[n + 1 :]]) for n in range(40)]
    matches = near_matches(prompts(*texts), np.arange(40))
    assert {match.query for match in matches} > set(range(8, 34))


def test_a_near_duplicate_among_prompts_with_a_preamble_is_near() -> None:
    questions = [f"Tell me: {SENTENCE.replace('garden', noun)} ({noun})" for noun in "abcdef"]
    questions[5] = questions[4].replace("hot", "warm")
    rules = " ".join(f"rule{n}" for n in range(50))
    others = [f"{rules} {' '.join(f'{letter}{n}' for n in range(20))}" for letter in "uvwxyz"]
    texts = [*others, *(f"{rules} {question}" for question in questions[4:])]
    assert [match[:2] for match in near_matches(prompts(*texts), np.arange(8))] == [(7, 6)]


@given(st.lists(st.text(st.sampled_from("ab \n.é天"), max_size=40), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_any_texts_can_be_compared(texts: list[str]) -> None:
    words = prompts(*texts)
    _, distinct = np.unique(words.keys, return_index=True)
    for match in near_matches(words, np.sort(distinct)):
        assert THRESHOLD <= match.similarity <= 1
        assert match.other < match.query


def test_the_last_turn_counts_if_only_one_has_turns() -> None:
    """A text with everything that a conversation says, and its short last turn beside it."""
    turns = [user(SENTENCE), assistant("Yes."), user("And peppers?")]
    text = f"{SENTENCE} And peppers?"
    assert not are_near(turns, text)
    assert not are_near(text, turns)
