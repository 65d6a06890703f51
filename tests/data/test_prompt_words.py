"""Which prompts are the same: what normalization removes, and what it must not."""

import json

import numpy as np
import pytest
from helpers.tiny import assistant, system, user

from mlx_simpo.data.prompt_words import join_words, read_words, words_of


def stored(*messages: dict) -> bytes:
    return json.dumps(messages).encode()


def is_same(one: list[dict], other: list[dict]) -> bool:
    words = read_words([stored(*one), stored(*other)])
    return words.keys[0] == words.keys[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Why is the sky blue?", "  why is\nthe SKY “blue” "),
        ("the ﬁne café", "The fine cafe\u0301"),  # a ligature, a combining accent
        ("STRASSE", "straße"),
        ("full ＷＩＤＴＨ", "full width"),
        ("7 * 8", "7*8"),
        ("a - b", "a-b"),
        ("天気は？", "天気は"),
        ("well-known facts", "well known facts"),
    ],
)
def test_same_after_normalization(one: str, other: str) -> None:
    assert words_of(one) == words_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 7 times 8?", "What is 7 times 9?"),
        ("What is 7 - 8?", "What is 7 * 8?"),
        ("What is 7 + 8?", "What is 7 - 8?"),
        ("Solve x + 2 = 4", "Solve x - 2 = 4"),
        ("(1 + 2) / 3", "(1 + 2) * 3"),
        ("से की", "से का"),  # Hindi: vowel signs are marks, not punctuation
        ("天気は", "天気が"),
        ("price in €", "price in $"),
        ("résumé", "resume"),
    ],
)
def test_different_after_normalization(one: str, other: str) -> None:
    assert words_of(one) != words_of(other)


def test_prompts_are_compared_by_the_users_turns() -> None:
    question = user("Please tell me why the sky is blue")
    assert is_same([question], [system("Be brief."), question])
    assert is_same([question, assistant("No."), question], [question, assistant("Yes."), question])
    assert not is_same([question], [question, assistant("No."), question])
    assert not is_same(
        [question], [system("Be brief."), user("Please tell me why the sea is blue")]
    )


def test_with_few_words_of_the_user_the_whole_conversation_counts() -> None:
    assert not is_same([system("You are a pirate."), user("Hi!")], [system("A poet."), user("Hi!")])
    assert is_same(
        [system("You are a pirate."), user("Hi!")], [system("you are a Pirate"), user("hi")]
    )
    assert not is_same([user("Hi!")], [assistant("Hi!")])


def test_words_of_prompts_lie_one_after_the_other() -> None:
    rows = [
        stored(user("one two three"), assistant("no"), user("four five")),
        stored(user("six seven eight nine ten")),
    ]
    words = read_words(rows)
    assert words.spans.starts.tolist() == [2, 15]
    assert words.spans.ends.tolist() == [11, 20]
    assert words.last_turns.tolist() == [9, 15]
    marks = [0, 1, 5, 6, 7, 8, 11, 12, 13, 14, 20, 21]
    assert len(set(words.words.tolist())) == 10 + 2
    assert set(words.words[marks].tolist()) == {1, 2}
    joined = join_words([read_words(rows[:1]), read_words(rows[1:])])
    assert np.array_equal(joined.spans, words.spans)
    for name in ("words", "last_turns", "keys", "conversations"):
        assert np.array_equal(getattr(joined, name), getattr(words, name))


def test_any_stored_prompt_is_read() -> None:
    odd = [
        [],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "\ud83d half"}],
        [{"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image"}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
    ]
    words = read_words(stored(*messages) for messages in odd)
    assert len(words) == len(set(words.keys.tolist())) == 5
    assert len(read_words([])) == 0
