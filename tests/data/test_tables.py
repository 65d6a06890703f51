"""Arrow files, and datasets that `datasets` has saved: splits, damage, locations."""

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from helpers.forms import STRINGS, tokens, write_format
from helpers.tiny import write_jsonl

from mlx_simpo import SimPOError, SourceConfig
from mlx_simpo.data.keys import source_identity
from mlx_simpo.data.sources import open_source
from mlx_simpo.data.tables import BATCH_ROWS, arrow_rows


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A DatasetDict of two splits."""
    splits: Any = {"train": Dataset.from_list(STRINGS), "test": Dataset.from_list(STRINGS[:1])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def error_of(path: Path, split: str | None = None) -> str:
    with pytest.raises(SimPOError) as caught:
        list(open_source(SourceConfig(str(path), split=split)).rows())
    return str(caught.value)


def test_a_split_of_a_saved_dataset(saved: Path, tmp_path: Path) -> None:
    source = open_source(SourceConfig(str(saved), split="train"))
    assert tokens(source) == tokens(open_source(str(write_jsonl(tmp_path / "a.jsonl", STRINGS))))
    assert [row.source for row in source.rows()][:2] == [f"{saved}[train]:1", f"{saved}[train]:2"]
    assert source.labels == (str(saved), "train")
    # Its content decides whether cached tokens are used.
    assert [file.suffix for file in source.files] == [".arrow"]
    assert source_identity(source) != source_identity(
        open_source(SourceConfig(str(saved), split="test"))
    )


def test_a_split_must_be_named_if_there_are_several(saved: Path) -> None:
    assert error_of(saved) == (
        f"{saved} has the splits train, test; name one with data.train_split or data.valid_split"
    )
    assert error_of(saved, "valid") == f"{saved} has no split 'valid'; it has train, test"


def test_the_only_split_need_not_be_named(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(STRINGS)}).save_to_disk(tmp_path / "saved")
    assert open_source(str(tmp_path / "saved")).count() == len(STRINGS)


def test_one_saved_dataset_has_no_splits(saved: Path) -> None:
    assert open_source(str(saved / "train")).count() == len(STRINGS)
    assert error_of(saved / "train", "train") == (
        f"the split is 'train', but {saved / 'train'} is one saved dataset without splits; remove "
        "it"
    )


def test_a_damaged_saved_dataset(saved: Path) -> None:
    for path in (saved / "train").glob("*.arrow"):
        path.unlink()
    assert error_of(saved, "train").startswith(f"cannot load the dataset in {saved}: ")


@pytest.mark.parametrize("kind", [".arrow", "stream~.arrow", ".feather"])
def test_damaged_arrow_files(tmp_path: Path, kind: str) -> None:
    path = write_format(tmp_path, kind, STRINGS * 50)
    content = path.read_bytes()
    for damaged in (b"", b"ARROW1", content[: len(content) // 2], b"no arrow" * 40):
        path.write_bytes(damaged)
        assert error_of(path).startswith(f"cannot read {path} as Arrow: ")


@pytest.mark.parametrize("create", [pa.ipc.new_file, pa.ipc.new_stream])
def test_batches_of_any_size(tmp_path: Path, create: object) -> None:
    values = [{"prompt": str(n)} for n in range(3 * BATCH_ROWS + 1)]
    table = pa.Table.from_pylist(values)
    path = tmp_path / "a.arrow"
    for size in (1, BATCH_ROWS + 1, len(values)):
        with pa.OSFile(str(path), "wb") as file, create(file, table.schema) as writer:  # type: ignore
            writer.write_table(table, max_chunksize=size)
        assert [row.value for row in arrow_rows(path)] == values


@pytest.mark.skipif(sys.platform == "darwin", reason="the system takes no such names")
@pytest.mark.parametrize("kind", [".arrow", ".parquet", ".jsonl.zst", ".csv"])
def test_a_name_that_is_not_utf_8(tmp_path: Path, kind: str) -> None:
    path = write_format(tmp_path, kind, STRINGS)
    odd = path.rename(tmp_path / f"p\udcff{kind}")
    assert open_source(str(odd)).count() == len(STRINGS)


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
def test_two_columns_of_one_name_are_an_error(tmp_path: Path, kind: str) -> None:
    """pyarrow would return the last one."""
    table = pa.table([[text] for text in "abcd"], names=["prompt", "chosen", "rejected", "prompt"])
    path = tmp_path / f"a{kind}"
    if kind == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(SimPOError) as caught:
        open_source(str(path))
    assert str(caught.value) == f"{path} has two columns called 'prompt'; rename one of them"
