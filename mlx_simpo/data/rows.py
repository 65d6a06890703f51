"""What every source yields, whatever its format: rows with their origin, as in the data."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SimPOError, one_line

Message = dict[str, Any]


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
    labels: what else determines the rows and their ``source``: names, split, subset, columns.
    note: how its records are read, where that is not as their names say; for the user.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    count: Callable[[], int]
    files: tuple[Path, ...]
    labels: tuple[str, ...]
    note: str | None = None


class InvalidRecordError(Exception):
    """A record that cannot be trained on. Its arguments are a reason, and optionally a detail."""


class PythonNotation(str):
    """Text of a table's cell in which messages are written as Python shows them, not as JSON."""


def without_nulls(value: Any) -> Any:
    """Return ``value`` without nulls, which a table has where a row lacks a key.

    A message's content stays even if it is null: a response of null is a defect to report.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None or k == "content"}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def repeated_name(names: Iterable[str]) -> str | None:
    """Return a name that occurs twice, if any does: most readers would take the last one."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def check_columns(where: str, names: Iterable[str]) -> None:
    """Check that a table has no two columns of one name; SimPOError if it has."""
    if (name := repeated_name(names)) is not None:
        raise SimPOError(f"{where} has two columns called {name!r}; rename one of them")


def shown(value: Any) -> str:
    """Return the first characters of a value's repr, for messages."""
    try:
        return repr(value)[:40]
    except (ValueError, RecursionError):  # an integer of too many digits; a list that holds itself
        return f"a value of type {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """Return an error's message on one line, shortened to 300 characters."""
    return one_line(error, 300) or type(error).__name__
