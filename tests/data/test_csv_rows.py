"""CSV and TSV: cells as people's programs write them, messages in cells, errors with the line."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.forms import STRINGS, as_chat, tokens, write_csv
from helpers.tiny import assistant, user, write_jsonl

from mlx_simpo import SimPOError, load_pairs
from mlx_simpo.data.csv_rows import csv_rows, tsv_rows
from mlx_simpo.data.rows import Row
from mlx_simpo.data.sources import open_source
from mlx_simpo.data.text_files import text_file


def rows_of(folder: Path, text: str, name: str = "a.csv") -> list[Row]:
    path = folder / name
    path.write_bytes(text.encode())
    return [*(tsv_rows if name.endswith("tsv") else csv_rows)(text_file(path))]


def error_of(folder: Path, text: str) -> str:
    with pytest.raises(SimPOError) as caught:
        rows_of(folder, text)
    return str(caught.value).removeprefix(str(folder / "a.csv"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_cells_and_lines(tmp_path: Path, name: str, delimiter: str, end: str) -> None:
    lines = ["prompt|chosen|rejected|", '"a,;\t', '""b"""|c|', "", "||", "d|e", "f|g|h|i|j"]
    text = end.join(lines).replace("|", delimiter)
    rows = rows_of(tmp_path, text, name)
    source = f"{tmp_path / name}:"
    cells = [{"prompt": f'a,;\t{end}"b"', "chosen": "c", "rejected": None}]
    cells.append({"prompt": "d", "chosen": "e"})
    assert rows == [
        Row(0, f"{source}2", cells[0]),  # its first line; blank rows are no records
        Row(0, f"{source}6", cells[1]),
        Row(0, f"{source}7", None, "5 cells, but the first row has 4"),
    ]


def test_empty_cells_are_absent(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,tools,system\nq,a,b,,\nq,,b,,\n")
    result = load_pairs(str(tmp_path / "a.csv"))
    (pair,) = result.pairs
    assert (pair.prompt, pair.tools) == ("q", None)
    assert [q.reason for q in result.quarantined] == ["missing response"]


def test_a_long_cell(tmp_path: Path) -> None:
    """Longer than the 131 072 characters that Python's csv allows by itself."""
    (row,) = rows_of(tmp_path, f"prompt,chosen\nq,{'a' * 200_000}\n")
    assert len(row.value["chosen"]) == 200_000


def test_the_index_of_pandas_is_no_column(tmp_path: Path) -> None:
    pd.DataFrame(STRINGS).to_csv(tmp_path / "a.csv")
    assert [row.value for row in open_source(str(tmp_path / "a.csv")).rows()] == STRINGS


MESSAGES = [user("q"), assistant("a")]


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        (json.dumps(MESSAGES), MESSAGES),
        (json.dumps(MESSAGES, indent=1), MESSAGES),
        (json.dumps(assistant("a")), assistant("a")),
        ('[{"from": "human", "value": "q"}]', [{"from": "human", "value": "q"}]),
        ('{"messages": [{"role": "user", "content": "q"}]}', {"messages": [user("q")]}),
        # A prompt or response that is JSON by itself, or looks like it.
        *(
            (text, text)
            for text in ("[1, 2]", '["a", "b"]', '{"a": 1}', "[]", "{}", "[x", "{{ x }}")
        ),
        *(
            (text, text)
            for text in ('[{"role": "user"}]', "{'a': 1}", '[{"from": "a"}]', "5", "null")
        ),
    ],
)
def test_messages_in_a_cell(tmp_path: Path, cell: str, value: Any) -> None:
    write_csv(tmp_path / "a.csv", [{"prompt": cell, "chosen": "a"}])
    (row,) = csv_rows(text_file(tmp_path / "a.csv"))
    assert row.value == {"prompt": value, "chosen": "a"}


def test_history_in_a_cell(tmp_path: Path) -> None:
    record = {"instruction": "q", "history": [["a", "b"]], "chosen": "c", "rejected": "d"}
    write_csv(tmp_path / "a.csv", [record])
    (row,) = csv_rows(text_file(tmp_path / "a.csv"))
    assert row.value == record


def test_messages_in_pythons_notation_are_quarantined_with_the_remedy(tmp_path: Path) -> None:
    """What pandas writes of a column of lists: it would be trained on as text."""
    records = [as_chat(pair) for pair in STRINGS]
    pd.DataFrame(records).to_csv(tmp_path / "a.csv", index=False)
    result = load_pairs(str(tmp_path / "a.csv"))
    assert result.pairs == []
    assert result.quarantined[0][1:] == (
        "messages in Python's notation",
        "prompt begins with \"[{'role': 'user'\"; write the cell with json.dumps(messages), or "
        "save the data as JSON Lines or Parquet",
    )


@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_pythons_notation_in_the_prompt_of_another_form(tmp_path: Path, form: str) -> None:
    record = {form: str([user("q")]), "chosen": "a", "rejected": "b"}
    write_csv(tmp_path / "a.csv", [record])
    (reason,) = [q.reason for q in load_pairs(str(tmp_path / "a.csv")).quarantined]
    assert reason == "messages in Python's notation"


def test_pythons_notation_in_a_column_that_is_not_used(tmp_path: Path) -> None:
    records = [{**pair, "messages": str([user("q")])} for pair in STRINGS]
    write_csv(tmp_path / "a.csv", records)
    plain = write_jsonl(tmp_path / "a.jsonl", STRINGS)
    assert tokens(open_source(str(tmp_path / "a.csv"))) == tokens(open_source(str(plain)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'prompt,chosen\nq,a\n"q,a\nb,c\n',
            ":4: invalid CSV: unexpected end of data; a cell with ",
        ),
        ('prompt,chosen\n"q"x,a\n', ":2: invalid CSV: ',' expected after '\"'; a cell with quotes"),
        ("prompt,a,b,a\n1,2,3,4\n", " has two columns called 'a'; rename one of them"),
    ],
)
def test_invalid_files(tmp_path: Path, text: str, message: str) -> None:
    """Without strictness, an open quote would take the rest of the file into one response."""
    assert error_of(tmp_path, text).startswith(message)


@pytest.mark.parametrize("text", ["", "\n", "prompt,chosen,rejected\n"])
def test_files_without_records(tmp_path: Path, text: str) -> None:
    assert rows_of(tmp_path, text) == []
    assert open_source(str(tmp_path / "a.csv")).count() == 0
