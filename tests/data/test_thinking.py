"""The thinking of a message, wherever it is, and messages with other text in its place."""

from typing import Any

import pytest
from helpers.tiny import assistant

from mlx_simpo.data.thinking import (
    KEYS,
    TAGS,
    is_unfinished,
    text_in,
    texts_beside_tags,
    thinking_of,
    with_final_text,
    with_text,
    with_thinking,
    without_thinking,
)


@pytest.mark.parametrize("key", KEYS)
def test_thinking_in_a_key(key: str) -> None:
    message = assistant("\n final", **{key: "thought"})
    thinking = thinking_of(message)
    assert thinking is not None
    assert (thinking.text, thinking.keys) == ("thought", (key,))
    assert with_thinking(message, thinking, "x") == {**message, key: "x"}
    assert with_final_text(message, thinking, "x") == {**message, "content": "\n x"}
    assert without_thinking(message, "x") == assistant("x")


@pytest.mark.parametrize("tags", TAGS)
@pytest.mark.parametrize("before", ["", "\n "])
def test_thinking_in_the_content(tags: tuple[str, str], before: str) -> None:
    opening, closing = tags
    message = assistant(f"{before}{opening}\nthought{closing}\n\nfinal")
    thinking = thinking_of(message)
    assert thinking is not None
    assert (thinking.text, thinking.keys) == ("\nthought", ())
    changed = f"{before}{opening}x{closing}\n\nfinal"
    assert with_thinking(message, thinking, "x")["content"] == changed
    changed = f"{before}{opening}\nthought{closing}\n\nx"
    assert with_final_text(message, thinking, "x")["content"] == changed
    assert without_thinking(message, "x") == assistant("x")


def test_the_opening_tag_may_be_the_end_of_the_prompt() -> None:
    message = assistant("thought</think>final")
    thinking = thinking_of(message)
    assert thinking is not None
    assert thinking.text == "thought"
    assert with_thinking(message, thinking, "x")["content"] == "x</think>final"


@pytest.mark.parametrize(
    "message",
    [
        assistant("final"),
        assistant("final", reasoning_content=" \n"),
        assistant("final", thinking=None),
        assistant("final", reasoning={"effort": 1}),
        assistant("<think>\n\n</think>\n\nfinal"),
        assistant("The tags are <think> and </think>."),
        assistant("<think>never ends"),
        assistant(None),
        assistant([]),
        {"role": "assistant"},
    ],
)
def test_no_thinking(message: dict[str, Any]) -> None:
    assert thinking_of(message) is None


def test_a_key_comes_before_the_content() -> None:
    thinking = thinking_of(assistant("<think>a</think>b", reasoning="c"))
    assert thinking is not None
    assert (thinking.text, thinking.keys) == ("c", ("reasoning",))


def test_all_keys_with_thinking_change_at_once() -> None:
    """transformers copies the first that there is to the other names."""
    message = assistant("final", thinking="a", reasoning_content="b")
    thinking = thinking_of(message)
    assert thinking is not None
    changed = with_thinking(message, thinking, "x")
    assert changed == assistant("final", thinking="x", reasoning_content="x")


PARTS = [{"type": "text", "text": ""}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def test_the_text_of_parts_is_the_first_that_has_any() -> None:
    message = assistant(PARTS)
    assert text_in(message) == "a"
    assert with_text(message, "x")["content"] == [PARTS[0], {"type": "text", "text": "x"}, PARTS[2]]
    assert message == assistant(PARTS)
    assert with_text(assistant(["a", "b"]), "x")["content"] == ["x", "b"]


@pytest.mark.parametrize("content", [None, "", []])
def test_a_message_without_text_says_its_tool_calls(content: Any) -> None:
    assert with_text(assistant(content, tool_calls=[{}]), "x") == assistant("x")


def test_tool_calls_stay_beside_text() -> None:
    assert with_text(assistant("a", tool_calls=[1]), "x") == assistant("x", tool_calls=[1])


def test_thinking_ends_at_the_first_tag_that_closes_it() -> None:
    thinking = thinking_of(assistant("<think>a</think> b </think> c"))
    assert thinking is not None
    assert thinking.text == "a"


@pytest.mark.parametrize("tags", TAGS)
def test_unfinished_thinking(tags: tuple[str, str]) -> None:
    opening, closing = tags
    assert is_unfinished(assistant(f" {opening}a"))
    assert not is_unfinished(assistant(f"{opening}a{closing}"))
    assert not is_unfinished(assistant(f"about {opening}"))


def test_texts_beside_tags() -> None:
    assert texts_beside_tags(assistant("a b")) == []
    assert texts_beside_tags(assistant("a <think>b</think> c")) == ["a <think>b</think> c"]
    assert texts_beside_tags(assistant("<think>a</think> b ")) == ["b", ""]
    assert texts_beside_tags(assistant("<think>a<think>b </think>")) == ["", "a<think>b"]
