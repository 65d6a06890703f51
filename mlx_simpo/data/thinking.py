"""The thinking of a response: where it is in the message, and the same message with other text.

Datasets have it in a key of its own (transformers knows three names for it), or in the content
between tags, before what the user reads.
"""

from typing import Any, NamedTuple

from .rows import Message

KEYS = ("reasoning_content", "thinking", "reasoning")
TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
)


class Thinking(NamedTuple):
    """The thinking of an assistant's message.

    text: without its tags. keys: those of the message that hold it; () if its content does, as
    ``content[start:end]``. final: index in the content where the text after the thinking begins.
    """

    text: str
    keys: tuple[str, ...]
    start: int
    end: int
    final: int


def thinking_of(message: Message) -> Thinking | None:
    """Return the thinking of an assistant's message; None if it has none but white space."""
    content = text_in(message)
    keys = [key for key in KEYS if isinstance(message.get(key), str) and message[key].strip()]
    if keys:
        return Thinking(message[keys[0]], tuple(keys), 0, 0, _skip_space(content, 0))
    thinking = _tagged(content)
    return thinking if thinking is not None and thinking.text.strip() else None


def _tagged(content: str) -> Thinking | None:
    """Return what is between tags at the beginning of a content, which may be nothing."""
    # Most responses have none, and looking for every tag would take a while.
    if not ("</" in content or "[/" in content or "<|" in content):
        return None
    for opening, closing in TAGS:
        end = content.find(closing)
        if end < 0:
            continue
        start = content.find(opening, 0, end)
        if start < 0:  # it is the generation prompt that ends with the opening tag
            start = 0
        elif content[:start].strip():  # tags in the middle are something that the text is about
            continue
        else:
            start += len(opening)
        final = _skip_space(content, end + len(closing))
        return Thinking(content[start:end], (), start, end, final)
    return None


def is_unfinished(message: Message) -> bool:
    """Return whether the message's content begins with a tag of thinking that is never closed."""
    content = text_in(message).lstrip()
    return any(content.startswith(o) and content.find(c, len(o)) < 0 for o, c in TAGS)


def texts_beside_tags(message: Message) -> list[str]:
    """Return the texts that a template must write of a message whose content has tags of thinking.

    A template cuts a content at its tags. Where they are nested, repeated or in the middle, a part
    of the response may be lost.
    """
    content = text_in(message)
    if not any(closing in content for _, closing in TAGS):
        return []
    thinking = _tagged(content)
    if thinking is None:
        return [content.strip()]
    is_nested = any(opening in thinking.text for opening, _ in TAGS)
    return [content[thinking.final :].strip(), thinking.text.strip() if is_nested else ""]


def with_thinking(message: Message, thinking: Thinking, text: str) -> Message:
    """Return the message with ``text`` as its thinking."""
    if thinking.keys:
        return {**message, **dict.fromkeys(thinking.keys, text)}
    content = text_in(message)
    return with_text(message, content[: thinking.start] + text + content[thinking.end :])


def with_final_text(message: Message, thinking: Thinking, text: str) -> Message:
    """Return the message with the same thinking, and ``text`` as all that comes after it."""
    return with_text(message, text_in(message)[: thinking.final] + text)


def without_thinking(message: Message, text: str) -> Message:
    """Return the message without thinking and with ``text`` as its content."""
    return with_text({key: value for key, value in message.items() if key not in KEYS}, text)


def text_in(message: Message) -> str:
    """Return the message's content if it is text, or the first text among its parts, or ""."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    index = _text_index(content)
    return "" if index is None else _text_of_part(content[index])  # type: ignore[index]


def with_text(message: Message, text: str) -> Message:
    """Return the message with ``text`` instead of `text_in`.

    Of a message that has no text, its tool calls are what it says: they are replaced, too.
    """
    content = message.get("content")
    index = _text_index(content)
    if index is not None and isinstance(content, list):
        part = content[index]
        changed = text if isinstance(part, str) else {**part, "text": text}
        return {**message, "content": [*content[:index], changed, *content[index + 1 :]]}
    if not content:
        message = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**message, "content": text}


def _text_index(content: Any) -> int | None:
    """Return the index of the first part of a message's content that has text, if it has parts."""
    if not isinstance(content, list):
        return None
    return next((i for i, part in enumerate(content) if _text_of_part(part)), None)


def _text_of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else ""


def _skip_space(text: str, start: int) -> int:
    """Return the index of the first character from ``start`` on that is not white space."""
    return len(text) - len(text[start:].lstrip())
