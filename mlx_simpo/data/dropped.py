"""What a chat template drops: parts of a pair that leave no trace in the text that it writes.

A template writes what its author thought of. What it ignores, the model never sees, and a
preference that rests on it cannot be learned. Whether a part is written is tested with a mark in
its place: a text that occurs nowhere else.
"""

import json
from collections.abc import Iterator
from enum import IntFlag
from typing import Any

from .boundary import unused_character, write_again
from .messages import SYSTEM_ROLES, text_of
from .render import Renderer
from .rows import Message
from .thinking import Thinking, thinking_of, with_text, with_thinking

# A longer text that is part of the conversation's is not there by accident.
CERTAIN = 16  # characters


class Dropped(IntFlag):
    """What the template did not write of a pair. The numbers are part of the cache's format."""

    TOOLS = 1
    TOOL_CALLS = 2
    SYSTEM = 4
    THINKING = 8
    NULL_CONTENT = 16  # not dropped: content that is null was written, as the word None or null
    PROMPT = 32  # of the prompt, what it ends with or a part of an earlier turn


def special_parts(messages: list[Message], tools: list | None) -> Dropped:
    """Return what of a conversation a template could drop."""
    parts = Dropped.TOOLS if tools else Dropped(0)
    for message in messages:
        if message.get("tool_calls"):
            parts |= Dropped.TOOL_CALLS
        if message.get("content") is None:
            parts |= Dropped.NULL_CONTENT
        if message["role"] in SYSTEM_ROLES:
            parts |= Dropped.SYSTEM
        elif message["role"] == "assistant" and thinking_of(message) is not None:
            parts |= Dropped.THINKING
    return parts


def dropped_parts(
    renderer: Renderer,
    prompt: list[Message],
    response: list[Message],
    tools: list | None,
    text: str | None = None,
) -> Dropped:
    """Return what the template does not write of one conversation (all of `Dropped` but PROMPT).

    Of thinking, only the response's counts: templates drop that of earlier turns on purpose.

    Args:
        text: the whole conversation as the template writes it, if it is known.

    Raises:
        InvalidRecordError: the template rejects the conversation.
    """
    messages = [*prompt, *response]
    parts = special_parts(messages, tools)
    if not parts:
        return parts
    text = renderer.render(messages, tools) if text is None else text
    checks = _Checks(renderer, messages, tools, text)
    return Dropped(
        sum(
            flag
            for flag, is_dropped in (
                (Dropped.TOOLS, checks.drops_tools),
                (Dropped.TOOL_CALLS, checks.drops_tool_calls),
                (Dropped.SYSTEM, checks.drops_system),
                (Dropped.THINKING, lambda: checks.drops_thinking(len(prompt))),
                (Dropped.NULL_CONTENT, checks.writes_null),
            )
            if flag in parts and is_dropped()
        )
    )


class _Checks:
    """The tests of one conversation and its text, one for each kind of part."""

    def __init__(
        self, renderer: Renderer, messages: list[Message], tools: list | None, text: str
    ) -> None:
        self._renderer, self._messages = renderer, messages
        self._tools, self._text = tools, text
        self._mark = unused_character(text)

    def drops_tools(self) -> bool:
        """A tool's name is missing, or the text is the same without tools."""
        names = [name for name in map(_function_name, self._tools or []) if name]
        is_missing = any(name not in self._text for name in names)
        return is_missing or self._text == write_again(self._renderer, self._messages, None)

    def drops_tool_calls(self) -> bool:
        """The function's name or the arguments of a call are missing."""
        word = next(w for w in map("toolmark{}x".format, range(10**9)) if w not in self._text)
        marks: list[str] = []
        messages = [_with_marked_calls(message, word, marks) for message in self._messages]
        changed = write_again(self._renderer, messages, self._tools)
        return changed is not None and any(mark not in changed for mark in marks)

    def drops_system(self) -> bool:
        """The text of a system turn is missing."""
        for index, message in enumerate(self._messages):
            if message["role"] in SYSTEM_ROLES:
                content = text_of(message.get("content")).strip()
                if content and self._is_missing(content, index, with_text(message, self._mark)):
                    return True
        return False

    def drops_thinking(self, first: int) -> bool:
        """The thinking of a message is missing, from the message number ``first`` on."""
        return any(
            self._is_missing(
                thinking.text.strip(),
                index,
                with_thinking(self._messages[index], thinking, self._mark),
            )
            for index, thinking in self._thinking(first)
        )

    def writes_null(self) -> bool:
        """Content that is null is written as a word: there are fewer with empty content instead."""
        messages = [
            {**message, "content": ""} if message.get("content") is None else message
            for message in self._messages
        ]
        changed = write_again(self._renderer, messages, self._tools)
        if changed is None or changed == self._text:
            return False
        return any(self._text.count(word) > changed.count(word) for word in ("None", "null"))

    def _thinking(self, first: int) -> Iterator[tuple[int, Thinking]]:
        for index, message in enumerate(self._messages[first:], start=first):
            thinking = thinking_of(message) if message["role"] == "assistant" else None
            if thinking is not None:
                yield index, thinking

    def _is_missing(self, content: str, index: int, marked: Message) -> bool:
        """Return whether a content is not written; ``marked`` is its message with the mark."""
        if len(content) >= CERTAIN and content in self._text:
            return False
        messages = [*self._messages[:index], marked, *self._messages[index + 1 :]]
        changed = write_again(self._renderer, messages, self._tools)
        return changed is not None and self._mark not in changed


def _function_name(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _with_marked_calls(message: Message, word: str, marks: list[str]) -> Message:
    """Return the message with marks as names and arguments of its tool calls; adds to ``marks``."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_marked_call(call, word, marks) for call in calls]}


def _marked_call(call: Any, word: str, marks: list[str]) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    changed = dict(function)
    if isinstance(function.get("name"), str):
        changed["name"] = f"{word}name{len(marks)}x"
        marks.append(changed["name"])
    mark = f"{word}argument{len(marks)}x"
    arguments = _marked_arguments(function.get("arguments"), mark)
    if arguments is not None:
        changed["arguments"] = arguments
        marks.append(mark)
    return {**call, "function": changed} if "function" in call else changed


def _marked_arguments(arguments: Any, mark: str) -> Any:
    """Return arguments of the same form, object or JSON text, with the mark as every value; None if
    there are no values."""
    if isinstance(arguments, dict):
        return dict.fromkeys(arguments, mark) or None
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        return mark
    marked = _marked_arguments(parsed, mark) if isinstance(parsed, dict) else None
    return None if marked is None else json.dumps(marked)
