"""Messages: what they must be to be trained on, and the text that they hold."""

from typing import Any

from .rows import InvalidRecordError, Message, shown

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool", "function")


def as_messages(part: str | list[Message], role: str) -> list[Message]:
    """Return a string as one message of ``role``, and messages as they are."""
    return [{"role": role, "content": part}] if isinstance(part, str) else part


def check_messages(name: str, messages: list) -> None:
    """Check that all items are messages with a known role and some content.

    Raises:
        InvalidRecordError: one is not.
    """
    for number, message in enumerate(messages):
        where = f"{name}[{number}]"
        if not isinstance(message, dict) or "role" not in message:
            raise InvalidRecordError("mixes strings and messages", f"{where} is not a message")
        if message["role"] not in ROLES:
            raise InvalidRecordError("unknown role", f"{where} has role {shown(message['role'])}")
        # An assistant turn that only calls tools has no content.
        if message.get("content") is None and not message.get("tool_calls"):
            raise InvalidRecordError("missing content", where)
        if not is_text(message.get("content")):
            content = message["content"]
            is_list = isinstance(content, list)
            kind = "a list with other parts than text" if is_list else describe(content)
            raise InvalidRecordError("content is not text", f"content of {where} is {kind}")
        # A template would write a text character by character, and an object key by key.
        if message.get("tool_calls") and not is_list_of_calls(message["tool_calls"]):
            raise InvalidRecordError(
                "tool calls are not a list of calls", f"each in {where} must have a name"
            )


def is_text(content: Any) -> bool:
    """Return whether `text_of` can read the text of a message's content."""
    if not isinstance(content, list):
        return isinstance(content, str | None)
    return all(map(_is_text_part, content))


def _is_text_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return isinstance(part, str)
    is_empty = part.get("text") is None and part.get("type") == "text"
    return is_empty or isinstance(part.get("text"), str)


def is_list_of_calls(calls: Any) -> bool:
    """Return whether a message's tool calls are {"function": {"name": …}}, or {"name": …}."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return False
    functions = [call.get("function", call) for call in calls]
    return all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions)


def with_joined_parts(messages: list[Message]) -> list[Message]:
    """Return messages whose contents are text; of a list of parts, what they say together.

    Most templates would write such a list as Python shows it.
    """
    return [
        {**message, "content": text_of(message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def with_system_text(messages: list[Message], text: str) -> list[Message]:
    """Return messages with ``text`` as a system turn in front; as they are if they have that turn.

    Raises:
        InvalidRecordError: they have another system turn.
    """
    turns = [text_of(m.get("content")) for m in messages if m["role"] in SYSTEM_ROLES]
    if any(turn.strip() != text.strip() for turn in turns):
        raise InvalidRecordError(
            "two different system turns", "the system column differs from the conversation's"
        )
    return messages if turns else [{"role": "system", "content": text}, *messages]


def is_empty_response(messages: list[Message]) -> bool:
    """Return whether a conversation ends with nothing that could be scored."""
    if not messages:
        return True
    last = messages[-1]
    return not text_of(last.get("content")).strip() and not last.get("tool_calls")


def text_of(content: Any) -> str:
    """Return the text of a message's content, which may be a list of {"type": "text", …} parts."""
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, dict) else part for part in content)
        return "".join(part for part in parts if isinstance(part, str))
    return content or ""


def describe(value: Any) -> str:
    """Return a value as messages name it: by its type, or by its first characters."""
    names = {str: "a string", list: "a list", type(None): "null"}
    return names.get(type(value)) or shown(value)
