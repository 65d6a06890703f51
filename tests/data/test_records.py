"""Every accepted form becomes the right pair, every other record a refusal with its reason."""

import json
from typing import Any

import pytest
from helpers.tiny import assistant, system, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.records import ROLES, InvalidRecordError, Pair, parse_pair
from mlx_simpo.data.sources import Row

Q, A, B = user("q"), assistant("a"), assistant("b")
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "noon"}}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "blue", "tool_call_id": "1"}
PARTS = [{"type": "text", "text": "q"}]
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {}}}]


def parse(record: Any, implicit: bool = False) -> Pair:
    return parse_pair(Row(7, "pairs.jsonl:9", record), implicit)


def refusal(record: Any, implicit: bool = False) -> tuple[str, str]:
    """(reason, detail) of a record that must be refused."""
    with pytest.raises(InvalidRecordError) as caught:
        parse(record, implicit)
    reason, *detail = caught.value.args
    return reason, "".join(detail)


def strings(prompt: str = "q", chosen: str = "a", rejected: str = "b") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chats(chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {**more, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("record", "prompt", "chosen", "rejected", "whole"),
    [
        (strings(), "q", "a", "b", False),
        (strings(" q\n", " a", "a "), " q\n", " a", "a ", False),
        (chats([A], [B], prompt=[Q]), [Q], [A], [B], False),
        (chats([A], [B], prompt=[system("s"), Q]), [system("s"), Q], [A], [B], False),
        (chats([A], [B], prompt=[Q, B, Q]), [Q, B, Q], [A], [B], False),
        (chats([CALLING, TOOL, A], [B], prompt=[Q]), [Q], [CALLING, TOOL, A], [B], False),
        (chats([CALLING], [B], prompt=[Q]), [Q], [CALLING], [B], False),
        (chats([A], [B], prompt=[user(PARTS)]), [user(PARTS)], [A], [B], False),
        # Implicit: the beginning that both conversations share.
        (chats([Q, A], [Q, B]), [Q], [A], [B], True),
        (chats([system("s"), Q, A], [system("s"), Q, B]), [system("s"), Q], [A], [B], True),
        (chats([Q, B, Q, A], [Q, B, Q, B]), [Q, B, Q], [A], [B], True),
        (chats([Q, CALLING, TOOL, A], [Q, CALLING, TOOL, B]), [Q, CALLING, TOOL], [A], [B], True),
        (chats([Q, CALLING, TOOL, A], [Q, B]), [Q], [CALLING, TOOL, A], [B], True),
        (chats([user(PARTS), A], [user(PARTS), B]), [user(PARTS)], [A], [B], True),
        # ultrafeedback_binarized: a string prompt beside whole conversations.
        (chats([Q, A], [Q, B], prompt="q"), [Q], [A], [B], True),
        (chats([user(" q\n"), A], [user(" q\n"), B], prompt="q "), [user(" q\n")], [A], [B], True),
        (
            chats([system("s"), Q, A], [system("s"), Q, B], prompt="q"),
            [system("s"), Q],
            [A],
            [B],
            True,
        ),
        (chats([user(PARTS), A], [user(PARTS), B], prompt="q"), [user(PARTS)], [A], [B], True),
        (chats([Q, B, Q, A], [Q, B, Q, B], prompt="q"), [Q, B, Q], [A], [B], True),
        # Answers that repeat the prompt's messages.
        (chats([Q, A], [Q, B], prompt=[Q]), [Q], [A], [B], True),
        (
            chats([system("s"), Q, A], [system("s"), Q, B], prompt=[system("s"), Q]),
            [system("s"), Q],
            [A],
            [B],
            True,
        ),
    ],
)
def test_accepted_forms(record: dict, prompt: Any, chosen: Any, rejected: Any, whole: bool) -> None:
    expected = Pair(prompt, chosen, rejected, 7, "pairs.jsonl:9", None, whole)
    assert parse(record) == expected
    assert parse({**record, "score_chosen": 9.5, "id": "x", "messages": [Q, A]}) == expected


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("record", [strings(), chats([Q, A], [Q, B])])
def test_tools_as_list_and_as_json(record: dict, tools: Any) -> None:
    assert parse({**record, "tools": tools}).tools == TOOLS


@pytest.mark.parametrize("tools", [None, [], "[]", "null"])
def test_no_tools(tools: Any) -> None:
    assert parse({**strings(), "tools": tools}).tools is None


NO_RECORD = [
    ([1, 2], "not a JSON object", "a JSON list"),
    ("text", "not a JSON object", "a JSON str"),
    (None, "not a JSON object", "NoneType"),
    ({"prompt": "q", "completion": "a", "label": True}, "unpaired record", "KTO"),
    ({}, "missing response", "no chosen and no rejected"),
    ({"prompt": "q", "chosen": "a"}, "missing response", "no rejected"),
    ({"prompt": "q", "chosen": None, "rejected": "b"}, "missing response", "no chosen"),
]
IDENTICAL_OR_EMPTY = [
    (strings("q", "a", "a"), "identical responses", ""),
    (chats([Q, A], [Q, A]), "identical responses", ""),
    (chats([A], [A], prompt=[Q]), "identical responses", ""),
    (strings("q", "", "b"), "empty response", "chosen"),
    (strings("q", "a", " \n\t"), "empty response", "rejected"),
    (strings("q", "", ""), "empty response", "chosen"),
    (chats([Q, assistant("")], [Q, B]), "empty response", "chosen"),
    (chats([A], [assistant(" ")], prompt=[Q]), "empty response", "rejected"),
    (chats([assistant([])], [A], prompt=[Q]), "empty response", "chosen"),
    (chats([assistant([{"type": "text"}])], [A], prompt=[Q]), "empty response", "chosen"),
    (chats([Q, A, Q, B], [Q, A]), "empty response", "rejected"),
]
DISAGREEING = [
    (chats([Q, A], [user("z"), B]), "conversations do not start the same way", ""),
    (chats([A], [B]), "conversations do not start the same way", ""),
    (chats([system("s"), Q, A], [Q, B]), "conversations do not start the same way", ""),
    (chats([Q, A], [Q, B], prompt="z"), "prompt does not match the conversation", "first user"),
    (chats([Q, A], [Q, B], prompt=""), "prompt does not match the conversation", "first user"),
    (
        chats([system("q"), A], [system("q"), B], prompt="q"),
        "prompt does not match the conversation",
        "first user",
    ),
]
ROLE_OR_CONTENT = [
    (chats([Q, A, Q], [Q, B]), "does not end with an assistant turn", "chosen ends with user"),
    (chats([Q, A], [Q, TOOL]), "does not end with an assistant turn", "rejected ends with tool"),
    (chats([], [Q, B]), "does not end with an assistant turn", "chosen ends with nothing"),
    (chats([], []), "does not end with an assistant turn", "chosen ends with nothing"),
    (chats([{"role": "human", "content": "q"}, A], [Q, B]), "unknown role", "chosen[0]"),
    (chats([A], [B], prompt=[{"role": "User", "content": "q"}]), "unknown role", "prompt[0]"),
    (chats([Q, A], [Q, {"role": None, "content": "b"}]), "unknown role", "rejected[1]"),
    (chats([Q, A], [Q, {"role": ["user"], "content": "b"}]), "unknown role", "rejected[1]"),
    (chats([Q, assistant(None)], [Q, B]), "missing content", "chosen[1]"),
    (chats([A], [B], prompt=[user(None)]), "missing content", "prompt[0]"),
    (chats([A], [B], prompt=[{"role": "user"}]), "missing content", "prompt[0]"),
    (chats([Q, assistant(None, tool_calls=[])], [Q, B]), "missing content", "chosen[1]"),
    (chats([Q, assistant(5)], [Q, B]), "content is not text", "chosen[1]"),
    (chats([Q, assistant({"a": 1})], [Q, B]), "content is not text", "chosen[1]"),
]
MIXED = [
    (chats("a", [B], prompt="q"), "mixes strings and messages", "chosen is a string"),
    (chats([A], "b", prompt=[Q]), "mixes strings and messages", "rejected is a string"),
    (chats("a", "b", prompt=[Q]), "mixes strings and messages", "prompt is no string"),
    (chats([A], [B], prompt="q"), "mixes strings and messages", "prompt is a string"),
    (chats([Q, A], [Q, B], prompt=5), "mixes strings and messages", "prompt is 5"),
    (chats(1, 2, prompt="q"), "mixes strings and messages", "chosen is 1"),
    (chats(A, B, prompt="q"), "mixes strings and messages", "chosen is {"),
    (chats(["a"], ["b"], prompt=["q"]), "mixes strings and messages", "chosen[0] is no m"),
    (chats([Q, A], [Q, None]), "mixes strings and messages", "rejected[1] is no message"),
    (chats([A], [B], prompt=[{"content": "q"}]), "mixes strings and messages", "prompt[0]"),
]
OTHER = [
    (chats("The sky is blue", "The sky is red"), "no prompt", "data.implicit_string_prompts"),
    ({**strings(), "tools": "[{"}, "tools are not a JSON list", ""),
    ({**strings(), "tools": '{"a": 1}'}, "tools are not a JSON list", ""),
    ({**strings(), "tools": {"a": 1}}, "tools are not a JSON list", ""),
]


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [*NO_RECORD, *IDENTICAL_OR_EMPTY, *DISAGREEING, *ROLE_OR_CONTENT, *MIXED, *OTHER],
)
def test_refused_records(record: Any, reason: str, detail: str) -> None:
    found_reason, found_detail = refusal(record)
    assert found_reason == reason
    assert detail in found_detail


def test_an_unreadable_row_keeps_its_problem() -> None:
    with pytest.raises(InvalidRecordError) as caught:
        parse_pair(Row(3, "pairs.jsonl:4", None, "invalid JSON: x"))
    assert caught.value.args == ("unreadable row", "invalid JSON: x")


@pytest.mark.parametrize(
    "record",
    [
        chats([user("z"), A], [user("z"), B], prompt=[Q]),
        chats([Q, A], [B], prompt=[Q]),
        chats([Q, A], [Q, B], prompt=[system("s"), Q]),
        chats([system("s"), Q, A], [system("s"), user("z"), B]),
    ],
    ids=[
        "the prompt's messages disagree",
        "only chosen repeats the prompt",
        "a part of the prompt is repeated",
        "the same system turn, another question",
    ],
)
def test_a_question_is_no_answer(record: dict) -> None:
    """The specification quarantines a shared part that differs, and a prompt that disagrees with
    the first user turn."""
    refusal(record)


def test_an_empty_message_list_is_no_prompt() -> None:
    try:
        pair = parse(chats([Q, A], [Q, B], prompt=[]))
    except InvalidRecordError:
        return
    assert (pair.prompt, pair.chosen, pair.rejected) == ([Q], [A], [B])


@pytest.mark.parametrize("text", [5, ["a"], {"a": 1}])
def test_a_part_whose_text_is_no_text(text: Any) -> None:
    refusal(chats([assistant([{"type": "text", "text": text}])], [B], prompt=[Q]))


def test_extra_columns_of_other_trainers() -> None:
    pair = parse({**strings(), "completion": "a", "label": 1})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "a", "b")


def test_an_explicit_prompt_takes_nothing_from_the_answers() -> None:
    pair = parse(strings("q", "Yes, it is", "Yes, it was"), implicit=True)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "Yes, it is", "Yes, it was")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is black", "The sky is"),
        ("The sky is blue.", "The sky isn't.", "The sky"),
        ("Human: q\n\nAssistant: a", "Human: q\n\nAssistant: b", "Human: q\n\nAssistant:"),
        ("The sky is blue", "The sky", "The"),  # an answer keeps at least a word
        ("one", "two", ""),
        (" one", " two", ""),
        ("x  a", "x \na", "x"),
        ("空は青い", "空は赤い", ""),
    ],
)
def test_implicit_string_prompts(chosen: str, rejected: str, prompt: str) -> None:
    pair = parse(chats(chosen, rejected), implicit=True)
    cut = len(prompt)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen[cut:], rejected[cut:])


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [("one two", "one two", "identical responses"), ("one two", "one ", "empty response")],
)
def test_implicit_string_prompts_refused(chosen: str, rejected: str, reason: str) -> None:
    assert refusal(chats(chosen, rejected), implicit=True)[0] == reason


def parse_or_reason(record: Any, implicit: bool) -> Pair | str:
    try:
        return parse(record, implicit)
    except InvalidRecordError as refused:
        return "".join(refused.args[:1])


TEXT = st.text(st.sampled_from("ab. \n\t\u00a0é"), max_size=8)


@given(TEXT, TEXT, TEXT)
@settings(deadline=None, max_examples=60)
def test_implicit_string_prompts_never_split_a_word(shared: str, one: str, two: str) -> None:
    chosen, rejected = shared + one, shared + two
    pair = parse_or_reason(chats(chosen, rejected), implicit=True)
    if isinstance(pair, str):
        assert pair in ("identical responses", "empty response")
        return
    prompt = str(pair.prompt)
    for whole, answer in ((chosen, str(pair.chosen)), (rejected, str(pair.rejected))):
        assert prompt + answer == whole
        assert prompt.split() + answer.split() == whole.split()
        assert not prompt or (answer[0].isspace() and not prompt[-1].isspace())


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "role", "content"]), inner, max_size=3)
    ),
    max_leaves=6,
)
PART = st.fixed_dictionaries({"type": st.just("text")}, optional={"text": st.none() | st.text()})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES) | JUNK},
    optional={"content": st.text(max_size=3) | JUNK | st.lists(PART), "tool_calls": JUNK},
)
GOOD = st.sampled_from([Q, A, B, CALLING, TOOL])
ANY = st.text(max_size=5) | st.lists(GOOD | MESSAGE, max_size=4) | st.lists(GOOD) | JUNK
RECORD = st.fixed_dictionaries(
    {"chosen": ANY, "rejected": ANY}, optional={"prompt": ANY, "tools": JUNK, "label": JUNK}
)


@given(RECORD, st.booleans())
@settings(deadline=None, max_examples=60)
def test_whatever_stands_in_a_row_is_a_pair_or_refused(record: Any, implicit: bool) -> None:
    pair = parse_or_reason(record, implicit)
    if isinstance(pair, str):
        return
    assert (pair.index, pair.source) == (7, "pairs.jsonl:9")
    assert pair.chosen != pair.rejected
    assert type(pair.prompt) is type(pair.chosen) is type(pair.rejected)
    for answer in (pair.chosen, pair.rejected):
        assert answer
        assert isinstance(answer, str) or answer[-1]["role"] == "assistant"
