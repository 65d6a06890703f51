"""JSON documents: lists of records, objects with one, and errors that name the line."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.forms import STRINGS
from helpers.tiny import assistant, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import SimPOError
from mlx_simpo.data import json_rows as module
from mlx_simpo.data.json_rows import count_json, json_rows, jsonl_rows
from mlx_simpo.data.sources import open_source
from mlx_simpo.data.text_files import text_file

PAIR = STRINGS[0]
MUST = 'it must be a list of records, an object with one such list ({"data": [...]}), or JSON Lines'


def values(folder: Path, text: str, name: str = "a.json") -> list[Any]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    read = json_rows if name.endswith("json") else jsonl_rows
    return [row.value for row in read(text_file(path))]


def error_of(folder: Path, text: str) -> str:
    with pytest.raises(SimPOError) as caught:
        values(folder, text)
    message = str(caught.value)
    assert message.startswith(str(folder / "a.json"))
    return message.removeprefix(str(folder / "a.json"))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([PAIR, PAIR]),
        json.dumps([PAIR, PAIR], indent=1),
        json.dumps({"data": [PAIR, PAIR]}),
        json.dumps({"rows": [PAIR, PAIR], "n": 2, "tags": ["a", "b"], "info": {"x": []}}),
        json.dumps({"n": 2, "empty": [], "examples": [PAIR, PAIR]}, indent=4),
        f"{json.dumps(PAIR)}\n{json.dumps(PAIR)}",
        f"\n \n{json.dumps(PAIR)}\n\n{json.dumps(PAIR)}\n",
    ],
)
def test_where_the_records_are(tmp_path: Path, text: str) -> None:
    assert values(tmp_path, text) == [PAIR, PAIR]
    assert count_json(text_file(tmp_path / "a.json")) == 2


CHAT = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        CHAT,
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {}, "rejected": {}},
        {"query": "q", "good": "a", "bad": "b"},
        {"query": [user("q")], "good": [assistant("a")], "bad": "b"},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_may_be_the_only_record(tmp_path: Path, record: Any, indent: int | None) -> None:
    assert values(tmp_path, json.dumps(record, indent=indent)) == [record]


@pytest.mark.parametrize("text", ["", " \n", "[]", " [ ] \n"])
def test_no_records(tmp_path: Path, text: str) -> None:
    assert values(tmp_path, text) == []


def test_elements_that_are_no_records_are_rows(tmp_path: Path) -> None:
    assert values(tmp_path, '[1, null, "a", {}, [], 2.5]') == [1, None, "a", {}, [], 2.5]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[{},\n{} {}]", ":2: invalid JSON: no , or ] where it must be; "),
        ('[{},\n\n{"a" 1}]', ":3: invalid JSON: Expecting ':' delimiter; "),
        ('[{},\n{"a": "b', ":2: invalid JSON: Unterminated string starting at; "),
        ("[{}", ":1: invalid JSON: no , or ] where it must be; "),
        ("[{},\n", ":2: invalid JSON: Expecting value; "),
        ("[\n" + "[" * 100_000, ":2: invalid JSON: maximum recursion depth exceeded"),
        ("[\n" + "1" * 5000 + "]", ":2: invalid JSON: Exceeds the limit (4300 digits)"),
        ("[{}]\n[{}]", ":2: invalid JSON: more than one JSON value, and not one per line; "),
        ('{"a":\n1}\n{"a": 2}', ":3: invalid JSON: more than one JSON value"),
        ('"text"', ":1: invalid JSON: neither a list nor an object; "),
        ('{"data": [{}],\n "n" 1}', ":2: invalid JSON: no : where it must be; "),
    ],
)
def test_an_invalid_document_is_an_error_that_names_the_line(
    tmp_path: Path, text: str, problem: str
) -> None:
    message = error_of(tmp_path, text)
    assert message.startswith(problem)
    assert message.endswith(MUST)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (
            {"train": [PAIR], "test": [PAIR]},
            "with several lists of records (train, test)",
        ),
        (
            {"prompt": {"0": "q"}, "chosen": {"0": "a"}, "rejected": {"0": "b"}},
            "with one object per column",
        ),
    ],
)
def test_objects_that_hold_no_one_list(tmp_path: Path, value: Any, what: str) -> None:
    assert error_of(tmp_path, json.dumps(value)) == (
        f' is a JSON object {what}; {MUST} (pandas writes them with to_json(FILE, orient="records",'
        " lines=True))"
    )


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_under_the_ending_of_json_lines(tmp_path: Path, indent: int | None) -> None:
    assert values(tmp_path, json.dumps([PAIR, PAIR], indent=indent), "a.jsonl") == [PAIR, PAIR]
    assert open_source(str(tmp_path / "a.jsonl")).count() == 2


def test_a_list_that_holds_no_records_is_one_row(tmp_path: Path) -> None:
    for line in ([1], [], ["a", PAIR]):
        assert values(tmp_path, json.dumps(line), "a.jsonl") == [line]
        assert open_source(str(tmp_path / "a.jsonl")).count() == 1


def test_a_list_among_json_lines_is_one_row(tmp_path: Path) -> None:
    assert values(tmp_path, f"[1]\n{json.dumps(PAIR)}\n", "a.jsonl") == [[1], PAIR]
    assert open_source(str(tmp_path / "a.jsonl")).count() == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=6), st.integers(1, 9), st.sampled_from([None, 0, 2]))
@settings(deadline=None, max_examples=60)
def test_a_document_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], chunk: int, indent: int | None
) -> None:
    """However little of it is in memory at a time; lines are those of the elements."""
    text = json.dumps(records, indent=indent, ensure_ascii=False)
    path = tmp_path_factory.getbasetemp() / "document.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_CHARACTERS", chunk)
        rows = [*json_rows(text_file(path))]
    assert [row.value for row in rows] == records
    if indent is not None:
        before = [json.dumps(records[:n], indent=indent)[:-1].rstrip() for n in range(len(records))]
        lines = [2 + part.count("\n") for part in before]
        assert [int(row.source.rpartition(":")[2]) for row in rows] == lines


def test_a_name_that_occurs_twice_is_told(tmp_path: Path) -> None:
    """The last one would win, and nobody knows which is meant."""
    line = '{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}'
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n{line}\n", "utf-8")
    first, second = jsonl_rows(text_file(path))
    assert (first.value, first.problem) == (PAIR, None)
    assert second.problem == "invalid JSON: 'chosen' occurs twice in one object"
    for text in (f"[{json.dumps(PAIR)},\n{line}]", f"\n{line}", f'{{"data": [\n{line}]}}'):
        assert error_of(tmp_path, text) == (
            f":2: invalid JSON: 'chosen' occurs twice in one object; {MUST}"
        )
