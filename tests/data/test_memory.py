"""Rows in memory: the same tokens as from a file, whatever holds them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers.forms import FORMS, STRINGS, as_chat, in_form, tokens
from helpers.tiny import some_pairs, system, tiny_tokenizer, write_jsonl

from mlx_simpo import DataConfig, SimPOError, load_pairs
from mlx_simpo.data.encode import Encoder
from mlx_simpo.data.keys import NotCacheableError, token_key
from mlx_simpo.data.memory import memory_source
from mlx_simpo.data.sources import open_source

CHATS = [as_chat(pair, system("Be kind")) for pair in STRINGS]


def polars_frame(rows: list[Any]) -> Any:
    return pytest.importorskip("polars").DataFrame(rows)


def parquet_frame(rows: list[Any]) -> pd.DataFrame:
    """pandas has lists in its cells as NumPy arrays when they come from Parquet."""
    return pa.Table.from_pylist(rows).to_pandas()


HOLDERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda rows: (row for row in rows),
    "Dataset": datasets.Dataset.from_list,
    "Dataset in a format": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "IterableDataset": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "pandas": pd.DataFrame,
    "pandas from Parquet": parquet_frame,
    "polars": polars_frame,
    "pyarrow": pa.Table.from_pylist,
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("rows", [STRINGS, CHATS], ids=["strings", "messages"])
def test_rows_in_memory_give_the_tokens_of_a_file(
    tmp_path: Path, holder: str, rows: list[Any]
) -> None:
    source = memory_source(HOLDERS[holder](rows))
    expected = tokens(open_source(str(write_jsonl(tmp_path / "a.jsonl", rows))))
    assert tokens(source) == expected
    assert tokens(source) == expected  # an iterator, too, is read from the start again


@pytest.mark.parametrize("holder", ["list", "Dataset", "pandas", "polars"])
@pytest.mark.parametrize("form", ["ShareGPT's form", "OpenAI's form", "Intel Orca's form"])
def test_forms_in_memory(holder: str, form: str) -> None:
    assert form in FORMS
    rows, expected = in_form(form)
    assert tokens(memory_source(HOLDERS[holder](rows))) == tokens(memory_source(expected))


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_location_of_a_record(holder: str) -> None:
    rows = [*STRINGS[:2], {**STRINGS[2], "rejected": STRINGS[2]["chosen"]}]
    source = memory_source(HOLDERS[holder](rows), "valid")
    assert [row.source for row in source.rows()] == ["valid[0]", "valid[1]", "valid[2]"]
    (quarantined,) = load_pairs(HOLDERS[holder](rows)).quarantined
    assert quarantined == ("rows[2]", "identical responses", "")


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, pd.NaT, pd.NA])
def test_missing_cells_are_absent(missing: Any) -> None:
    frame = pd.DataFrame([*STRINGS, *some_pairs(1)]).astype(object)
    frame["system"] = missing
    frame.loc[6, "rejected"] = missing
    result = load_pairs(frame)
    assert [pair.prompt for pair in result.pairs] == [row["prompt"] for row in STRINGS]
    assert [q.reason for q in result.quarantined] == ["missing response"]


def test_columns_in_memory() -> None:
    rows = [{"q": p["prompt"], "good": p["chosen"], "bad": p["rejected"]} for p in STRINGS]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    expected = tokens(memory_source(STRINGS))
    for holder in ("list", "generator", "pandas"):
        assert tokens(memory_source(HOLDERS[holder](rows), columns=columns)) == expected


def test_pairs_are_rows() -> None:
    """What `load_pairs` returns, filtered for example."""
    for rows in (STRINGS, CHATS):
        assert tokens(memory_source(load_pairs(rows).pairs)) == tokens(memory_source(rows))


def test_a_generator_is_read_once() -> None:
    read = []

    def rows() -> Any:
        for row in STRINGS:
            read.append(row)
            yield row

    source = memory_source(rows())
    assert read == STRINGS
    assert [row.value for row in source.rows()] == [row.value for row in source.rows()] == STRINGS
    assert read == STRINGS


def test_records_are_not_changed() -> None:
    rows = [{**pair, "system": None, "tools": []} for pair in STRINGS]
    copy = [dict(row) for row in rows]
    assert len(load_pairs(rows).pairs) == len(rows)
    assert rows == copy


def test_rows_in_memory_are_not_cached() -> None:
    with pytest.raises(NotCacheableError, match="rows has no files that would reveal a change"):
        token_key(Encoder(tiny_tokenizer(), DataConfig()), memory_source(STRINGS))


# --- what is not accepted --------------------------------------------------------------------

ACCEPTED = (
    "a list or an iterator of records (dicts with prompt, chosen and rejected), a "
    "datasets.Dataset, or a pandas or polars DataFrame"
)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("q", "a", "b")],
            f"rows[0] is a tuple; rows must be {ACCEPTED}; write "
            '{"prompt": …, "chosen": …, "rejected": …}',
        ),
        (iter(["q"]), f"rows[0] is a str; rows must be {ACCEPTED}; write "),
        (5, f"rows is a int; it must be {ACCEPTED}"),
        (None, f"rows is a NoneType; it must be {ACCEPTED}"),
        (
            {"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]},
            f"rows is a dict; it must be {ACCEPTED}; datasets.Dataset.from_dict makes a dataset of "
            "a dict of columns",
        ),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list(STRINGS)}),
            f"rows is a DatasetDict; it must be {ACCEPTED}; choose one of its splits, e.g. "
            "['train']",
        ),
        (
            Path("a.jsonl"),
            f"rows is the text 'a.jsonl'; it must be {ACCEPTED}; the name of a file or dataset "
            "belongs into data.train or data.valid",
        ),
    ],
)
def test_what_is_not_accepted(rows: Any, message: str) -> None:
    with pytest.raises(SimPOError) as caught:
        memory_source(rows)
    assert str(caught.value).startswith(message)


def test_a_lazy_frame_must_be_collected() -> None:
    lazy = pytest.importorskip("polars").DataFrame(STRINGS).lazy()
    with pytest.raises(SimPOError, match=r"rows is a LazyFrame; pass rows\.collect\(\)"):
        memory_source(lazy)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_single_column_is_an_error(library: str) -> None:
    frame = pytest.importorskip(library).DataFrame(STRINGS)
    message = r"rows is a Series, a single column; .* pass the whole data frame"
    with pytest.raises(SimPOError, match=message):
        memory_source(frame["prompt"])


def test_a_split_of_rows_in_memory_is_an_error() -> None:
    with pytest.raises(SimPOError, match="rows in memory have no split or subset; remove these"):
        load_pairs(STRINGS, "train")


def test_a_path_is_a_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", STRINGS)
    assert load_pairs(path) == load_pairs(str(path))


# --- odd rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pd.DataFrame, pa.table])
def test_two_columns_of_one_name_are_an_error(kind: Any) -> None:
    """pandas and pyarrow would return the last one."""
    names = ["prompt", "chosen", "rejected", "prompt"]
    if kind is pd.DataFrame:
        rows = pd.DataFrame([["a", "b", "c", "d"]], columns=names)
    else:
        rows = pa.table([[text] for text in "abcd"], names=names)
    with pytest.raises(SimPOError) as caught:
        memory_source(rows)
    assert str(caught.value) == "rows has two columns called 'prompt'; rename one of them"


def test_a_series_is_no_table() -> None:
    with pytest.raises(SimPOError, match=r"^rows is a Series, a single column; it must be a list"):
        memory_source(pd.Series(["a", "b"]))


def test_rows_that_hold_themselves_are_quarantined() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    deep: list[Any] = []
    for _ in range(3000):
        deep = [deep]
    result = load_pairs([STRINGS[0], {**STRINGS[1], "x": endless}, {**STRINGS[2], "x": deep}])
    assert [pair.index for pair in result.pairs] == [0]
    assert [(q.source, q.reason) for q in result.quarantined] == [
        ("rows[1]", "unreadable row"),
        ("rows[2]", "unreadable row"),
    ]


def test_names_of_keys_are_text() -> None:
    """As in JSON, which the token cache writes of a prompt."""
    row = {**CHATS[0], "prompt": [{**CHATS[0]["prompt"][0], 5: 1}]}
    (pair,) = load_pairs([row]).pairs
    assert pair.prompt[0]["5"] == 1  # type: ignore[index]
