"""Every form of record gives the tokens of plain records that mean the same; others a reason."""

from pathlib import Path
from typing import Any

import pytest
from helpers.forms import FORMS, STRINGS, as_chat, gpt, human, in_form, tokens
from helpers.tiny import assistant, system, user, write_jsonl

from mlx_simpo import SimPOError, load_pairs
from mlx_simpo.data import forms as forms_module
from mlx_simpo.data.export import export_pairs
from mlx_simpo.data.forms import read_form
from mlx_simpo.data.memory import memory_source
from mlx_simpo.data.records import parse_pair
from mlx_simpo.data.rows import InvalidRecordError, Row
from mlx_simpo.data.sources import open_source

# The forms that need no note: ours, and TRL's.
OWN = ("strings",)


def rejection(record: Any) -> tuple[str, str]:
    """(reason, detail) of a record that must be quarantined."""
    with pytest.raises(InvalidRecordError) as caught:
        parse_pair(Row(0, "f:1", record))
    reason, *detail = caught.value.args
    return reason, "".join(detail)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_the_tokens_of_plain_records(tmp_path: Path, form: str) -> None:
    records, expected = in_form(form)
    source = open_source(str(write_jsonl(tmp_path / "form.jsonl", records)))
    assert tokens(source) == tokens(open_source(str(write_jsonl(tmp_path / "p.jsonl", expected))))
    # Read again from what `data convert` writes of it.
    with (tmp_path / "converted.jsonl").open("wb") as file:
        export_pairs(source, file.write)
    converted = open_source(str(tmp_path / "converted.jsonl"))
    assert converted.note is None
    assert tokens(converted) == tokens(source)


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_noted(form: str) -> None:
    source = memory_source(in_form(form)[0])
    if form in OWN:
        assert source.note is None
    else:
        name = form.partition(" with")[0]
        assert source.note is not None
        is_form = name not in ("system column", "ultrafeedback")
        assert (f"rows is read as {name}" in source.note) is is_form
        assert is_form or source.note == "the system column of rows becomes the first turn"


def test_every_form_is_tested() -> None:
    tested = {form.partition(" with")[0] for form in FORMS}
    assert {form.name for form in forms_module.FORMS} <= tested


def test_mixed_forms_are_all_noted() -> None:
    rows = [in_form("Intel Orca's form")[0][0], in_form("argilla's form")[0][1]]
    note = str(memory_source(rows).note)
    assert "Intel Orca's form (prompt from question, " in note
    assert "argilla's form (prompt from instruction and input, responses from chosen_resp" in note


# --- the system column -----------------------------------------------------------------------


def test_a_system_column_changes_the_tokens() -> None:
    """Negative control: it was ignored, and the template's default system turn was trained."""
    with_column = [{**pair, "system": "Be kind"} for pair in STRINGS]
    assert tokens(memory_source(with_column)) != tokens(memory_source(STRINGS))


@pytest.mark.parametrize("blank", ["", "  \n", None])
def test_a_blank_system_column_is_absent(blank: str | None) -> None:
    rows = [{**pair, "system": blank} for pair in STRINGS]
    assert tokens(memory_source(rows)) == tokens(memory_source(STRINGS))


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_turn_is_not_repeated_by_the_column(role: str) -> None:
    turn = {"role": role, "content": "Be kind"}
    chat = [as_chat(pair, turn) for pair in STRINGS]
    with_column = [{**record, "system": " Be kind"} for record in chat]
    assert tokens(memory_source(with_column)) == tokens(memory_source(chat))


def test_two_different_system_turns_are_quarantined() -> None:
    record = as_chat(STRINGS[0], system("Be kind")) | {"system": "Be brief"}
    assert rejection(record) == (
        "two different system turns",
        "the system column differs from the conversation's",
    )


def test_a_system_column_must_be_text() -> None:
    record = {**STRINGS[0], "system": ["Be kind"]}
    assert rejection(record) == ("system is not text", "it is a list")


# --- what is not read ------------------------------------------------------------------------

Q, A, B = user("q"), assistant("a"), assistant("b")


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        (
            {"question": "q", "instruction": "q", "chosen": "a", "rejected": "b"},
            "ambiguous columns",
            "it could be instruction+input+chosen+rejected or question+chosen+rejected",
        ),
        (
            {
                "instruction": "q",
                "chosen": "gpt-4",
                "rejected": "llama",
                "chosen_response": "a",
                "rejected_response": "b",
            },
            "ambiguous columns",
            "or instruction+input+chosen_response+rejected_response",
        ),
        (
            {"conversations": [human("q")], "messages": [Q], "chosen": A, "rejected": B},
            "ambiguous columns",
            "it could be conversations+chosen+rejected or messages+chosen+rejected",
        ),
        (
            {"messages": [Q, A], "chosen": A, "rejected": B},
            "prompt ends with an assistant turn",
            "messages",
        ),
        (
            {"conversations": [{"from": "bing", "value": "q"}], "chosen": "a", "rejected": "b"},
            "unknown role",
            "from is 'bing'",
        ),
        (
            {
                "conversations": [human("q"), {"from": "function_call", "value": "look"}],
                "chosen": gpt("a"),
                "rejected": gpt("b"),
            },
            "function_call is not JSON",
            "it must be {name, arguments}",
        ),
        (
            {"instruction": "q", "history": [["a"]], "chosen": "a", "rejected": "b"},
            "history is not a list of pairs",
            "each must be [question, response]",
        ),
        (
            {"instruction": "q", "history": 5, "chosen": "a", "rejected": "b"},
            "history is not a list of pairs",
            "each must be [question, response]",
        ),
        (
            {"instruction": "q", "input": 5, "chosen": "a", "rejected": "b"},
            "prompt is not text",
            "input",
        ),
        (
            {"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("")},
            "empty response",
            "rejected",
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: z\n\nAssistant: b"},
            "conversations do not start the same way",
            "",
        ),
        (
            {"query": "q", "chosen": "a", "rejected": "b"},
            "missing prompt",
            "strings without a prompt; if query is it, set 'data.columns={prompt: query}'",
        ),
    ],
)
def test_records_that_are_not_read(record: Any, reason: str, detail: str) -> None:
    actual_reason, actual_detail = rejection(record)
    assert actual_reason == reason
    assert detail in actual_detail


def test_ambiguous_data_is_an_error_with_the_mapping() -> None:
    rows = [{"question": "q", "instruction": "i", "chosen": "a", "rejected": "b"}]
    with pytest.raises(SimPOError) as caught:
        memory_source(rows)
    assert str(caught.value) == (
        "rows: ambiguous columns: it could be instruction+input+chosen+rejected or "
        "question+chosen+rejected; it has question, instruction, chosen, rejected; name them, "
        "perhaps with 'data.columns={prompt: question, chosen: chosen, rejected: rejected}' "
        "(docs/data.md has every accepted form)"
    )
    mapped = load_pairs(rows, columns={"prompt": "question"})
    assert (mapped.pairs[0].prompt, mapped.quarantined) == ("q", [])


@pytest.mark.parametrize("other", ["question", "instruction", "input", "conversations", "messages"])
def test_our_own_names_win_over_those_of_other_forms(other: str) -> None:
    record = {**STRINGS[0], other: "something else", "chosen_response": "x", "output": ["y", "z"]}
    assert read_form(record) == (record, None)


def test_whole_conversations_need_no_form() -> None:
    """ultrafeedback_binarized has a column of messages that ends with a response."""
    record = {"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}
    assert parse_pair(Row(0, "f:1", record)).prompt == [Q]


def test_implicit_prompts_are_not_taken_for_transcripts() -> None:
    texts = ["\n\nHuman: q\n\nAssistant: yes it is", "\n\nHuman: q\n\nAssistant: yes it was"]
    pair = parse_pair(Row(0, "f:1", dict(zip(("chosen", "rejected"), texts, strict=True))), True)
    assert pair.prompt == "\n\nHuman: q\n\nAssistant: yes it"


def test_a_transcript_with_other_text_before_it_is_no_transcript() -> None:
    texts = {
        name: f"\n\nSystem: s\n\nHuman: q\n\nAssistant: {name}" for name in ("chosen", "rejected")
    }
    assert rejection(texts)[0] == "missing prompt"


def test_a_message_beside_a_list_of_messages() -> None:
    pair = parse_pair(Row(0, "f:1", {"prompt": [Q], "chosen": A, "rejected": B}))
    assert (pair.chosen, pair.rejected) == ([A], [B])
