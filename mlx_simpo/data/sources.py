"""Read rows with their origin from JSON Lines, Parquet, folders of these, and the Hub.

JSON Lines is read here line by line rather than by `datasets`, whose reader forces one schema on
the file, fills missing keys with nulls and loses line numbers: an invalid row could then neither be
told from a valid one nor be located in the file. Parquet is read by pyarrow, on which `datasets` is
built, and Hub datasets by `datasets` itself.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config.sources import SourceConfig
from ..errors import SimPOError, one_line
from ..paths import local_path

# Rows of a Parquet file that are converted to Python objects at a time, to limit memory.
PARQUET_BATCH_ROWS = 256
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Names of splits in the names of files and folders (mlx-lm's and the Hub's conventions).
_SPLIT_WORDS = re.compile(r"(?:^|[-_./])(train|valid|validation|val|dev|test|eval)(?=[-_./]|$)")


class Row(NamedTuple):
    """One record as it is in its source.

    number: position in the source, from 0, counting invalid rows too.
    source: "file:line", or "dataset[split]:row"; lines and rows count from 1.
    value: the content. problem: why the row could not be read, or None.
    """

    number: int
    source: str
    value: Any
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """An existing source whose rows are read on demand.

    name: for messages.
    rows: returns a new iterator that starts at the first row.
    count: returns the number of rows.
    files: the files that determine the rows; empty for a dataset in memory.
    labels: what else determines the rows and their ``source``: names, split, configuration.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    count: Callable[[], int]
    files: tuple[Path, ...]
    labels: tuple[str, ...]


def read_rows(name: str, split: str | None = None, subset: str | None = None) -> Iterator[Row]:
    """Read a file, a folder of files, or a Hugging Face dataset; see `open_source`."""
    return open_source(SourceConfig(name, split=split, subset=subset)).rows()


def open_source(source: SourceConfig | str) -> Source:
    """Open a file, a folder of files, or a Hugging Face dataset, without reading rows yet.

    Args:
        source: path: a path, or a Hub id ("owner/name") if no such path exists. split: of a folder,
            the files whose path contains this word ("train" selects train.jsonl,
            train-00000-of-00002.parquet and train/a.jsonl); of a Hub dataset, its split. subset:
            configuration name of a Hub dataset. Text is a path alone.

    Raises:
        SimPOError: there is no such source, it cannot be read, or it has several splits and none is
            named.
    """
    source = SourceConfig(source) if isinstance(source, str) else source
    name, split, subset = source.path, source.split, source.subset
    path = local_path(name)
    if not path.exists():
        if not looks_like_hub_id(name):
            # A run may be resumed from another folder than the one where it was begun.
            where = "" if path.is_absolute() else f" (in the current folder, {Path.cwd()})"
            raise SimPOError(f"no such file, folder or dataset: {name!r}{where}")
        return open_hub(name, split, subset)
    if subset is not None:
        raise SimPOError(
            f"data.subset is {subset!r}, but {name} is local; only Hub datasets have subsets"
        )
    if not path.is_dir() and split is not None:
        raise SimPOError(f"the split is {split!r}, but {name} is a file, which has none; remove it")
    files = folder_files(path, split) if path.is_dir() else [path]
    readers = [select_reader(file) for file in files]
    return Source(
        name,
        lambda: number_rows(
            row for read, file in zip(readers, files, strict=True) for row in read(file)
        ),
        lambda: sum(map(count_rows, files)),
        tuple(files),
        tuple(map(str, files)),
    )


def looks_like_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub dataset's id (owner/name)."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not name.endswith(SUFFIXES)


def number_rows(rows: Iterator[Row]) -> Iterator[Row]:
    """Number rows from 0, in their order in the whole source."""
    for number, row in enumerate(rows):
        yield row._replace(number=number)


def data_files(folder: Path) -> list[Path]:
    """Return the data files under ``folder``, sorted by name; SimPOError if there are none."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name.endswith(SUFFIXES)]
    if not files:
        raise SimPOError(
            f"{folder} holds no data; it must contain files ending in {', '.join(SUFFIXES)}"
        )
    return files


def folder_files(folder: Path, split: str | None) -> list[Path]:
    """Return the data files of one split under ``folder``, sorted by name.

    Raises:
        SimPOError: there are none, or there are several splits and none is named.
    """
    files = data_files(folder)
    if split is not None:
        pattern = re.compile(rf"(?:^|[-_./]){re.escape(split)}(?=[-_./]|$)")
        split_files = [f for f in files if pattern.search(f.relative_to(folder).as_posix())]
        if not split_files:
            names = ", ".join(f.relative_to(folder).as_posix() for f in files[:5])
            raise SimPOError(f"{folder} has no files of the split {split!r}; it has {names}")
        return split_files
    words = split_names(folder, files)
    if len(words) > 1:
        example = "train" if "train" in words else min(words)
        raise SimPOError(
            f"{folder} holds several splits ({', '.join(sorted(words))}); name one, e.g. "
            f"data.train_split={example}, or set data.folder={folder} instead of data.train and "
            "data.valid"
        )
    return files


def split_names(folder: Path, files: Iterable[Path]) -> set[str]:
    """Return the names of splits that occur in the paths of files under ``folder``."""
    return {w for f in files for w in _SPLIT_WORDS.findall(f.relative_to(folder).as_posix())}


def select_reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    """Return the function that reads this kind of file.

    Raises:
        SimPOError: its name has an unknown ending.
    """
    if path.name.endswith(".parquet"):
        return parquet_rows
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return jsonl_rows
    raise SimPOError(f"{path} has an unknown type; its name must end in {', '.join(SUFFIXES)}")


def jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of the lines that are not blank.

    Raises:
        SimPOError: the file cannot be read or decompressed.
    """
    open_file = gzip.open if path.name.endswith(".gz") else open
    try:
        with open_file(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:  # EOFError: a truncated gzip file
        raise SimPOError(f"cannot read {path}: {error}") from None


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a .jsonl or .jsonl.gz file; an invalid line is a row with a problem."""
    for number, line in jsonl_lines(path):
        try:
            value = without_nulls(json.loads(line.decode("utf-8")))
            row = Row(0, f"{path}:{number}", value)
        except (ValueError, RecursionError) as error:
            row = Row(0, f"{path}:{number}", None, f"invalid JSON: {error}")
        yield row


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """Open a Parquet file; errors while it is open become a SimPOError."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield file
    except (OSError, ArrowException) as error:
        raise SimPOError(f"cannot read {path} as Parquet: {first_line(error)}") from None


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    number = 0
    with parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for value in batch.to_pylist():
                number += 1
                yield Row(0, f"{path}:{number}", without_nulls(value))


def count_rows(path: Path) -> int:
    """Return the number of rows in a file."""
    if path.name.endswith(".parquet"):
        with parquet_file(path) as file:
            return file.metadata.num_rows
    return sum(1 for _ in jsonl_lines(path))


def hub_rows(name: str, split: str | None, subset: str | None) -> Iterator[Row]:
    """Read a dataset on the Hugging Face Hub (or a folder in the Hub's layout)."""
    return open_hub(name, split, subset).rows()


def open_hub(name: str, split: str | None, subset: str | None) -> Source:
    """Open a dataset on the Hub; `datasets` downloads it and converts it to Arrow files.

    Raises:
        SimPOError: it cannot be loaded, or has several splits and none is named.
    """
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        if split is None:
            splits = get_dataset_split_names(name, subset)
            if len(splits) != 1:
                raise SimPOError(
                    f"{name} has the splits {', '.join(map(str, splits))}; name one with "
                    "data.train_split or data.valid_split"
                )
            split = str(splits[0])
        data = load_dataset(name, subset, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise SimPOError(f"cannot load the dataset {name!r}: {first_line(error)}") from None

    def rows() -> Iterator[Row]:
        for index, value in enumerate(data):
            yield Row(index, f"{name}[{split}]:{index + 1}", without_nulls(value))

    files = tuple(Path(file["filename"]) for file in data.cache_files)
    return Source(name, rows, lambda: len(data), files, (name, split, subset or ""))


def without_nulls(value: Any) -> Any:
    """Return ``value`` without nulls, which a table has where a row lacks a key.

    A message's content stays even if it is null: a response of null is a defect to report.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None or k == "content"}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def first_line(error: BaseException) -> str:
    """Return an error's message on one line, shortened to 300 characters."""
    return one_line(error, 300) or type(error).__name__
