"""One record → one pair: every accepted form, strict checks, a reason for each refusal.

Accepted are the preference forms of TRL's documentation ("Dataset formats and types"): explicit
prompts as strings or message lists, implicit prompts (two conversations that share a beginning),
and ultrafeedback_binarized's hybrid (a string prompt beside whole conversations).
"""

import json
from dataclasses import dataclass
from typing import Any

from .sources import Row

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class Pair:
    """One prompt with a preferred and a rejected answer.

    Either all three are strings, or all three are lists of messages: prompt the turns before, and
    chosen and rejected the turns after it (the last one the assistant's).

    index: row number in the source, from 0. source: "file:line". tools: the functions a template
    may offer to the model. whole: the answers came as whole conversations, of which ``prompt`` is
    the shared beginning.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    index: int = 0
    source: str = ""
    tools: list | None = None
    whole: bool = False


class InvalidRecordError(Exception):
    """Why a record is no pair: (reason, detail)."""


def parse_pair(row: Row, implicit_string_prompts: bool = False) -> Pair:
    """The pair in one row; raises `InvalidRecordError` when there is none."""
    record = row.value
    if row.problem:
        raise InvalidRecordError("unreadable row", row.problem)
    if not isinstance(record, dict):
        raise InvalidRecordError("not a record", f"a JSON {type(record).__name__}, not an object")
    missing = [key for key in ("chosen", "rejected") if record.get(key) is None]
    if len(missing) == 2 and "completion" in record and "label" in record:
        raise InvalidRecordError("unpaired record", "prompt, completion, label: for KTO only")
    if missing:
        raise InvalidRecordError("missing answer", f"no {' and no '.join(missing)}")
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None and not isinstance(prompt, str):
            raise InvalidRecordError(
                "strings and messages mixed", "prompt is no string, the answers are"
            )
        parts = string_parts(prompt, chosen, rejected, implicit_string_prompts)
        return Pair(*parts, row.number, row.source, parse_tools(record))
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        kinds = f"chosen is {kind(chosen)}, rejected is {kind(rejected)}"
        raise InvalidRecordError("strings and messages mixed", kinds)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        check_messages(name, messages)
        if not messages or messages[-1]["role"] != "assistant":
            last = messages[-1]["role"] if messages else "nothing"
            raise InvalidRecordError("last turn not the assistant's", f"{name} ends with {last}")
    if chosen == rejected:
        raise InvalidRecordError("identical answers")
    before, chosen, rejected, whole = message_parts(prompt, chosen, rejected)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if is_empty_answer(messages):
            raise InvalidRecordError("empty answer", name)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if (first := messages[0]["role"]) != "assistant":
            raise InvalidRecordError(
                "conversations differ before the answer", f"{name} goes on with {first}"
            )
    return Pair(before, chosen, rejected, row.number, row.source, parse_tools(record), whole)


def string_parts(
    prompt: str | None, chosen: str, rejected: str, implicit: bool
) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of a record of strings."""
    if prompt is None:
        if not implicit:
            raise InvalidRecordError(
                "no prompt", "strings without a prompt; see data.implicit_string_prompts"
            )
        shared = shared_words(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise InvalidRecordError("empty answer", name)
    if chosen == rejected:
        raise InvalidRecordError("identical answers")
    return prompt, chosen, rejected


def shared_words(a: str, b: str) -> int:
    """How many characters of whole words ``a`` and ``b`` begin with alike.

    A word is never split ("The sky is bl|ue"): the cut falls before the white space in front of
    the first word that differs.
    """
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    cut = min(len(a), len(b)) if same is None else same
    while cut > 0 and not a[cut - 1].isspace():
        cut -= 1
    while cut > 0 and a[cut - 1].isspace():
        cut -= 1
    return cut


def message_parts(
    prompt: Any, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message], bool]:
    """(prompt, chosen, rejected, whole) of a record of message lists."""
    if isinstance(prompt, list) and prompt:
        check_messages("prompt", prompt)
        n = len(prompt)
        if not (chosen[:n] == prompt and rejected[:n] == prompt):
            return prompt, chosen, rejected, False
        # The answers repeat the prompt: they are whole conversations.
        return prompt, chosen[n:], rejected[n:], True
    prompt = None if prompt == [] else prompt
    if prompt is not None and not isinstance(prompt, str):
        raise InvalidRecordError("strings and messages mixed", f"prompt is {kind(prompt)}")
    pairs = zip(chosen, rejected, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if shared == 0:
        if prompt is not None and chosen[0]["role"] == "assistant":
            raise InvalidRecordError(
                "strings and messages mixed", "prompt is a string, the answers are not"
            )
        raise InvalidRecordError("conversations do not share a beginning")
    before = chosen[:shared]
    if prompt is not None:
        asked = next((m["content"] for m in before if m["role"] == "user"), None)
        if asked is None or text_of(asked).strip() != prompt.strip():
            raise InvalidRecordError(
                "prompt and conversation disagree", "the first user turn is another"
            )
    return before, chosen[shared:], rejected[shared:], True


def as_messages(part: str | list[Message], role: str) -> list[Message]:
    """Text as one message of ``role``; messages as they are."""
    return [{"role": role, "content": part}] if isinstance(part, str) else part


def check_messages(name: str, messages: list) -> None:
    """Refused unless all are messages with a known role and some content."""
    for number, message in enumerate(messages):
        where = f"{name}[{number}]"
        if not isinstance(message, dict) or "role" not in message:
            raise InvalidRecordError("strings and messages mixed", f"{where} is no message")
        if message["role"] not in ROLES:
            raise InvalidRecordError("unknown role", f"{where} has role {message['role']!r}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise InvalidRecordError("null content", where)
        if not is_text(message.get("content")):
            raise InvalidRecordError("content is no text", f"{where} is {kind(message['content'])}")


def is_text(content: Any) -> bool:
    """Whether `text_of` can tell the text of a message's content."""
    if not isinstance(content, list):
        return isinstance(content, str | None)
    texts = (part.get("text") if isinstance(part, dict) else part for part in content)
    return all(isinstance(text, str | None) for text in texts)


def is_empty_answer(messages: list[Message]) -> bool:
    """Whether a conversation ends in nothing that could be scored."""
    if not messages:
        return True
    last = messages[-1]
    return not text_of(last.get("content")).strip() and not last.get("tool_calls")


def text_of(content: Any) -> str:
    """The text of a message's content, which may be a list of parts ({"type": "text", …})."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""


def parse_tools(record: dict) -> list | None:
    """The record's ``tools`` column: a list, or JSON text of one (as TRL has it)."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise InvalidRecordError("tools are no JSON list", str(error)) from None
    if tools is not None and not isinstance(tools, list):
        raise InvalidRecordError("tools are no JSON list", kind(tools))
    return tools or None


def kind(value: Any) -> str:
    """A value as a message names it: its type, or how it begins."""
    return {str: "a string", list: "a list", type(None): "null"}.get(type(value)) or repr(value)[
        :40
    ]
