"""Rows of tables: Parquet, Arrow, datasets that `datasets` has saved, and datasets on the Hub.

Parquet and Arrow files are read by pyarrow, on which `datasets` is built, a batch at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import SimPOError
from .rows import Row, Source, check_columns, first_line

# Rows of a table that are converted to Python objects at a time, to limit memory.
BATCH_ROWS = 256
# What damaged files raise besides pyarrow's own errors: names and text that are not UTF-8, names
# that appear twice, dates out of range, sizes that no memory has; `datasets` adds more.
_OF_DAMAGE = (
    ValueError,
    LookupError,
    OverflowError,
    MemoryError,
    TypeError,
    AttributeError,
)
_DATASET_DICT = "dataset_dict.json"


@contextmanager
def _open_table(path: Path, kind: str) -> Iterator[Any]:
    """Open a Parquet or Arrow file as pyarrow's reader of it.

    Raises:
        SimPOError: it cannot be read; also for errors while it is open.
    """
    from pyarrow import ArrowException, ipc
    from pyarrow.parquet import ParquetFile

    try:
        # Opened by Python, because pyarrow takes no names that are not UTF-8.
        with path.open("rb") as content:
            if kind == "Parquet":
                with ParquetFile(content) as file:
                    check_columns(str(path), file.schema_arrow.names)
                    yield file
                return
            # Arrow has a format for files and one for streams, which `datasets` writes.
            is_file = content.read(6) == b"ARROW1"
            content.seek(0)
            with ipc.open_file(content) if is_file else ipc.open_stream(content) as reader:
                check_columns(str(path), reader.schema.names)
                yield reader
    except (OSError, ArrowException, *_OF_DAMAGE) as error:
        raise SimPOError(f"cannot read {path} as {kind}: {first_line(error)}") from None


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file; SimPOError if it cannot be read."""
    with _open_table(path, "Parquet") as file:
        yield from _batch_rows(path, file.iter_batches(batch_size=BATCH_ROWS))


def count_parquet(path: Path) -> int:
    """Return the number of rows in a Parquet file; SimPOError if it cannot be read."""
    with _open_table(path, "Parquet") as file:
        return file.metadata.num_rows


def arrow_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow file or stream; SimPOError if it cannot be read."""
    with _open_table(path, "Arrow") as reader:
        yield from _batch_rows(path, _arrow_batches(reader))


def count_arrow(path: Path) -> int:
    """Return the number of rows in an Arrow file or stream; SimPOError if it cannot be read."""
    with _open_table(path, "Arrow") as reader:
        return sum(batch.num_rows for batch in _arrow_batches(reader))


def _arrow_batches(reader: Any) -> Iterator[Any]:
    if not hasattr(reader, "get_batch"):  # a stream
        yield from reader
        return
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _batch_rows(path: Path, batches: Iterator[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        # pyarrow trusts the offsets in a file: damaged ones would end the process.
        batch.validate(full=True)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for value in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield Row(0, f"{path}:{number}", value)


# --- through datasets ------------------------------------------------------------------------


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder was written by save_to_disk of a Dataset or DatasetDict."""
    if (folder / _DATASET_DICT).is_file():
        return True
    return all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def open_saved_dataset(name: str, folder: Path, split: str | None) -> Source:
    """Open a folder that save_to_disk has written.

    Raises:
        SimPOError: it cannot be loaded, it has several splits and none is named, or it lacks the
            split.
    """
    from datasets import load_from_disk
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        data: Any = load_from_disk(str(folder))
        for part in data.values() if isinstance(data, dict) else [data]:
            part.data.validate(full=True)  # as in `_batch_rows`
    except (OSError, DatasetsError, ArrowException, *_OF_DAMAGE) as error:
        raise SimPOError(f"cannot load the dataset in {name}: {first_line(error)}") from None
    if not isinstance(data, dict):  # a DatasetDict is one
        if split is not None:
            raise SimPOError(
                f"the split is {split!r}, but {name} is one saved dataset without splits; remove it"
            )
        return _dataset_source(name, name, data, (name,))
    splits = list(map(str, data))
    split = splits[0] if split is None and len(splits) == 1 else split
    if split is None:
        raise _several_splits(name, splits)
    if split not in splits:
        raise SimPOError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    return _dataset_source(name, f"{name}[{split}]", data[split], (name, split))


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
                raise _several_splits(name, list(map(str, splits)))
            split = str(splits[0])
        data = load_dataset(name, subset, split=split)
    except ConnectionError as error:
        raise SimPOError(
            f"there is no file or folder {name!r}, and the Hub, where it could be a dataset, "
            f"cannot be reached ({first_line(error)}); correct the name, or check the connection"
        ) from None
    except (OSError, ValueError, DatasetsError) as error:
        raise SimPOError(f"cannot load the dataset {name!r}: {first_line(error)}") from None
    return _dataset_source(name, f"{name}[{split}]", data, (name, split, subset or ""))


def _several_splits(name: str, splits: list[str]) -> SimPOError:
    return SimPOError(
        f"{name} has the splits {', '.join(splits)}; name one with data.train_split or "
        "data.valid_split"
    )


def _dataset_source(name: str, location: str, data: Any, labels: tuple[str, ...]) -> Source:
    """Return the rows of a `datasets.Dataset`, whose Arrow files identify its content."""

    def rows() -> Iterator[Row]:
        for index, value in enumerate(data):
            yield Row(index, f"{location}:{index + 1}", value)

    files = tuple(Path(file["filename"]) for file in data.cache_files)
    return Source(name, rows, lambda: len(data), files, labels)
