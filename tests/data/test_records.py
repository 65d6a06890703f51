"""Every accepted form becomes the right pair, every other record an error with its reason."""

import json
from dataclasses import replace
from typing import Any

import pytest
from helpers.tiny import assistant, system, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.messages import ROLES
from mlx_simpo.data.records import Pair, parse_pair
from mlx_simpo.data.rows import InvalidRecordError, PythonNotation, Row

Q, A, B = user("q"), assistant("a"), assistant("b")
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "noon"}}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "blue", "tool_call_id": "1"}
PARTS = [{"type": "text", "text": "q"}]
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {}}}]


def parse(record: Any, implicit: bool = False) -> Pair:
    row = Row(7, "pairs.jsonl:9", record)
    return parse_pair(row, True) if implicit else parse_pair(row)


def rejection(record: Any, implicit: bool = False) -> tuple[str, str]:
    """(reason, detail) of a record that must be rejected."""
    with pytest.raises(InvalidRecordError) as caught:
        parse(record, implicit)
    reason, *detail = caught.value.args
    return reason, "".join(detail)


def strings(prompt: str = "q", chosen: str = "a", rejected: str = "b") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chats(chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {**more, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("record", "prompt", "chosen", "rejected", "is_full"),
    [
        (strings(), "q", "a", "b", False),
        (strings(" q\n", " a", "a "), " q\n", " a", "a ", False),
        (chats([A], [B], prompt=[Q]), [Q], [A], [B], False),
        (chats([A], [B], prompt=[system("s"), Q]), [system("s"), Q], [A], [B], False),
        (chats([A], [B], prompt=[Q, B, Q]), [Q, B, Q], [A], [B], False),
        (chats([CALLING, TOOL, A], [B], prompt=[Q]), [Q], [CALLING, TOOL, A], [B], False),
        (chats([CALLING], [B], prompt=[Q]), [Q], [CALLING], [B], False),
        (chats([A], [B], prompt=[user(PARTS)]), [user("q")], [A], [B], False),
        # Implicit: the beginning that both conversations share.
        (chats([Q, A], [Q, B]), [Q], [A], [B], True),
        (chats([system("s"), Q, A], [system("s"), Q, B]), [system("s"), Q], [A], [B], True),
        (chats([Q, B, Q, A], [Q, B, Q, B]), [Q, B, Q], [A], [B], True),
        (chats([Q, CALLING, TOOL, A], [Q, CALLING, TOOL, B]), [Q, CALLING, TOOL], [A], [B], True),
        (chats([Q, CALLING, TOOL, A], [Q, B]), [Q], [CALLING, TOOL, A], [B], True),
        (chats([user(PARTS), A], [user(PARTS), B]), [user("q")], [A], [B], True),
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
        (chats([user(PARTS), A], [user(PARTS), B], prompt="q"), [user("q")], [A], [B], True),
        (chats([Q, B, Q, A], [Q, B, Q, B], prompt="q"), [Q, B, Q], [A], [B], True),
        # Responses that repeat the prompt's messages.
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
def test_accepted_forms(
    record: dict, prompt: Any, chosen: Any, rejected: Any, is_full: bool
) -> None:
    expected = Pair(prompt, chosen, rejected, 7, "pairs.jsonl:9", None, is_full)
    assert parse(record) == expected
    assert parse({**record, "score_chosen": 9.5, "id": "x", "messages": [Q, A]}) == expected


def test_a_pair_from_nowhere() -> None:
    assert Pair("q", "a", "b") == Pair("q", "a", "b", 0, "", None, False)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("record", [strings(), chats([Q, A], [Q, B])])
def test_tools_as_list_and_as_json(record: dict, tools: Any) -> None:
    assert parse({**record, "tools": tools}).tools == TOOLS


@pytest.mark.parametrize("tools", [None, [], "[]", "null", " \n"])
def test_no_tools(tools: Any) -> None:
    assert parse({**strings(), "tools": tools}).tools is None


NO_RECORD = [
    ([1, 2], "not a JSON object", "it is a list"),
    ("text", "not a JSON object", "it is a string"),
    (None, "not a JSON object", "it is null"),
    ({"prompt": "q", "completion": "a", "label": True}, "unpaired record", "KTO"),
    ({"prompt": "q", "completion": "a"}, "missing response", "no chosen and no rejected"),
    ({"prompt": "q", "label": True}, "missing response", "no chosen and no rejected"),
    ({"chosen": "a", "completion": "a", "label": True}, "missing response", "no rejected"),
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
    (chats([Q, A], [Q, A, Q, B]), "empty response", "chosen"),
    (chats([Q, A, B], [Q, A], prompt=[Q, A]), "empty response", "rejected"),
]
FIRST = "the first user turn is different"
DISAGREEING = [
    (chats([Q, A], [user("z"), B]), "conversations do not start the same way", ""),
    (chats([A], [B]), "conversations do not start the same way", ""),
    (chats([Q, A], [user("z"), B], prompt="q"), "conversations do not start the same way", ""),
    (chats([system("s"), Q, A], [Q, B]), "conversations do not start the same way", ""),
    (chats([Q, A], [Q, B], prompt="z"), "prompt does not match the conversation", FIRST),
    (chats([Q, A], [Q, B], prompt=""), "prompt does not match the conversation", FIRST),
    (
        chats([system("q"), A], [system("q"), B], prompt="q"),
        "prompt does not match the conversation",
        FIRST,
    ),
]
ROLE_OR_CONTENT = [
    (
        chats([Q, A, Q], [Q, B]),
        "does not end with an assistant turn",
        "chosen ends with a user turn",
    ),
    (
        chats([Q, A], [Q, TOOL]),
        "does not end with an assistant turn",
        "rejected ends with a tool turn",
    ),
    (chats([], [Q, B]), "does not end with an assistant turn", "chosen is empty"),
    (chats([], []), "does not end with an assistant turn", "chosen is empty"),
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
    (
        chats("a", "b", prompt=[Q]),
        "mixes strings and messages",
        "prompt is not a string, but the responses are",
    ),
    (chats([A], [B], prompt="q"), "mixes strings and messages", "prompt is a string"),
    (chats([Q, A], [Q, B], prompt=5), "mixes strings and messages", "prompt is 5"),
    (chats(1, 2, prompt="q"), "mixes strings and messages", "chosen is 1"),
    (chats(A, B, prompt="q"), "mixes strings and messages", "chosen is {"),
    (chats(["a"], ["b"], prompt=["q"]), "mixes strings and messages", "chosen[0] is not a message"),
    (chats([Q, A], [Q, None]), "mixes strings and messages", "rejected[1] is not a message"),
    (chats([A], [B], prompt=[{"content": "q"}]), "mixes strings and messages", "prompt[0]"),
]
OTHER = [
    (chats("The sky is blue", "The sky is red"), "missing prompt", "data.implicit_string_prompts"),
    (
        chats("blue", "red", my_query="The sky?"),
        "missing prompt",
        "if my_query is it, set 'data.columns={prompt: my_query}'",
    ),
    *(
        (
            chats("a", "b", prompt="q") | {name: PythonNotation("[{'role': 'user'}]")},
            "messages in Python's notation",
            f"""{name} begins with "[{{'role': 'user'"; write the cell""",
        )
        for name in ("prompt", "chosen", "rejected")
    ),
    (strings() | {"system": 5}, "system is not text", "it is 5"),
    (
        chats([A], [B], prompt=[system("t"), Q], system="s"),
        "two different system turns",
        "the system column differs",
    ),
    ({**strings(), "tools": "[{"}, "tools are not a JSON list", "line 1 column 3"),
    ({**strings(), "tools": "9" * 5000}, "tools are not a JSON list", "4300 digits"),
    ({**strings(), "tools": "[" * 100_000}, "tools are not a JSON list", "recursion depth"),
    ({**strings(), "tools": '{"a": 1}'}, "tools are not a JSON list", "tools is {'a': 1}"),
    ({**strings(), "tools": {"a": 1}}, "tools are not a JSON list", "tools is {'a': 1}"),
]


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [*NO_RECORD, *IDENTICAL_OR_EMPTY, *DISAGREEING, *ROLE_OR_CONTENT, *MIXED, *OTHER],
)
def test_rejected_records(record: Any, reason: str, detail: str) -> None:
    actual_reason, actual_detail = rejection(record)
    assert actual_reason == reason
    assert detail in actual_detail


def test_an_unreadable_row_is_rejected_with_its_problem() -> None:
    with pytest.raises(InvalidRecordError) as caught:
        parse_pair(Row(3, "pairs.jsonl:4", None, "invalid JSON: x"))
    assert caught.value.args == ("unreadable row", "invalid JSON: x")


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (chats([user("z"), A], [user("z"), B], prompt=[Q]), "chosen"),
        (chats([Q, A], [A, B], prompt=[Q]), "chosen"),
        (chats([A, B], [Q, B], prompt=[Q]), "rejected"),
        (chats([Q, A], [Q, B], prompt=[system("s"), Q]), "chosen"),
        (chats([system("s"), Q, A], [system("s"), user("z"), B]), "chosen"),
        (chats([Q, A], [Q, user("z"), B]), "rejected"),
    ],
    ids=[
        "both repeat another prompt",
        "only chosen repeats the prompt",
        "only rejected repeats the prompt",
        "a part of the prompt is repeated",
        "the same system turn, another question",
        "rejected has a second question",
    ],
)
def test_a_user_turn_is_never_scored_as_a_response(record: dict, name: str) -> None:
    """The prompt is what comes before the first difference: what follows must be the assistant's
    on both sides, or the two responses are to different questions."""
    reason = "conversations differ before the response"
    assert rejection(record) == (reason, f"{name} continues with a user turn")


def test_an_empty_list_of_messages_counts_as_no_prompt() -> None:
    pair = parse(chats([Q, A], [Q, B], prompt=[]))
    assert (pair.prompt, pair.chosen, pair.rejected) == ([Q], [A], [B])
    assert pair.has_full_conversations


@pytest.mark.parametrize("text", [5, ["a"], {"a": 1}])
def test_a_part_whose_text_is_not_a_string(text: Any) -> None:
    record = chats([assistant([{"type": "text", "text": text}])], [B], prompt=[Q])
    assert rejection(record) == (
        "content is not text",
        "content of chosen[0] is a list with other parts than text",
    )


def test_columns_of_other_trainers_are_ignored() -> None:
    pair = parse({**strings(), "completion": "a", "label": 1})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "a", "b")


def test_implicit_prompts_do_not_change_an_explicit_one() -> None:
    pair = parse(strings("q", "Yes, it is", "Yes, it was"), implicit=True)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "Yes, it is", "Yes, it was")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is black", "The sky is"),
        ("The sky is blue.", "The sky isn't.", "The sky"),
        ("Human: q\n\nAssistant: a", "Human: q\n\nAssistant: b", "Human: q\n\nAssistant:"),
        ("The sky is blue", "The sky", "The"),  # a response keeps at least a word
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
def test_rejected_implicit_string_prompts(chosen: str, rejected: str, reason: str) -> None:
    assert rejection(chats(chosen, rejected), implicit=True)[0] == reason


def parse_or_reason(record: Any, implicit: bool) -> Pair | str:
    try:
        return parse(record, implicit)
    except InvalidRecordError as error:
        return "".join(error.args[:1])


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
    for whole, response in ((chosen, str(pair.chosen)), (rejected, str(pair.rejected))):
        assert prompt + response == whole
        assert prompt.split() + response.split() == whole.split()
        assert not prompt or (response[0].isspace() and not prompt[-1].isspace())


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
def test_any_record_becomes_a_pair_or_is_rejected(record: Any, implicit: bool) -> None:
    pair = parse_or_reason(record, implicit)
    if isinstance(pair, str):
        return
    assert (pair.index, pair.source) == (7, "pairs.jsonl:9")
    assert pair.chosen != pair.rejected
    assert type(pair.prompt) is type(pair.chosen) is type(pair.rejected)
    for response in (pair.chosen, pair.rejected):
        assert response
        assert isinstance(response, str) or response[-1]["role"] == "assistant"


# --- what would be a wrong pair without a word ---------------------------------------------------


@pytest.mark.parametrize("record", [strings(), chats([Q, A], [Q, B]), chats([A], [B], prompt=[Q])])
def test_a_system_column_is_the_first_turn(record: dict) -> None:
    """Everything else stays as it is; text without anything is no system turn."""
    without = parse({**record, "tools": TOOLS})
    for blank in (None, "", " \n"):
        assert parse({**record, "tools": TOOLS, "system": blank}) == without
    expected = replace(without, prompt=[system(" s"), Q], chosen=[A], rejected=[B])
    assert parse({**record, "tools": TOOLS, "system": " s"}) == expected


@pytest.mark.parametrize("turns", [[system("s")], [system(" s\n")], [system([*PARTS[:0], "s"])]])
def test_a_system_column_is_not_written_beside_the_same_turn(turns: list[Any]) -> None:
    pair = parse(chats([A], [B], prompt=[*turns, Q], system="s"))
    assert [m["role"] for m in pair.prompt] == ["system", "user"]  # type: ignore[index]


def test_parts_of_text_become_one_text() -> None:
    """Most templates write a list as Python shows it, or nothing of it."""
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": None}]
    pair = parse(chats([assistant(parts)], [B], prompt=[user(parts)]))
    assert (pair.prompt, pair.chosen) == ([user("ab")], [assistant("ab")])


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "image_url", "image_url": "x"}, {}])
def test_parts_that_are_not_text_are_quarantined(part: dict) -> None:
    content = [*PARTS, part]
    reason = ("content is not text", "content of prompt[0] is a list with other parts than text")
    assert rejection(chats([A], [B], prompt=[user(content)])) == reason


@pytest.mark.parametrize(
    "calls",
    ["text", CALL, [1], ["x"], [None], [{}], [{"function": 5}], [{"function": {"name": 5}}]],
)
def test_tool_calls_that_are_none_are_quarantined(calls: Any) -> None:
    """A template would write a text character by character."""
    reason = ("tool calls are not a list of calls", "each in chosen[0] must have a name")
    assert rejection(chats([assistant("a", tool_calls=calls)], [B], prompt=[Q])) == reason


@pytest.mark.parametrize("role", [["user"], {"a": 1}, None, 5, "User"])
def test_any_value_can_stand_for_a_role(role: Any) -> None:
    for message in ({"role": role, "content": "a"}, {"from": role, "value": "a"}):
        assert rejection(chats([message], [B], prompt=[Q]))[0] == "unknown role"


def test_a_number_of_too_many_digits_can_be_told() -> None:
    huge = 10**5000
    assert rejection(chats([{"from": huge, "value": "a"}], [B]))[0] == "unknown role"
    assert rejection(chats(huge, "b", prompt="q")) == (
        "mixes strings and messages",
        "chosen is a value of type int, rejected is a string",
    )
