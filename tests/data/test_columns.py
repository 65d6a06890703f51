"""Columns by other names, and data that nothing can read: one error with the columns there are."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.forms import STRINGS, human, tokens, write_format
from helpers.tiny import assistant, some_pairs, tiny_tokenizer, user, write_jsonl

from mlx_simpo import DataConfig, SimPOError, SourceConfig, load_config, load_pairs
from mlx_simpo.data.encode import Encoder
from mlx_simpo.data.keys import token_key
from mlx_simpo.data.sources import open_source

RENAMED = [{"q": p["prompt"], "good": p["chosen"], "bad": p["rejected"]} for p in STRINGS]
COLUMNS = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def error_of(rows: list[Any], columns: dict[str, str] | None = None) -> str:
    with pytest.raises(SimPOError) as caught:
        load_pairs(rows, columns=columns)
    return str(caught.value)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".arrow", "saved~dataset"])
def test_mapped_columns_give_the_same_tokens(tmp_path: Path, kind: str) -> None:
    path = write_format(tmp_path, kind, RENAMED)
    source = open_source(SourceConfig(str(path), columns=COLUMNS))
    assert tokens(source) == tokens(open_source(str(write_jsonl(tmp_path / "p.jsonl", STRINGS))))


def test_the_setting_reaches_the_source(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RENAMED)
    setting = "data.columns={prompt: q, chosen: good, rejected: bad}"
    config = load_config(None, ["model=m", f"data.train={path}", setting])
    (source,) = config.data.train_sources()
    assert [row.value for row in open_source(source).rows()] == STRINGS


def test_the_cache_tells_mappings_apart(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**row, "z": "zz"} for row in RENAMED])
    encoder = Encoder(tiny_tokenizer(), DataConfig())
    keys = set()
    for columns in (COLUMNS, COLUMNS | {"prompt": "z"}, COLUMNS | {"system": "z"}):
        keys.add(token_key(encoder, open_source(SourceConfig(str(path), columns=columns))))
    assert len(keys) == 3


def test_a_mapped_column_replaces_one_of_our_name() -> None:
    rows = [{**pair, "other": "another prompt"} for pair in STRINGS]
    pairs = load_pairs(rows, columns={"prompt": "other"}).pairs
    assert [pair.prompt for pair in pairs] == ["another prompt"] * len(STRINGS)


def test_a_mapped_system_column() -> None:
    rows = [{**pair, "persona": "Be kind"} for pair in STRINGS]
    (first, *_) = load_pairs(rows, columns={"system": "persona"}).pairs
    assert first.prompt[0] == {"role": "system", "content": "Be kind"}


def test_a_named_prompt_settles_what_would_be_ambiguous() -> None:
    record = {"question": "q", "instruction": "i", "chosen": "a", "rejected": "b"}
    assert "ambiguous columns" in error_of([record])
    (pair,) = load_pairs([record], columns={"prompt": "instruction"}).pairs
    assert pair.prompt == "i"


def test_named_responses_leave_the_form_of_the_prompt() -> None:
    record = {"instruction": "i", "input": "j", "good": "a", "bad": "b"}
    (pair,) = load_pairs([record], columns={"chosen": "good", "rejected": "bad"}).pairs
    assert pair.prompt == "i\nj"


def test_a_mapped_column_of_sharegpt_messages() -> None:
    record = {"talk": [human("q")], "good": assistant("a"), "bad": assistant("b")}
    columns = {"prompt": "talk", "chosen": "good", "rejected": "bad"}
    (pair,) = load_pairs([record], columns=columns).pairs
    assert (pair.prompt, pair.chosen) == ([user("q")], [assistant("a")])


# --- errors ----------------------------------------------------------------------------------


def test_unknown_names_of_ours() -> None:
    assert error_of(STRINGS, {"response": "good"}) == (
        "data.columns has 'response'; it names the columns for prompt, chosen, rejected, system, "
        "tools, as in {prompt: question}"
    )


def test_one_column_for_two_names() -> None:
    columns = {"prompt": "q", "chosen": "good", "rejected": "good"}
    assert error_of(RENAMED, columns).startswith("data.columns uses one column for two names: ")


def test_a_column_that_is_not_there() -> None:
    assert error_of(RENAMED, COLUMNS | {"prompt": "question"}) == (
        "rows has no column 'question', which data.columns names for prompt; it has q, good, bad; "
        "name them, perhaps with 'data.columns={prompt: q, chosen: good, rejected: bad}' "
        "(docs/data.md has every accepted form)"
    )


def test_a_column_that_only_a_late_record_has(tmp_path: Path) -> None:
    rows = [*some_pairs(150), {**STRINGS[0], "persona": "Be kind"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    result = load_pairs(str(path), columns={"system": "persona"})
    assert [isinstance(pair.prompt, list) for pair in result.pairs] == [False] * 150 + [True]


def test_data_that_nothing_recognizes_is_one_error() -> None:
    """Not as many quarantined records as there are."""
    rows = [{"query": "q", "good": "a", "bad": "b", "score": 1}] * 200
    message = error_of(rows)
    assert message == (
        "rows: no record has columns that are recognized as prompt, chosen and rejected; it has "
        "query, good, bad, score; name them, perhaps with 'data.columns={prompt: query, chosen: "
        "good, rejected: bad}' (docs/data.md has every accepted form)"
    )
    # What it suggests, pasted, reads the data.
    (setting,) = [part for part in shlex.split(message) if part.startswith("data.columns=")]
    columns = load_config(None, ["model=m", setting]).data.columns
    assert len(load_pairs(rows, columns=columns).pairs) == 200


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([{"prompt": "q", "a": "x", "b": "y"}], "chosen: …, rejected: …}'"),
        ([{"x": "q", "a": "x", "b": "y"}], "name them in data.columns={prompt: …, chosen: …, rej"),
        ([{"prompt": "q", "chosen": "a"}], "{prompt: prompt, chosen: chosen, rejected: …}"),
        ([{"chosen": [assistant("a")], "rejected": [assistant("b")], "q": "x"}], "{prompt: q, "),
    ],
)
def test_what_cannot_be_guessed_is_left_to_fill_in(rows: list[Any], part: str) -> None:
    message = error_of(rows)
    assert "no record has columns that are recognized" in message
    assert part in message


def test_many_columns_are_not_all_listed() -> None:
    assert "c39, …; name" in error_of([{f"c{n}": "x" for n in range(60)}])


def test_one_recognized_record_is_enough() -> None:
    """The others are quarantined one by one, with their reasons."""
    result = load_pairs([*[{"prompt": "q"}] * 150, STRINGS[0]])
    assert len(result.pairs) == 1
    assert {q.reason for q in result.quarantined} == {"missing response"}


def test_records_for_kto_have_a_reason_of_their_own() -> None:
    result = load_pairs([{"prompt": "q", "completion": "a", "label": True}])
    assert [q.reason for q in result.quarantined] == ["unpaired record"]


@pytest.mark.parametrize("rows", [[], [5, "x"]])
def test_data_without_records_is_not_about_columns(tmp_path: Path, rows: list[Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for columns in (None, COLUMNS):
        source = open_source(SourceConfig(str(path), columns=columns))
        assert source.count() == len(rows)


def test_a_record_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", STRINGS[:1])
    with path.open("a") as file:
        file.write('{"prompt": ' + "[" * 700 + "]" * 700 + "}\n")
    assert [row.problem is None for row in open_source(str(path)).rows()] == [True, False]


def test_nulls_within_mapped_columns_are_absent() -> None:
    """Tables have a null wherever another message has a key."""
    message = assistant("a") | {"tool_calls": None, "name": None}
    row = {"q": [user("q") | {"name": None}], "good": [message], "bad": [assistant("b")]}
    (pair,) = load_pairs([row], columns=COLUMNS).pairs
    assert (pair.prompt, pair.chosen) == ([user("q")], [assistant("a")])


def test_a_prompt_that_is_named_is_not_read_from_another_column() -> None:
    row = {"q": "this", "instruction": "not this", "output": ["a", "b"]}
    assert load_pairs([row]).pairs[0].prompt == "not this"
    assert "no record has columns that are recognized" in error_of([row], {"prompt": "q"})


def test_columns_without_names_are_numbered() -> None:
    rows = pd.DataFrame([["p", "c", "r"]])
    assert "it has 0, 1, 2; name them in data.columns=" in error_of(rows)  # type: ignore[arg-type]
    pairs = load_pairs(rows, columns={"prompt": "0", "chosen": "1", "rejected": "2"}).pairs
    assert (pairs[0].prompt, pairs[0].chosen, pairs[0].rejected) == ("p", "c", "r")


def test_names_with_line_breaks_are_told_on_one_line() -> None:
    message = error_of([{"the\nprompt": "p", "good": "a"}])
    assert "it has 'the\\nprompt', good; name them" in message
    assert "\n" not in message
