"""Rows with their place of origin, from JSON Lines, Parquet, folders of them and the Hub.

JSON Lines is read here line by line rather than by `datasets`, whose reader forces one schema on
the file, fills what is missing with nulls and forgets line numbers: a row that breaks the rules
could then neither be told from a good one nor be found again. Parquet is read by pyarrow, on which
`datasets` is built, and Hub data sets by `datasets` itself.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SimPOError, one_line
from ..paths import local_path

# Rows of a Parquet file that are Python objects at a time.
PARQUET_ROWS = 256
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Names by which folders tell their splits apart (mlx-lm's and the Hub's conventions).
_SPLIT_WORDS = re.compile(r"(?:^|[-_./])(train|valid|validation|val|dev|test|eval)(?=[-_./]|$)")


class Row(NamedTuple):
    """One record as it stands in its source.

    number: its place in the source, from 0, counting unusable rows too. source: "file:line", or
    "data set[split]:row", both counted from 1. value: what was read; problem: why nothing was.
    """

    number: int
    source: str
    value: Any
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """A source that is there and can be opened; its rows are read as they are asked for.

    name: as messages call it. rows: starts reading from the first row. count: tells how many there
    are. files: whose contents decide the rows; empty where there are none (a data set in memory).
    labels: what else decides them, and the places that they are given: names, split, configuration.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    count: Callable[[], int]
    files: tuple[Path, ...]
    labels: tuple[str, ...]


def read_rows(name: str, split: str | None = None, subset: str | None = None) -> Iterator[Row]:
    """The rows of a file, a folder of files, or a Hugging Face data set; see `open_source`."""
    return open_source(name, split, subset).rows()


def open_source(name: str, split: str | None = None, subset: str | None = None) -> Source:
    """A file, a folder of files, or a Hugging Face data set, none of its rows read yet.

    Args:
        name: a path, or a Hub id ("owner/name") if no such path exists.
        split: of a folder, the files whose path has this word as a part ("train" takes
            train.jsonl, train-00000-of-00002.parquet and train/a.jsonl); of a data set, its split.
        subset: configuration name of a Hub data set.

    Raises:
        SimPOError: nothing is there, it cannot be read, or the split is not told.
    """
    path = local_path(name)
    if not path.exists():
        if not looks_like_hub_id(name):
            raise SimPOError(f"no such file, folder or data set: {name!r}")
        return open_hub(name, split, subset)
    if subset is not None:
        raise SimPOError(
            f"data.subset is {subset!r}, but {name} is local; only Hub data has subsets"
        )
    if not path.is_dir() and split is not None:
        raise SimPOError(f"a split ({split!r}) is asked for, but {name} is a file; leave it out")
    files = folder_files(path, split) if path.is_dir() else [path]
    readers = [reader_of(file) for file in files]
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
    """Whether a name has the form of a Hub data set (owner/name, or name)."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not name.endswith(SUFFIXES)


def number_rows(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows numbered from 0, in their order in the whole source."""
    for number, row in enumerate(rows):
        yield row._replace(number=number)


def folder_files(folder: Path, split: str | None) -> list[Path]:
    """The data files under ``folder`` in name order, of one split."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name.endswith(SUFFIXES)]
    if not files:
        raise SimPOError(
            f"{folder} holds no data; it must hold files ending in {', '.join(SUFFIXES)}"
        )
    if split is not None:
        pattern = re.compile(rf"(?:^|[-_./]){re.escape(split)}(?=[-_./]|$)")
        chosen = [f for f in files if pattern.search(f.relative_to(folder).as_posix())]
        if not chosen:
            names = ", ".join(f.relative_to(folder).as_posix() for f in files[:5])
            raise SimPOError(f"{folder} has no files of the split {split!r}; it has {names}")
        return chosen
    words = {w for f in files for w in _SPLIT_WORDS.findall(f.relative_to(folder).as_posix())}
    if len(words) > 1:
        example = "train" if "train" in words else min(words)
        raise SimPOError(
            f"{folder} holds several splits ({', '.join(sorted(words))}); name one, e.g. "
            f"data.train_split={example}"
        )
    return files


def reader_of(path: Path) -> Callable[[Path], Iterator[Row]]:
    """What reads the rows of this kind of file."""
    if path.name.endswith(".parquet"):
        return parquet_rows
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return jsonl_rows
    raise SimPOError(f"{path} is of no known kind; it must end in {', '.join(SUFFIXES)}")


def jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of the lines that are not blank."""
    open_file = gzip.open if path.name.endswith(".gz") else open
    try:
        with open_file(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:  # EOFError: a gzip file that was cut short
        raise SimPOError(f"cannot read {path}: {error}") from None


def jsonl_rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl or .jsonl.gz file, line by line."""
    for number, line in jsonl_lines(path):
        try:
            value = without_nulls(json.loads(line.decode("utf-8")))
            row = Row(0, f"{path}:{number}", value)
        except (ValueError, RecursionError) as error:
            row = Row(0, f"{path}:{number}", None, f"no valid JSON: {error}")
        yield row


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """The opened file; what it raises becomes a SimPOError."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield file
    except (OSError, ArrowException) as error:
        raise SimPOError(f"cannot read {path} as Parquet: {first_line(error)}") from None


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, in small groups."""
    number = 0
    with parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=PARQUET_ROWS):
            for value in batch.to_pylist():
                number += 1
                yield Row(0, f"{path}:{number}", without_nulls(value))


def count_rows(path: Path) -> int:
    """How many rows a file has."""
    if path.name.endswith(".parquet"):
        with parquet_file(path) as file:
            return file.metadata.num_rows
    return sum(1 for _ in jsonl_lines(path))


def hub_rows(name: str, split: str | None, subset: str | None) -> Iterator[Row]:
    """The rows of a data set on the Hugging Face Hub (or of a folder in the Hub's layout)."""
    return open_hub(name, split, subset).rows()


def open_hub(name: str, split: str | None, subset: str | None) -> Source:
    """A data set on the Hub; `datasets` has made Arrow files of it when this returns."""
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
        raise SimPOError(f"cannot load the data set {name!r}: {first_line(error)}") from None

    def rows() -> Iterator[Row]:
        for index, value in enumerate(data):
            yield Row(index, f"{name}[{split}]:{index + 1}", without_nulls(value))

    files = tuple(Path(file["filename"]) for file in data.cache_files)
    return Source(name, rows, lambda: len(data), files, (name, split, subset or ""))


def without_nulls(value: Any) -> Any:
    """``value`` without nulls, which a table puts where a row has no such key.

    Message content is kept even when null, because a null answer is a defect to report.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None or k == "content"}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def first_line(error: BaseException) -> str:
    """An error's message on one line, of 300 characters at most."""
    return one_line(error, 300) or type(error).__name__
