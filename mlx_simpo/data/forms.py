"""The forms of other tools' records, and how each becomes prompt, chosen and rejected.

A record with our names, or with two whole conversations, is read as it is (see `records`). Any
other must fit exactly one of FORMS; what fits several is never guessed.
"""

import json
import re
from typing import Any, Literal, NamedTuple

from .rows import InvalidRecordError, Message, PythonNotation, shown

Record = dict[str, Any]


class Form(NamedTuple):
    """How one kind of record is read.

    name: for notes and documentation.
    prompt: columns of the prompt. Texts are joined by a line break; messages are in one column,
        which may be an object that holds them and the tools, too.
    kind: what is in them.
    responses: columns of chosen and rejected response, or the one column that lists both.
    """

    name: str
    prompt: tuple[str, ...]
    kind: Literal["text", "messages"]
    responses: tuple[str, ...]


_OURS = ("chosen", "rejected")
_ARGILLA = ("chosen_response", "rejected_response")
FORMS = (
    Form("Alpaca's form", ("instruction", "input"), "text", _OURS),
    Form("LLaMA-Factory's older Alpaca form", ("instruction", "input"), "text", ("output",)),
    Form("argilla's form", ("instruction", "input"), "text", _ARGILLA),
    Form("argilla's form", ("prompt",), "text", _ARGILLA),
    Form("Intel Orca's form", ("question",), "text", _OURS),
    Form("ShareGPT's form", ("conversations",), "messages", _OURS),
    Form("axolotl's form", ("messages",), "messages", _OURS),
    Form("OpenAI's form", ("input",), "messages", ("preferred_output", "non_preferred_output")),
)
# What a reader of JSON can tell a record by.
RESPONSE_COLUMNS = frozenset(column for form in FORMS for column in form.responses)
_TRANSCRIPT = Form("transcripts of Human and Assistant (hh-rlhf)", (), "text", _OURS)

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def read_form(record: Record, implicit_prompts: bool = False) -> tuple[Record, Form | None]:
    """Return a record with our names for prompt, chosen and rejected, and the form that it has.

    Args:
        implicit_prompts: two strings without a prompt are not taken for transcripts.

    Returns:
        (record, None) if it needs no form or fits none.

    Raises:
        InvalidRecordError: it fits several forms, or a value of its form is invalid.
    """
    record = {**record, **{n: _standard(record[n]) for n in ("prompt", *_OURS) if n in record}}
    parts: list[Any] = [record.get(name) for name in ("prompt", *_OURS)]
    prompt, chosen, rejected = parts
    if chosen is not None and rejected is not None:
        if prompt is not None:
            if isinstance(prompt, list) and isinstance(chosen, dict) and isinstance(rejected, dict):
                record |= {"chosen": [chosen], "rejected": [rejected]}
            return record, None
        if is_whole_conversation(chosen) and is_whole_conversation(rejected):
            return record, None
    forms = [form for form in FORMS if _fits(form, record)]
    if len(forms) > 1:
        columns = ["+".join((*form.prompt, *form.responses)) for form in forms]
        raise InvalidRecordError("ambiguous columns", f"it could be {' or '.join(columns)}")
    if forms:
        return _read(forms[0], record), forms[0]
    if prompt is None and _is_transcript(chosen) and _is_transcript(rejected):
        if implicit_prompts:
            return record, None
        return {**record, "chosen": _turns(chosen), "rejected": _turns(rejected)}, _TRANSCRIPT
    return record, None


def is_whole_conversation(value: Any) -> bool:
    """Return whether a response is a list of messages that begins before the response."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and first.get("role") != "assistant"


def _fits(form: Form, record: Record) -> bool:
    return _has_prompt(form, record) and _has_responses(form, record)


def _has_prompt(form: Form, record: Record) -> bool:
    values: list[Any] = [record.get(column) for column in form.prompt]
    if form.kind == "text":
        return any(isinstance(value, str) and value for value in values)
    value = values[0]
    value = value.get("messages") if isinstance(value, dict) else value
    return isinstance(value, PythonNotation) or (isinstance(value, list) and bool(value))


def _has_responses(form: Form, record: Record) -> bool:
    values: list[Any] = [record.get(column) for column in form.responses]
    if len(values) == 1:
        return _is_pair_of_texts(values[0])
    return all(value is not None for value in values)


def _read(form: Form, record: Record) -> Record:
    """Return a record of this form with our names; InvalidRecordError if a value is invalid."""
    tools = record.get("tools")
    responses = [record[column] for column in form.responses]
    chosen, rejected = map(_standard, responses[0] if len(responses) == 1 else responses)
    values: list[Any] = [record.get(column) for column in form.prompt]
    if form.kind == "messages":
        prompt: Any = values[0]
        if isinstance(prompt, dict):
            prompt, tools = prompt["messages"], prompt.get("tools") or tools
        prompt = _standard(prompt)
        last = prompt[-1] if isinstance(prompt, list) else None
        # It may be a whole conversation, whose last turn is one of the responses.
        if isinstance(last, dict) and last.get("role") == "assistant":
            raise InvalidRecordError("prompt ends with an assistant turn", form.prompt[0])
    else:
        for column, value in zip(form.prompt, values, strict=True):
            if not isinstance(value, str | None):
                raise InvalidRecordError("prompt is not text", column)
        prompt = "\n".join(value for value in values if value)
        if record.get("history"):
            prompt = [*_history(record["history"]), _user(prompt)]
    if not all(isinstance(part, str) for part in (prompt, chosen, rejected)):
        prompt = [_user(prompt)] if isinstance(prompt, str) else prompt
        chosen, rejected = _listed(chosen), _listed(rejected)
    parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if form.kind == "messages":
        parts = {name: _with_call_objects(messages) for name, messages in parts.items()}
    return {**parts, "tools": tools, "system": record.get("system")}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _listed(response: Any) -> Any:
    """Return a response as a list of messages, if it is a text or a message."""
    if isinstance(response, str) and not isinstance(response, PythonNotation):
        return [{"role": "assistant", "content": response}]
    return [response] if isinstance(response, dict) else response


def _history(history: Any) -> list[Message]:
    """Return Alpaca's earlier turns; InvalidRecordError unless they are pairs of texts."""
    pairs = [p for p in history if _is_pair_of_texts(p)] if isinstance(history, list) else []
    if not isinstance(history, list) or len(pairs) < len(history):
        raise InvalidRecordError(
            "history is not a list of pairs", "each must be [question, response]"
        )
    turns = [(_user(question), *_listed(response)) for question, response in pairs]
    return [message for turn in turns for message in turn]


def _is_pair_of_texts(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(isinstance(text, str) for text in value)


# --- messages --------------------------------------------------------------------------------


def _standard(value: Any) -> Any:
    """Return messages with role and content in place of ShareGPT's from and value; anything else
    as it is."""
    if isinstance(value, list):
        return [_standard_message(item) for item in value]
    return _standard_message(value) if isinstance(value, dict) else value


def _standard_message(message: Any) -> Any:
    """Return one message with role and content; InvalidRecordError if it cannot have them."""
    if (
        not isinstance(message, dict)
        or "role" in message
        or not message.keys() >= {"from", "value"}
    ):
        return message
    role, value = message["from"], message["value"]
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise InvalidRecordError("unknown role", f"from is {shown(role)}")
    if role == "function_call":
        # Templates that join texts fail without a content.
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(value)}
    return {"role": _SHAREGPT_ROLES[role], "content": value}


def _tool_calls(value: Any) -> list[Record]:
    """Return the calls in ShareGPT's function_call: JSON of {name, arguments}, or of a list.

    Raises:
        InvalidRecordError: it is not.
    """
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls or not all(map(_is_call, calls)):
        raise InvalidRecordError("function_call is not JSON", "it must be {name, arguments}")
    return [{"type": "function", "function": _with_object(call)} for call in calls]


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("name"), str)


def _with_call_objects(messages: Any) -> Any:
    """Return messages whose tool calls have objects as arguments, which is what templates write.

    OpenAI's API has JSON text there, which a template would put into quotes once more.
    """
    if not isinstance(messages, list):
        return messages
    result = []
    for message in messages:
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if isinstance(calls, list):
            message = {**message, "tool_calls": [_with_object(call) for call in calls]}
        result.append(message)
    return result


def _with_object(call: Any) -> Any:
    """Return a tool call, or the function in one, whose arguments are an object if they are JSON
    text of one."""
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": _with_object(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _is_transcript(text: Any) -> bool:
    return isinstance(text, str) and text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def _turns(transcript: Any) -> list[Message]:
    """Return the turns of a transcript in hh-rlhf's notation as messages."""
    roles = {"Human": "user", "Assistant": "assistant"}
    parts = _TURN.split(transcript)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[label], "content": text.strip()} for label, text in pairs]
