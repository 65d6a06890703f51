"""Rows of CSV and TSV: the first row names the columns, and empty cells are absent values."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from ..errors import SimPOError
from .rows import PythonNotation, Row, check_columns
from .text_files import TextInput, open_characters

# Messages as str() shows a list of them: what pandas writes into a cell.
_PYTHON_MESSAGES = re.compile(r"\s*\[?\s*\{\s*'(?:role|content|from|value|messages)'\s*:")
# Spreadsheets in much of Europe write semicolons, because the comma is their decimal point.
_DELIMITERS = (",", ";", "\t")


def csv_rows(text: TextInput) -> Iterator[Row]:
    """Yield the rows of CSV, which may be delimited by semicolons or tabs, too.

    Raises:
        SimPOError: the text cannot be read, is not UTF-8, or is not valid CSV.
    """
    return _rows(text, _DELIMITERS)


def tsv_rows(text: TextInput) -> Iterator[Row]:
    """Yield the rows of tab-separated values; SimPOError as for `csv_rows`."""
    return _rows(text, ("\t",))


def count_csv(text: TextInput) -> int:
    """Return the number of rows of CSV."""
    return sum(1 for _ in csv_rows(text))


def count_tsv(text: TextInput) -> int:
    """Return the number of rows of TSV."""
    return sum(1 for _ in tsv_rows(text))


def _rows(text: TextInput, delimiters: tuple[str, ...]) -> Iterator[Row]:
    """Yield the rows; SimPOError if they cannot be read."""
    with _records(text, delimiters) as records:
        _, header = next(records, (0, []))
        check_columns(text.name, filter(None, header))
        for line, cells in records:
            source = f"{text.name}:{line}"
            if len(cells) > len(header):
                problem = f"{len(cells)} cells, but the first row has {len(header)}"
                yield Row(0, source, None, problem)
                continue
            # A column without a name is the index that pandas writes.
            named = zip(header, cells, strict=False)
            yield Row(0, source, {name: _cell(name, cell) for name, cell in named if name})


@contextmanager
def _records(
    text: TextInput, delimiters: tuple[str, ...]
) -> Iterator[Iterator[tuple[int, list[str]]]]:
    """Open CSV as an iterator of (first line from 1, cells) of each row that is not blank.

    Raises:
        SimPOError: it cannot be read; also for what is not valid while it is open.
    """
    # Python's own limit is 131 072 characters, less than a long response has.
    csv.field_size_limit(sys.maxsize)
    with open_characters(text) as characters:
        first = characters.readline()
        delimiter = max(delimiters, key=first.count)
        # strict: without it a quote that is never closed takes the rest of the file into one cell.
        reader = csv.reader(chain([first], characters), delimiter=delimiter, strict=True)

        def records() -> Iterator[tuple[int, list[str]]]:
            line = 1
            for cells in reader:
                if any(cells):
                    yield line, cells
                line = reader.line_num + 1

        try:
            yield records()
        except csv.Error as error:
            raise SimPOError(
                f"{text.name}:{reader.line_num}: invalid CSV: {error}; a cell with quotes, "
                'delimiters or line breaks must be in quotes, and a quote in it doubled ("")'
            ) from None


def _cell(column: str, cell: str) -> Any:
    """Return a cell's text; messages if it is JSON of some; None if it is empty."""
    if cell.lstrip()[:1] not in ("[", "{"):
        return cell or None
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return PythonNotation(cell) if _PYTHON_MESSAGES.match(cell) else cell
    # Other JSON may be a prompt or a response by itself.
    is_history = column == "history" and isinstance(value, list)
    return value if is_history or _holds_messages(value) else cell


def _holds_messages(value: Any) -> bool:
    """Return whether JSON is a message, a list of messages, or an object with such a list."""
    if isinstance(value, dict):
        return _is_message(value) or _holds_messages(value.get("messages"))
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    keys = value.keys()
    return keys >= {"from", "value"} or ("role" in keys and bool(keys & {"content", "tool_calls"}))
