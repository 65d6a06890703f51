"""Rows that a program has in memory: lists of records, datasets, data frames, generators.

pandas, polars and pyarrow are not imported: what somebody passes has been imported already, and is
told by the methods that it has.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import SimPOError
from .columns import with_our_names
from .records import Pair
from .rows import Row, Source, check_columns

_ACCEPTED = (
    "a list or an iterator of records (dicts with prompt, chosen and rejected), a "
    "datasets.Dataset, or a pandas or polars DataFrame"
)
# pandas' values for a missing cell, which are equal to nothing, not even to themselves.
_MISSING_TYPES = ("NaTType", "NAType")


def memory_source(
    rows: Any, name: str = "rows", columns: Mapping[str, str] | None = None
) -> Source:
    """Return a source of rows in memory; an iterator is read to its end now, and only once.

    Args:
        rows: a list or iterator of dicts or `Pair`, a datasets.Dataset or IterableDataset, a pandas
            or polars DataFrame, or a pyarrow.Table. Cells that are None, NaN or NaT are absent.
        name: for messages; rows are located as "rows[12]", from 0.
        columns: the data's names for ours, as in ``data.columns``.

    Raises:
        SimPOError: rows of another kind, or columns that are not there or not recognized.
    """
    records = _records(rows, name)

    def read() -> Iterator[Row]:
        for index, record in enumerate(records):
            value, problem = None, None
            try:
                value = _plain(record)
            except RecursionError as error:  # lists in lists in lists, or one that holds itself
                problem = str(error)
            yield Row(index, f"{name}[{index}]", value, problem)

    return with_our_names(Source(name, read, lambda: len(records), (), ()), columns)


def _records(rows: Any, name: str) -> Any:
    """Return rows as something that has a length and can be iterated again and again.

    Raises:
        SimPOError: they are of a kind that is not accepted.
    """
    if isinstance(rows, str | bytes | Path):
        raise SimPOError(
            f"{name} is the text {str(rows)!r}; it must be {_ACCEPTED}; the name of a file or "
            "dataset belongs into data.train or data.valid"
        )
    if isinstance(rows, Mapping):
        splits = [key for key, value in rows.items() if hasattr(value, "column_names")]
        remedy = (
            f"choose one of its splits, e.g. [{splits[0]!r}]"
            if splits
            else "datasets.Dataset.from_dict makes a dataset of a dict of columns"
        )
        raise SimPOError(f"{name} is a {type(rows).__name__}; it must be {_ACCEPTED}; {remedy}")
    if hasattr(rows, "collect") and hasattr(rows, "sink_parquet"):
        raise SimPOError(f"{name} is a LazyFrame; pass {name}.collect()")
    if hasattr(rows, "to_frame"):
        raise SimPOError(
            f"{name} is a {type(rows).__name__}, a single column; it must be {_ACCEPTED}; pass the "
            "whole data frame"
        )
    names = getattr(rows, "column_names", getattr(rows, "columns", None))
    names = [] if names is None else list(map(str, names))
    check_columns(name, names)
    for method, arguments in (("to_dicts", ()), ("to_pylist", ()), ("to_dict", ("records",))):
        # polars, pyarrow, pandas; a datasets.Dataset has to_dict, too, and is read row by row.
        if hasattr(rows, method) and names and not hasattr(rows, "features"):
            return getattr(rows, method)(*arguments)
    if hasattr(rows, "with_format") and hasattr(rows, "__len__"):
        return rows.with_format(None)
    if not isinstance(rows, Iterable):
        raise SimPOError(f"{name} is a {type(rows).__name__}; it must be {_ACCEPTED}")
    records = list(rows)
    if records and not isinstance(records[0], Mapping | Pair):
        raise SimPOError(
            f"{name}[0] is a {type(records[0]).__name__}; {name} must be {_ACCEPTED}; write "
            '{"prompt": …, "chosen": …, "rejected": …}'
        )
    return records


def _plain(value: Any) -> Any:
    """Return a record, or a value in one, as JSON would have it: dicts, lists, None."""
    if isinstance(value, Pair):
        names = ("prompt", "chosen", "rejected", "tools")
        return {name: getattr(value, name) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _plain(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a NumPy array or scalar, which pandas has in its cells
        return _plain(value.tolist())
    is_nan = isinstance(value, float) and math.isnan(value)
    return None if is_nan or type(value).__name__ in _MISSING_TYPES else value
