"""Pairs as JSON Lines: what is read again gives the same pairs."""

import io
import json
from typing import Any

import pytest
from helpers.forms import STRINGS, as_chat
from helpers.tiny import assistant, system, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.export import export_pairs, json_line
from mlx_simpo.data.memory import memory_source
from mlx_simpo.data.pairs import Quarantined, load_pairs
from mlx_simpo.data.records import Pair, parse_pair
from mlx_simpo.data.rows import InvalidRecordError, Row

TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {}}}]


def again(pair: Pair) -> Pair:
    """The pair that the line of a pair is read as."""
    line = json_line(pair)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return parse_pair(Row(pair.index, pair.source, json.loads(line)))


def content(pair: Pair) -> tuple[Any, ...]:
    return pair.prompt, pair.chosen, pair.rejected, pair.tools


@pytest.mark.parametrize(
    "record",
    [
        STRINGS[0],
        {"prompt": "", "chosen": "\u2028a\n", "rejected": " é空"},
        as_chat(STRINGS[0], system("s"), tools=TOOLS),
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": "q", "chosen": "half \ud800", "rejected": "b"},
    ],
)
def test_a_line_is_read_as_the_same_pair(record: dict[str, Any]) -> None:
    pair = parse_pair(Row(0, "f:1", record))
    assert content(again(pair)) == content(pair)


def test_other_columns_are_left_behind() -> None:
    pair = parse_pair(Row(0, "f:1", {**STRINGS[0], "score": 1, "id": "x"}))
    assert json.loads(json_line(pair)) == STRINGS[0]


def test_text_stays_readable() -> None:
    assert "é空".encode() in json_line(Pair("é空", "a", "b"))


def test_quarantined_records_are_counted_and_not_written() -> None:
    rows = [*STRINGS[:2], {"prompt": "q", "chosen": "a", "rejected": "a"}, *STRINGS[2:]]
    file = io.BytesIO()
    result = export_pairs(memory_source(rows), file.write)
    assert result.quarantined == [Quarantined("rows[2]", "identical responses")]
    lines = file.getvalue().splitlines()
    assert result.num_pairs == len(lines) == len(STRINGS)
    assert [json.loads(line) for line in lines] == STRINGS


def test_implicit_prompts_become_explicit() -> None:
    rows = [{"chosen": "It is so", "rejected": "It is not"}]
    file = io.BytesIO()
    export_pairs(memory_source(rows), file.write, implicit_string_prompts=True)
    assert json.loads(file.getvalue()) == {"prompt": "It is", "chosen": " so", "rejected": " not"}


TEXT = st.text(st.sampled_from("ab \n\u2028é\ud800"), max_size=4)
TURN = st.builds(lambda role, text: {"role": role, "content": text}, st.just("user"), TEXT)
RESPONSE = TEXT.map(lambda text: [assistant(text)])
RECORD = st.one_of(
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
    st.fixed_dictionaries(
        {
            "prompt": st.lists(TURN, min_size=1, max_size=3),
            "chosen": RESPONSE,
            "rejected": RESPONSE,
        },
        optional={"system": TEXT, "tools": st.just(TOOLS)},
    ),
)


@given(RECORD)
@settings(deadline=None, max_examples=60)
def test_any_pair_is_read_as_the_same(record: dict[str, Any]) -> None:
    try:
        pair = parse_pair(Row(0, "f:1", record))
    except InvalidRecordError:
        return
    assert content(again(pair)) == content(pair)
    assert content(load_pairs([pair]).pairs[0]) == content(pair)
