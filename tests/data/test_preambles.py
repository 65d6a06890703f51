"""Preambles: what several prompts share before they go apart."""

import json

import numpy as np
from helpers.tiny import user

from mlx_simpo.data.preambles import MIN_PREAMBLE_PROMPTS, MIN_PREAMBLE_WORDS, bodies
from mlx_simpo.data.prompt_words import read_words

RULES = [f"rule{n}" for n in range(MIN_PREAMBLE_WORDS)]
QUESTIONS = [[f"{letter}{n}" for n in range(6)] for letter in "abcdefg"]


def body_sizes(prompts: list[list[str]]) -> list[int]:
    """How many words of each prompt are compared."""
    words = read_words(json.dumps([user(" ".join(prompt))]).encode() for prompt in prompts)
    body = bodies(words, words.spans)
    return (body.ends - body.starts).tolist()


def test_a_shared_beginning_and_a_shared_end_are_not_compared() -> None:
    count = MIN_PREAMBLE_PROMPTS
    assert body_sizes([RULES + q for q in QUESTIONS[:count]]) == [6] * count
    assert body_sizes([q + RULES for q in QUESTIONS[:count]]) == [6] * count
    assert body_sizes([RULES + q + RULES[::-1] for q in QUESTIONS]) == [6] * 7


def test_few_prompts_and_few_words_are_no_preamble() -> None:
    count = MIN_PREAMBLE_PROMPTS - 1
    assert body_sizes([RULES + q for q in QUESTIONS[:count]]) == [16] * count
    assert body_sizes([RULES[1:] + q for q in QUESTIONS]) == [15] * 7


def test_questions_that_begin_with_the_same_words_go_apart() -> None:
    prompts = [[*RULES, "what", "is", *question] for question in QUESTIONS]
    assert body_sizes(prompts) == [6] * 7
    mixed = [[*RULES, "what", "is", *question] for question in QUESTIONS[:3]]
    mixed += [[*RULES, *question] for question in QUESTIONS[3:]]
    assert body_sizes(mixed) == [8] * 3 + [6] * 4


def test_one_text_with_small_changes_is_no_preamble() -> None:
    long = [f"word{n}" for n in range(60)]
    changed = [[*long[:n], "other", *long[n + 1 :]] for n in range(10, 50, 2)]
    assert body_sizes(changed) == [60] * 20


def test_of_two_preambles_that_are_all_only_the_longer_is_taken_away() -> None:
    ends = [[f"{letter}{n}" for n in range(12)] for letter in "uvwxyz"]
    beginnings = [[f"{letter}{n}" for n in range(20)] for letter in "abcdef"]
    sizes = body_sizes([begin + end for begin in beginnings for end in ends])
    assert sizes == [12] * 36


def test_prompts_of_any_size() -> None:
    assert body_sizes([[]] * 6) == [0] * 6
    assert len(body_sizes([RULES * 2] * 6)) == 6  # it ends, though they never go apart
    assert body_sizes([RULES[:n] for n in range(10)]) == list(range(10))
    words = read_words([])
    assert len(bodies(words, words.spans.take(np.zeros(0, np.int64))).starts) == 0
