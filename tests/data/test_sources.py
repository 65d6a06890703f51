"""Rows of every kind of source know their origin; a source that cannot be read is an error."""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import some_pairs, user, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import SimPOError, SourceConfig
from mlx_simpo.data.columns import with_our_names
from mlx_simpo.data.json_rows import jsonl_rows
from mlx_simpo.data.rows import Row
from mlx_simpo.data.sources import (
    looks_like_hub_id,
    open_hub,
    open_source,
)
from mlx_simpo.data.tables import BATCH_ROWS
from mlx_simpo.data.text_files import text_file

PAIRS = some_pairs(3)


@pytest.fixture(autouse=True)
def separate_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` must not write into the user's cache."""
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


def rows_of(name: Path | str, split: str | None = None) -> list[Row]:
    return list(open_source(SourceConfig(str(name), split=split)).rows())


def hub_rows(name: str, split: str | None, subset: str | None = None) -> Iterator[Row]:
    return with_our_names(open_hub(name, split, subset), None).rows()


def write_gzip(path: Path, rows: list) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def write_parquet(path: Path, rows: list) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


WRITERS = {".jsonl": write_jsonl, ".jsonl.gz": write_gzip, ".parquet": write_parquet}


def write_files(folder: Path, names: list[str]) -> Path:
    """One record per file, whose prompt is the file's name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        suffix = next(s for s in WRITERS if name.endswith(s))
        WRITERS[suffix](file, [{**PAIRS[0], "prompt": name}])
    return folder


def prompts(rows: list[Row]) -> list[str]:
    return [row.value["prompt"] for row in rows]


@pytest.mark.parametrize("suffix", WRITERS)
def test_each_kind_of_file(tmp_path: Path, suffix: str) -> None:
    file = WRITERS[suffix](tmp_path / f"pairs{suffix}", PAIRS)
    assert rows_of(file) == [Row(i, f"{file}:{i + 1}", pair) for i, pair in enumerate(PAIRS)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_line_numbers_with_bom_blank_lines_and_crlf(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"pairs{suffix}"
    one = json.dumps(PAIRS[0])
    data = f"\ufeff{one}\r\n\r\n   \n{one}\n\n{one}".encode()
    file.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    rows = rows_of(file)
    assert [row.source for row in rows] == [f"{file}:{line}" for line in (1, 4, 6)]
    assert [row.number for row in rows] == [0, 1, 2]
    assert all(row.value == PAIRS[0] and row.problem is None for row in rows)


def test_blank_first_line_with_bom(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(PAIRS[0]).encode())
    assert rows_of(file) == [Row(0, f"{file}:2", PAIRS[0])]


TEXTS = st.text() | st.sampled_from(["\u2028", "a\x85b", "\x0b\x0c", "\r", "\x1c"])


@given(st.lists(st.dictionaries(TEXTS, TEXTS) | st.just(None), max_size=8))
@settings(deadline=None, max_examples=40)
def test_lines_end_at_newlines_only(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str] | None]
) -> None:
    """Separators that str.splitlines knows stay inside strings; None stands for a blank line."""
    file = tmp_path_factory.getbasetemp() / "separators.jsonl"
    lines = ["" if r is None else json.dumps(r, ensure_ascii=False) for r in records]
    file.write_bytes("\n".join(lines).encode())
    expected = [(f"{file}:{n}", r) for n, r in enumerate(records, start=1) if r is not None]
    assert [(row.source, row.value) for row in jsonl_rows(text_file(file))] == expected


@pytest.mark.parametrize(
    "line",
    [b"{", b'{"prompt": "a"} {}', b'{"prompt": "\xff"}', b"[" * 100_000, b"nonsense"],
    ids=["cut", "two", "no utf-8", "too deep", "no json"],
)
def test_a_bad_line_is_a_row_with_a_problem(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "pairs.jsonl"
    good = json.dumps(PAIRS[0]).encode()
    file.write_bytes(b"\n".join([good, line, good]))
    first, bad, last = rows_of(file)
    assert (first.value, last.value) == (PAIRS[0], PAIRS[0])
    assert (bad.number, bad.source, bad.value) == (1, f"{file}:2", None)
    assert bad.problem is not None
    assert bad.problem.startswith("not UTF-8: byte 0xff" if b"\xff" in line else "invalid JSON")
    assert (last.number, last.source) == (2, f"{file}:3")


def test_a_huge_integer_is_a_row_with_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"id": ' + "1" * 5000 + "}\n")
    assert rows_of(file)[0].problem


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(b""))
    assert rows_of(tmp_path) == []


def test_an_empty_shard_has_no_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(PAIRS)
    pq.write_table(table.slice(0, 0), tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "b.parquet")
    assert [row.value for row in rows_of(tmp_path)] == PAIRS


def random_lines() -> list[dict[str, float]]:
    rng = random.Random(0)
    return [{"x": rng.random()} for _ in range(500)]


def test_truncated_gzip(tmp_path: Path) -> None:
    file = write_gzip(tmp_path / "pairs.jsonl.gz", random_lines())
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(SimPOError, match=r"cannot read .*pairs\.jsonl\.gz: .*end-of-stream"):
        rows_of(file)


def test_a_file_that_is_not_gzip(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl.gz"
    file.write_text(json.dumps(PAIRS[0]))
    with pytest.raises(SimPOError, match=r"cannot read .*pairs\.jsonl\.gz: .*gzip"):
        rows_of(file)


def test_corrupt_gzip(tmp_path: Path) -> None:
    file = write_gzip(tmp_path / "pairs.jsonl.gz", random_lines())
    data = bytearray(file.read_bytes())
    data[1000:1100] = bytes(b ^ 0x5A for b in data[1000:1100])
    file.write_bytes(data)
    with pytest.raises(SimPOError, match="cannot read"):
        rows_of(file)


@pytest.mark.parametrize("data", [b"", b"PAR1 no parquet PAR1", b"half"])
def test_broken_parquet(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "pairs.parquet"
    if data == b"half":
        data = write_parquet(file, PAIRS * 50).read_bytes()
        data = data[: len(data) // 2]
    file.write_bytes(data)
    with pytest.raises(SimPOError, match=r"cannot read .*pairs\.parquet as Parquet: \w+"):
        rows_of(file)


def test_parquet_is_not_read_from_a_cache(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "pairs.parquet", PAIRS)
    assert rows_of(file)[0].value == PAIRS[0]
    write_parquet(file, PAIRS[1:])
    assert [row.value for row in rows_of(file)] == PAIRS[1:]


@pytest.mark.parametrize("name", ["set [v2]/pairs.parquet", "pairs[1].parquet", "pairs*.parquet"])
def test_a_parquet_path_is_not_a_glob_pattern(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, [name, "pairs1.parquet"])
    assert prompts(rows_of(tmp_path / name)) == [name]


@pytest.mark.parametrize("name", ["pairs.xlsx", "pairs.jsonl.bz2", "pairs.JSONL", "pairs.txt"])
def test_unknown_ending(tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / name, PAIRS)
    message = rf"{name} has an unknown type; its name must end in \.jsonl"
    with pytest.raises(SimPOError, match=message):
        rows_of(file)


@pytest.mark.parametrize("name", ["nowhere/pairs.jsonl", "nowhere.parquet", "/no/such/folder"])
def test_a_source_that_does_not_exist(name: str) -> None:
    with pytest.raises(SimPOError, match="no such file, folder or dataset"):
        rows_of(name)


def test_an_empty_name_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_files(tmp_path, ["pairs.jsonl"]))
    with pytest.raises(SimPOError, match="must be not empty"):
        rows_of("")


def test_unknown_home_directory() -> None:
    with pytest.raises(SimPOError, match="not a valid path"):
        rows_of("~no-such-user-here/pairs.jsonl")


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(write_files(tmp_path, ["pairs.jsonl"])))
    assert prompts(rows_of("~/pairs.jsonl")) == ["pairs.jsonl"]


def test_a_file_has_neither_splits_nor_subsets(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    message = r"the split is 'train', but .* is a file, which has none; remove it"
    with pytest.raises(SimPOError, match=message):
        rows_of(file, "train")
    for name in (file, tmp_path):
        with pytest.raises(SimPOError, match=r"data\.subset is 'main', but .* is local"):
            open_source(SourceConfig(str(name), subset="main"))


def test_a_folder_is_read_in_name_order_with_running_numbers(tmp_path: Path) -> None:
    names = ["a/2.jsonl", "a/b/1.jsonl.gz", "b.parquet", "c.jsonl"]
    write_files(tmp_path, [*reversed(names)])
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / "a" / "stats.json").write_text("{}")
    rows = rows_of(tmp_path)
    assert prompts(rows) == names
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert [row.source for row in rows] == [f"{tmp_path / name}:1" for name in names]


def test_a_folder_named_like_a_file(tmp_path: Path) -> None:
    """Spark writes a folder pairs.parquet that holds the parts."""
    write_files(tmp_path / "pairs.parquet", ["part-0.parquet", "part-1.parquet"])
    assert prompts(rows_of(tmp_path / "pairs.parquet")) == ["part-0.parquet", "part-1.parquet"]


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "notes.txt").touch()
    with pytest.raises(SimPOError, match=r"holds no data; it must contain files ending in \.jsonl"):
        rows_of(tmp_path)


MLX_LM = ["test.jsonl", "train.jsonl", "valid.jsonl"]
HUB = [f"data/{s}-00000-of-00001.parquet" for s in ("test_prefs", "train_prefs", "train_sft")]
NESTED = ["test/a.jsonl", "train/a.jsonl", "train/deep/b.jsonl.gz"]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (MLX_LM, "train", ["train.jsonl"]),
        (MLX_LM, "valid", ["valid.jsonl"]),
        (HUB, "train_prefs", [HUB[1]]),
        (HUB, "test_prefs", [HUB[0]]),
        (NESTED, "train", NESTED[1:]),
        (["my-train.v2.jsonl", "pretrain.jsonl", "trains.jsonl"], "train", ["my-train.v2.jsonl"]),
        (["a.b.jsonl", "axb.jsonl"], "a.b", ["a.b.jsonl"]),
    ],
)
def test_a_split_of_a_folder(
    tmp_path: Path, names: list[str], split: str, expected: list[str]
) -> None:
    """The folder's own name ("train-runs") says nothing about its files."""
    folder = write_files(tmp_path / "train-test-valid", names)
    assert prompts(rows_of(folder, split)) == expected


@pytest.mark.parametrize("split", ["dev", "tra", "jsonl2", "train[:10]", ".*"])
def test_a_split_that_a_folder_does_not_have(tmp_path: Path, split: str) -> None:
    write_files(tmp_path, MLX_LM)
    with pytest.raises(SimPOError, match=r"no files of the split .*; it has test\.jsonl, train\."):
        rows_of(tmp_path, split)


@pytest.mark.parametrize(
    "names",
    [
        MLX_LM,
        ["train_prefs-00000-of-00001.parquet", "test_prefs-00000-of-00001.parquet"],
        ["pairs.dev.jsonl", "pairs.train.jsonl"],
        ["my-train.jsonl.gz", "my-eval.jsonl.gz"],
        ["train.jsonl", "validation.jsonl"],
        ["train.jsonl", "val.jsonl"],
        HUB,
        NESTED,
        ["v1/train.jsonl", "v1/valid.jsonl"],
    ],
)
def test_several_splits_are_never_mixed(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(SimPOError, match=r"holds several splits \(.*\); name one"):
        rows_of(write_files(tmp_path, names))


def test_the_message_does_not_suggest_training_on_the_test_split(tmp_path: Path) -> None:
    write_files(tmp_path, ["test.jsonl", "train.jsonl"])
    with pytest.raises(SimPOError, match=r"name one, e\.g\. data\.train_split=train"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    "names", [["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], ["latest.jsonl"]]
)
def test_one_split_need_not_be_named(tmp_path: Path, names: list[str]) -> None:
    assert prompts(rows_of(write_files(tmp_path, names))) == names


def test_nulls_of_a_table_are_removed(tmp_path: Path) -> None:
    """Columns and keys that only other rows have; a null content is a defect, and stays."""
    call = {"name": "f", "arguments": {"x": 1}}
    turn: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [
        {"prompt": None, "chosen": [user("q"), turn], "rejected": [user("q")], "score": None},
        {"prompt": "p", "chosen": [{"role": "user", "content": "q", "name": "me"}], "score": 1.5},
    ]
    for suffix in (".parquet", ".jsonl"):
        first, second = rows_of(WRITERS[suffix](tmp_path / f"pairs{suffix}", rows))
        assert first.value == {"chosen": [user("q"), turn], "rejected": [user("q")]}
        assert second.value == rows[1]


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A local folder in the Hub's layout, which `datasets` loads as it loads one from the Hub."""
    for split, rows in {"train": PAIRS, "test": PAIRS[:1]}.items():
        file = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(file, [*rows, {"prompt": "p", "chosen": None}])
    return tmp_path / "set"


def test_hub_rows_of_a_split(hub_folder: Path) -> None:
    rows = list(hub_rows(str(hub_folder), "train", None))
    expected = [*PAIRS, {"prompt": "p"}]
    assert rows == [Row(i, f"{hub_folder}[train]:{i + 1}", row) for i, row in enumerate(expected)]


def test_a_source_of_files_counts_them_and_their_rows(tmp_path: Path) -> None:
    for suffix, write in WRITERS.items():
        write(tmp_path / f"pairs{suffix}", PAIRS)
    with (tmp_path / "pairs.jsonl").open("ab") as file:
        file.write(b"\n  \n{broken\n")  # a blank line is no row, a broken one is
    source = open_source(str(tmp_path))
    assert source.count() == len(list(source.rows())) == 10
    assert [row.number for row in source.rows()] == list(range(10))  # from the first one again
    assert source.files == tuple(sorted(tmp_path.iterdir()))
    assert source.labels == tuple(map(str, source.files))


def test_a_large_parquet_file_is_read_in_parts(tmp_path: Path) -> None:
    rows = [{**PAIRS[0], "prompt": str(n)} for n in range(3 * BATCH_ROWS + 1)]
    file = write_parquet(tmp_path / "p.parquet", rows)
    assert [(row.source, row.value) for row in rows_of(file)] == [
        (f"{file}:{n + 1}", row) for n, row in enumerate(rows)
    ]


def test_a_hub_dataset_lists_its_files(hub_folder: Path) -> None:
    """Their contents, not the name, identify the commit of the dataset."""
    source = open_hub(str(hub_folder), "train", None)
    assert source.count() == len(list(source.rows())) == 4
    assert source.labels == (str(hub_folder), "train", "")
    before = [file.read_bytes() for file in source.files]
    assert PAIRS[0]["chosen"].encode() in before[0]
    write_parquet(hub_folder / "data" / "train-00000-of-00001.parquet", PAIRS[:2])
    after = open_hub(str(hub_folder), "train", None)
    assert after.labels == source.labels
    assert [file.read_bytes() for file in after.files] != before


def test_hub_split_must_be_named_if_there_are_several(hub_folder: Path) -> None:
    with pytest.raises(SimPOError, match=r"has the splits train, test; name one with data\.train"):
        next(hub_rows(str(hub_folder), None, None))
    (hub_folder / "data" / "train-00000-of-00001.parquet").unlink()
    (row, _) = hub_rows(str(hub_folder), None, None)
    assert row == Row(0, f"{hub_folder}[test]:1", PAIRS[0])


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(SimPOError) as caught:
        open_hub("owner/name", "train", None)
    assert str(caught.value) == (
        "there is no file or folder 'owner/name', and the Hub, where it could be a dataset, cannot "
        "be reached (Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)); correct the "
        "name, or check the connection"
    )


@pytest.mark.parametrize(("split", "subset"), [("nope", None), ("train", "nope")])
def test_a_hub_split_or_subset_that_does_not_exist(
    hub_folder: Path, split: str, subset: str | None
) -> None:
    with pytest.raises(SimPOError, match=r"cannot load the dataset .*set': .*nope"):
        next(hub_rows(str(hub_folder), split, subset))


def test_hub_ids_are_told_from_paths() -> None:
    hub_ids = ["owner/name", "a-b_c/d.e-1", "HuggingFaceH4/ultrafeedback_v1.0"]
    paths = ["name", "a/b/c", "/a/b", "a/", "~/b", "a/b c", "a/b\n", "", "./data", "../data"]
    paths += ["data/train.jsonl", "data/train.jsonl.gz", "data/train.parquet"]
    assert [name for name in hub_ids + paths if looks_like_hub_id(name)] == hub_ids
