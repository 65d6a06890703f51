"""Open what holds records: files and folders of every accepted format, saved datasets, the Hub.

What a file's content is follows from the ending of its name alone. Rows are not read yet, apart
from the first ones, whose columns are checked (see `columns`).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..config.sources import SourceConfig
from ..errors import SimPOError
from ..paths import local_path
from .columns import with_our_names
from .csv_rows import count_csv, count_tsv, csv_rows, tsv_rows
from .json_rows import count_json, count_jsonl, json_rows, jsonl_rows
from .rows import Row, Source
from .tables import (
    arrow_rows,
    count_arrow,
    count_parquet,
    is_saved_dataset,
    open_hub,
    open_saved_dataset,
    parquet_rows,
)
from .text_files import COMPRESSED, TextInput, standard_input, text_file

STDIN = "-"


class Format(NamedTuple):
    """How files of one kind are read: the functions that yield their rows, and count them."""

    rows: Callable[[Path], Iterator[Row]]
    count_rows: Callable[[Path], int]


def _text_format(
    rows: Callable[[TextInput], Iterator[Row]], count: Callable[[TextInput], int]
) -> Format:
    return Format(lambda path: rows(text_file(path)), lambda path: count(text_file(path)))


_JSONL = _text_format(jsonl_rows, count_jsonl)
_JSON = _text_format(json_rows, count_json)
_CSV = _text_format(csv_rows, count_csv)
_TSV = _text_format(tsv_rows, count_tsv)
_PARQUET = Format(parquet_rows, count_parquet)
_ARROW = Format(arrow_rows, count_arrow)


def _compressed(ending: str, text_format: Format) -> dict[str, Format]:
    return {f"{ending}{suffix}": text_format for suffix in ("", *COMPRESSED)}


# Endings of file names, in groups: a folder is read as the first group that it has files of, since
# others of its files often describe the data (statistics in JSON), or are a second copy of it.
_GROUPS = (
    {**_compressed(".jsonl", _JSONL), ".parquet": _PARQUET},
    {".arrow": _ARROW, ".feather": _ARROW},
    {**_compressed(".csv", _CSV), **_compressed(".tsv", _TSV)},
    _compressed(".json", _JSON),
)
FORMATS: dict[str, Format] = {e: f for group in _GROUPS for e, f in group.items()}
SUFFIXES = tuple(FORMATS)
# Names of splits in the names of files and folders (mlx-lm's and the Hub's conventions).
_SPLIT_WORDS = re.compile(r"(?:^|[-_./])(train|valid|validation|val|dev|test|eval)(?=[-_./]|$)")


def open_source(source: SourceConfig | str) -> Source:
    """Open a file, a folder of files, a dataset or standard input.

    Args:
        source: path: a path, "-" for standard input, or a Hub id ("owner/name") if no such path
            exists. split: of a folder, the files whose path contains this word ("train" selects
            train.jsonl, train-00000-of-00002.parquet and train/a.jsonl); of a Hub dataset or a
            saved DatasetDict, its split. subset: configuration name of a Hub dataset. columns: its
            names for ours. Text is a path alone.

    Raises:
        SimPOError: there is no such source, it cannot be read, it has several splits and none is
            named, or its columns are not those that are named or recognized.
    """
    source = SourceConfig(source) if isinstance(source, str) else source
    return with_our_names(open_as_it_is(source), source.columns)


def open_as_it_is(source: SourceConfig) -> Source:
    """Open a source whose rows are as in the data, whatever their columns; SimPOError if there is
    none."""
    name, split, subset = source.path, source.split, source.subset
    if name == STDIN:
        if split is not None or subset is not None:
            raise SimPOError("- is standard input, which has no splits and subsets; remove them")
        text = standard_input()
        return Source(text.name, partial(json_rows, text), partial(count_json, text), (), ())
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
    if path.is_dir() and is_saved_dataset(path):
        return open_saved_dataset(name, path, split)
    if not path.is_dir() and split is not None:
        raise SimPOError(f"the split is {split!r}, but {name} is a file, which has none; remove it")
    files = folder_files(path, split) if path.is_dir() else [path]
    formats = [select_format(file) for file in files]
    return Source(
        name,
        lambda: (row for f, file in zip(formats, files, strict=True) for row in f.rows(file)),
        lambda: sum(f.count_rows(file) for f, file in zip(formats, files, strict=True)),
        tuple(files),
        tuple(map(str, files)),
    )


def looks_like_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub dataset's id (owner/name)."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not name.endswith(SUFFIXES)


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
        return _first_group(split_files)
    files = _first_group(files)
    words = split_names(folder, files)
    if len(words) > 1:
        example = "train" if "train" in words else min(words)
        raise SimPOError(
            f"{folder} holds several splits ({', '.join(sorted(words))}); name one, e.g. "
            f"data.train_split={example} for a training, --split {example} for other commands; or "
            f"set data.folder={folder} instead of data.train and data.valid"
        )
    return files


def split_names(folder: Path, files: Iterable[Path]) -> set[str]:
    """Return the names of splits that occur in the paths of files under ``folder``."""
    return {w for f in files for w in _SPLIT_WORDS.findall(f.relative_to(folder).as_posix())}


def _first_group(files: Sequence[Path]) -> list[Path]:
    """Return the files of the first of _GROUPS that any of these files belongs to."""
    groups = ([f for f in files if f.name.endswith(tuple(group))] for group in _GROUPS)
    return next(group for group in groups if group)


def select_format(path: Path) -> Format:
    """Return how this kind of file is read.

    Raises:
        SimPOError: its name has an unknown ending.
    """
    # ".csv.gz" ends in no shorter ending, so the first match is the only one.
    for ending, file_format in FORMATS.items():
        if path.name.endswith(ending):
            return file_format
    raise SimPOError(f"{path} has an unknown type; its name must end in {', '.join(SUFFIXES)}")
