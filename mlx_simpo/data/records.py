"""Parse one record into one pair: all accepted forms, strict checks, a reason for every rejection.

Accepted are the preference forms of TRL's documentation ("Dataset formats and types"): explicit
prompts as strings or lists of messages, implicit prompts (two conversations that start the same
way), and ultrafeedback_binarized's hybrid (a string prompt beside whole conversations); and what
`forms` turns into these.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

from .forms import read_form
from .guesses import mapping_line
from .messages import (
    as_messages,
    check_messages,
    describe,
    is_empty_response,
    text_of,
    with_joined_parts,
    with_system_text,
)
from .rows import InvalidRecordError, Message, PythonNotation, Row

IMPLICIT_HINT = "see data.implicit_string_prompts"


@dataclass(frozen=True)
class Pair:
    """One prompt with a preferred and a rejected response.

    Prompt, chosen and rejected are either all strings or all lists of messages. As messages, the
    prompt is the turns before the responses; chosen and rejected are the turns after it, and the
    last of them is the assistant's.

    Attributes:
        index: row number in the source, from 0.
        source: "file:line".
        tools: functions that a template may offer to the model.
        has_full_conversations: the record gave whole conversations, and ``prompt`` is what they
            share.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    index: int = 0
    source: str = ""
    tools: list | None = None
    has_full_conversations: bool = False


def parse_pair(row: Row, implicit_string_prompts: bool = False) -> Pair:
    """Return the pair in one row.

    Raises:
        InvalidRecordError: there is none.
    """
    if row.problem:
        raise InvalidRecordError("unreadable row", row.problem)
    if not isinstance(row.value, dict):
        raise InvalidRecordError("not a JSON object", f"it is {describe(row.value)}")
    record, _ = read_form(row.value, implicit_string_prompts)
    return with_system_turn(parse_parts(row, record, implicit_string_prompts), record)


def parse_parts(row: Row, record: dict, implicit_string_prompts: bool) -> Pair:
    """Return the pair in a record with our names, without what its system column says.

    Raises:
        InvalidRecordError: there is none.
    """
    missing = [key for key in ("chosen", "rejected") if record.get(key) is None]
    if len(missing) == 2 and "completion" in record and "label" in record:
        raise InvalidRecordError("unpaired record", "completion and label are for KTO only")
    if missing:
        raise InvalidRecordError("missing response", f"no {' and no '.join(missing)}")
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    for name, part in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if isinstance(part, PythonNotation):
            raise InvalidRecordError(
                "messages in Python's notation",
                f"{name} begins with {part[:16]!r}; write the cell with json.dumps(messages), or "
                "save the data as JSON Lines or Parquet",
            )
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None and not isinstance(prompt, str):
            raise InvalidRecordError(
                "mixes strings and messages", "prompt is not a string, but the responses are"
            )
        if prompt is None and not implicit_string_prompts:
            guess = mapping_line(row.value, only="prompt")
            hint = f"if {guess[0]} is it, set {guess[1]}" if guess else IMPLICIT_HINT
            raise InvalidRecordError("missing prompt", f"strings without a prompt; {hint}")
        parts = string_parts(prompt, chosen, rejected)
        return Pair(*parts, row.number, row.source, parse_tools(record))
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        kinds = f"chosen is {describe(chosen)}, rejected is {describe(rejected)}"
        raise InvalidRecordError("mixes strings and messages", kinds)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        check_messages(name, messages)
        if not messages:
            raise InvalidRecordError("does not end with an assistant turn", f"{name} is empty")
        if (last := messages[-1]["role"]) != "assistant":
            raise InvalidRecordError(
                "does not end with an assistant turn", f"{name} ends with a {last} turn"
            )
    chosen, rejected = with_joined_parts(chosen), with_joined_parts(rejected)
    if chosen == rejected:
        raise InvalidRecordError("identical responses")
    before, chosen, rejected, is_full = message_parts(prompt, chosen, rejected)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if is_empty_response(messages):
            raise InvalidRecordError("empty response", name)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        # A response that goes on with a user turn would score a question, not a response.
        if (first := messages[0]["role"]) != "assistant":
            raise InvalidRecordError(
                "conversations differ before the response", f"{name} continues with a {first} turn"
            )
    return Pair(before, chosen, rejected, row.number, row.source, parse_tools(record), is_full)


def with_system_turn(pair: Pair, record: dict) -> Pair:
    """Return the pair with the text of the record's system column as its first turn.

    Raises:
        InvalidRecordError: the column is not text, or the pair has another system turn.
    """
    system = record.get("system")
    if not isinstance(system, str | None):
        raise InvalidRecordError("system is not text", f"it is {describe(system)}")
    if system is None or not system.strip():
        return pair
    prompt = with_system_text(as_messages(pair.prompt, "user"), system)
    chosen, rejected = (as_messages(part, "assistant") for part in (pair.chosen, pair.rejected))
    return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)


def string_parts(prompt: str | None, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return (prompt, chosen, rejected) of a record of strings.

    Without a prompt, the words that both responses start with become the prompt.

    Raises:
        InvalidRecordError: a response that is empty or equal to the other one.
    """
    if prompt is None:
        shared = shared_words(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise InvalidRecordError("empty response", name)
    if chosen == rejected:
        raise InvalidRecordError("identical responses")
    return prompt, chosen, rejected


def shared_words(a: str, b: str) -> int:
    """Return the length in characters of the whole words that ``a`` and ``b`` both start with.

    A word is never split ("The sky is bl|ue"): the prompt ends before the white space in front of
    the first word that differs.
    """
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    end = min(len(a), len(b)) if same is None else same
    while end > 0 and not a[end - 1].isspace():
        end -= 1
    while end > 0 and a[end - 1].isspace():
        end -= 1
    return end


def message_parts(
    prompt: Any, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message], bool]:
    """Return (prompt, chosen, rejected, has_full_conversations) of a record of messages.

    Raises:
        InvalidRecordError: the prompt is invalid, or does not match the conversations; or they do
            not start the same way.
    """
    if isinstance(prompt, list) and prompt:
        check_messages("prompt", prompt)
        prompt = with_joined_parts(prompt)
        n = len(prompt)
        if not (chosen[:n] == prompt and rejected[:n] == prompt):
            return prompt, chosen, rejected, False
        # The responses repeat the prompt: they are whole conversations.
        return prompt, chosen[n:], rejected[n:], True
    prompt = None if prompt == [] else prompt
    if prompt is not None and not isinstance(prompt, str):
        raise InvalidRecordError("mixes strings and messages", f"prompt is {describe(prompt)}")
    pairs = zip(chosen, rejected, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if shared == 0:
        if prompt is not None and chosen[0]["role"] == "assistant":
            raise InvalidRecordError(
                "mixes strings and messages", "prompt is a string, the responses are not"
            )
        raise InvalidRecordError("conversations do not start the same way")
    before = chosen[:shared]
    if prompt is not None:
        first_user = next((m["content"] for m in before if m["role"] == "user"), None)
        if first_user is None or text_of(first_user).strip() != prompt.strip():
            raise InvalidRecordError(
                "prompt does not match the conversation", "the first user turn is different"
            )
    return before, chosen[shared:], rejected[shared:], True


def parse_tools(record: dict) -> list | None:
    """Return the record's ``tools`` column: a list, or JSON text of one (TRL allows both).

    Raises:
        InvalidRecordError: it is neither.
    """
    tools = record.get("tools")
    if isinstance(tools, str) and not tools.strip():
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        # ValueError: also a number of too many digits. RecursionError: deeply nested brackets.
        except (ValueError, RecursionError) as error:
            raise InvalidRecordError("tools are not a JSON list", str(error)) from None
    if tools is not None and not isinstance(tools, list):
        raise InvalidRecordError("tools are not a JSON list", f"tools is {describe(tools)}")
    return tools or None
