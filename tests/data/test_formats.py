"""The same records in every format of file and in memory give the same tokens, and train."""

import tracemalloc
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers.commands import captured_display, small_run
from helpers.forms import FORMATS, FORMS, STRINGS, as_chat, in_form, tokens, write_format
from helpers.tiny import system, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import SimPOError, load_config, load_pairs, prepare
from mlx_simpo.data.records import parse_pair
from mlx_simpo.data.rows import InvalidRecordError, Source
from mlx_simpo.data.sources import FORMATS as ENDINGS
from mlx_simpo.data.sources import open_source

MESSAGES = [as_chat(pair, system("Be kind")) for pair in STRINGS]
# Cells with what CSV must quote, and an empty one.
AWKWARD = [
    {"prompt": 'a "b",\n\n c;\td', "chosen": " x\r\ny ", "rejected": '"', "system": ""},
    {"prompt": "é 空", "chosen": '["a", "b"]', "rejected": "{'a': 1}", "system": "s"},
]


def test_every_ending_is_tested() -> None:
    assert set(ENDINGS) == {kind.rpartition("~")[2] for kind in FORMATS} - {"dataset"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("records", [STRINGS, MESSAGES, AWKWARD], ids=["text", "chat", "awkward"])
def test_a_format_gives_the_tokens_of_json_lines(
    tmp_path: Path, kind: str, records: list[Any]
) -> None:
    source = open_source(str(write_format(tmp_path, kind, records)))
    expected = open_source(str(write_jsonl(tmp_path / "expected.jsonl", records)))
    assert tokens(source) == tokens(expected)
    assert [row.number for row in source.rows()] == list(range(len(records)))
    assert all(row.source.startswith(source.name) for row in source.rows())


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (".jsonl", 3),
        (".jsonl.gz", 3),
        (".jsonl.zst", 3),
        ("lines~.json", 3),
        (".json", 12),  # five lines each, after one with a bracket
        (".json.zst", 12),
        ("wrapped~.json", 1),
        (".csv", 4),
        (".tsv.gz", 4),
        (".parquet", 3),
        (".arrow", 3),
        ("stream~.arrow", 3),
        ("saved~dataset", 3),
    ],
)
def test_the_location_of_a_record(tmp_path: Path, kind: str, number: int) -> None:
    """Lines of text, and rows of tables, both from 1."""
    bad = [*STRINGS[:2], {**STRINGS[2], "rejected": STRINGS[2]["chosen"]}, *STRINGS[3:]]
    path = write_format(tmp_path, kind, bad)
    assert [q.source for q in load_pairs(str(path)).quarantined] == [f"{path}:{number}"]


# --- two steps of training -------------------------------------------------------------------

PLAIN = [kind for kind in FORMATS if not kind.endswith((".gz", ".zst"))]
# Each form in one format, and each format with one form, as far as its cells can hold it.
CASES = [(form, PLAIN[n % len(PLAIN)]) for n, form in enumerate(FORMS)]
CASES += [("strings", kind) for kind in FORMATS if kind not in dict(CASES).values()]


@pytest.fixture(scope="module")
def losses(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that returns the losses of two steps on a file."""

    def two_steps(path: Path) -> list[float]:
        output = tmp_path_factory.mktemp("run")
        settings = small_run(model_folder, path, output / "run", "train.steps=2")
        session = prepare(load_config(None, settings), captured_display()[0])
        return [step.metrics["loss"] for step in session.steps()]

    return two_steps


@pytest.fixture(scope="module")
def plain_losses(losses: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that returns the losses of two steps on the plain records of a form."""

    @cache
    def plain(form: str) -> list[float]:
        path = tmp_path_factory.mktemp("plain") / "plain.jsonl"
        return losses(write_jsonl(path, in_form(form)[1]))

    return plain


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_two_steps_of_training(
    losses: Any, plain_losses: Any, tmp_path: Path, form: str, kind: str
) -> None:
    """Every form and every format is trained on as its plain records are."""
    actual = losses(write_format(tmp_path, kind, in_form(form)[0]))
    assert len(actual) == 2
    assert actual == plain_losses(form)


# --- damage ----------------------------------------------------------------------------------


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_damaged_files_are_errors_or_quarantined_rows(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never anything else than a SimPOError, and the count is that of the rows."""
    kind = data.draw(st.sampled_from([kind for kind in FORMATS if kind != "saved~dataset"]))
    path = write_format(tmp_path_factory.getbasetemp(), kind, MESSAGES[:2])
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(0, 4) | st.integers(0, len(content)))
    content[start : start + length] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    try:
        source = open_source(str(path))
        rows = list(source.rows())
    except SimPOError:
        return
    assert len(rows) == source.count()
    for row in rows:
        with suppress(InvalidRecordError):
            parse_pair(row)


# --- memory ----------------------------------------------------------------------------------


def bytes_used(source: Source) -> tuple[int, int]:
    """What Python and Arrow have handed out (at most while the rows are read, afterwards).

    The process's own memory would depend on what their allocators keep of earlier tests.
    """
    arrow_before, arrow_peak = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for _ in source.rows():
            arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - arrow_before)
        python_now, python_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return python_peak + arrow_peak, python_now + pa.total_allocated_bytes() - arrow_before


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.zst", ".json", ".csv", ".parquet", ".arrow"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    """Of 60 MB more of text at most 15 are in memory at a time, and none afterwards."""
    text, peaks = "the quick brown fox " * 500, []
    for count in (1500, 4500):
        rows = [{"prompt": f"{n} {text}", "chosen": text, "rejected": "b"} for n in range(count)]
        path = write_format(tmp_path, kind, rows)
        if kind == ".arrow":  # whose batches are read whole: that of `datasets` has 1000 rows
            table = pa.ipc.open_file(path).read_all()
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=1000)
            del table
        del rows
        peak, afterwards = bytes_used(open_source(str(path)))
        assert afterwards < 1e6
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 15e6
    # Text has neither row groups nor batches.
    assert kind in (".parquet", ".arrow") or peaks[1] < 15e6
