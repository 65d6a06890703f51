"""Rows from memory: the same tokens as from a file, the same run, and a run that is resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import captured_display, json_lines, small_run
from helpers.kills import without_times
from helpers.runs import assert_same_run, snapshots
from helpers.settings import error_of
from helpers.stored import plain
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import SimPOConfig, evaluate, inspect, load_config, prepare, resume_config, train
from mlx_simpo.data.records import Pair

ROWS = some_pairs()


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def as_pandas(rows: list[dict[str, Any]]) -> Any:
    import pandas

    return pandas.DataFrame(rows)


def as_polars(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("polars").DataFrame(rows)


def as_arrow(rows: list[dict[str, Any]]) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


KINDS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": lambda rows: rows,
    "tuple": tuple,
    "generator": lambda rows: (row for row in rows),
    "pairs": lambda rows: [Pair(r["prompt"], r["chosen"], r["rejected"]) for r in rows],
    "dataset": as_dataset,
    "pandas": as_pandas,
    "polars": as_polars,
    "arrow": as_arrow,
}


class Rows:
    """Runs on ROWS, from a file or from memory."""

    def __init__(self, model: Path, root: Path) -> None:
        self.model, self.root = model, root
        self.file = write_jsonl(root / "pairs.jsonl", ROWS)

    def config(self, name: str, *settings: str) -> SimPOConfig:
        run = small_run(self.model, Path("null"), self.root / name, "train.save_every=1")
        return load_config(None, [*run, *settings])


@pytest.fixture
def rows(model_folder: Path, tmp_path: Path) -> Rows:
    return Rows(model_folder, tmp_path)


def content(pairs: Any) -> list[tuple]:
    """The pairs without where they come from."""
    return [plain(pair)[:3] for pair in pairs]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_give_the_tokens_of_the_file(kind: str, rows: Rows) -> None:
    file = f"data.train={rows.file}"
    expected = prepare(rows.config("file", file), captured_display()[0])
    session = prepare(rows.config("rows"), captured_display()[0], train=KINDS[kind](ROWS))
    assert content(session.train) == content(expected.train)
    assert content(session.valid) == content(expected.valid)
    both = prepare(
        rows.config("rows"),
        captured_display()[0],
        train=KINDS[kind](ROWS),
        valid=KINDS[kind](ROWS[:5]),
    )
    assert len(both.train) == 12
    assert content(both.valid) == content(both.train)[:5]
    inspected = inspect(rows.config("rows"), KINDS[kind](ROWS), display=captured_display()[0])
    assert content(inspected.pairs) == content(both.train)


def test_a_run_on_rows_is_the_run_on_the_file(rows: Rows) -> None:
    file = train(rows.config("file", f"data.train={rows.file}"), captured_display()[0])
    memory = train(rows.config("memory"), captured_display()[0], train=ROWS)
    (first, second) = (json_lines(r.adapter / "metrics.jsonl")[-1] for r in (file, memory))
    assert without_times(first) == without_times(second)
    assert resume_config(memory.adapter).data.train is None


def test_invalid_rows_are_quarantined_as_in_a_file(rows: Rows) -> None:
    bad = [*ROWS[:5], {"prompt": "no response"}, *ROWS[5:]]
    config = rows.config("bad", "data.max_quarantined=0.2")
    session = prepare(config, captured_display()[0], train=bad, valid={"chat": bad, "code": ROWS})
    assert [(q.source, q.reason) for q in session.quarantined] == [
        ("train[5]", "missing response"),
        ("chat[5]", "missing response"),
    ]
    assert session.sources["train"] == (12, 1, 12, 1.0)
    assert {name: len(pairs) for name, pairs in session.valid_sets.items()} == {
        "chat": 12,
        "code": 12,
    }
    assert session.valid is session.valid_sets["chat"]
    message = error_of(lambda: prepare(rows.config("bad"), captured_display()[0], train=bad))
    assert message.startswith("train: 1 of 13 records are quarantined, more than data.max_quar")


def test_columns_are_those_of_the_settings(rows: Rows) -> None:
    named = [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in ROWS]
    columns = "data.columns={prompt: q, chosen: good, rejected: bad}"
    session = prepare(rows.config("columns", columns), captured_display()[0], train=named)
    expected = prepare(rows.config("plain"), captured_display()[0], train=ROWS)
    assert content(session.train) == content(expected.train)


def test_evaluate_takes_rows(rows: Rows) -> None:
    adapter = train(rows.config("run"), captured_display()[0], train=ROWS).adapter
    config = rows.config("run")
    named = rows.config("run", f"data.valid={rows.file}")
    expected = evaluate(named, adapter, captured_display()[0])
    results = evaluate(config, adapter, captured_display()[0], valid=ROWS)
    assert {n: e.metrics for n, e in results.items()} == {n: e.metrics for n, e in expected.items()}
    sets = evaluate(config, None, captured_display()[0], valid={"a": ROWS[:3], "b": ROWS})
    assert sets["base/b"].metrics == expected["base"].metrics
    assert len(sets["base/a"].pairs) == 3


def test_rows_with_a_split_are_an_error(rows: Rows) -> None:
    message = error_of(lambda: inspect(rows.config("x"), ROWS, "train"))
    assert message == "the split is 'train', but rows from memory have none; remove it"


# --- resuming --------------------------------------------------------------------------------


def test_a_run_on_rows_is_resumed_with_the_same_rows(rows: Rows, tmp_path: Path) -> None:
    with snapshots(tmp_path / "killed") as copies:
        whole = train(rows.config("run"), captured_display()[0], train=ROWS)
    killed = copies[2]
    train(resume_config(killed), captured_display()[0], train=as_dataset(ROWS), resume=True)
    assert_same_run(killed, whole.adapter)
    other = [*ROWS[:-1], ROWS[-1] | {"chosen": "Something else."}]
    message = error_of(
        lambda: train(resume_config(copies[3]), captured_display()[0], train=other, resume=True)
    )
    assert "the training pairs changed" in message


def test_a_run_on_rows_cannot_be_resumed_without_them(rows: Rows, tmp_path: Path) -> None:
    with snapshots(tmp_path / "killed") as copies:
        train(rows.config("run"), captured_display()[0], train=ROWS)
    config = resume_config(copies[2])
    assert error_of(lambda: train(config, captured_display()[0], resume=True)) == (
        f"the run in {copies[2]} was begun with rows from memory, which have to be passed again, "
        f"in Python: train(resume_config('{copies[2]}'), train=rows, resume=True)"
    )
