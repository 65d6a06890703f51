"""Rows that are in memory as a source."""

from collections.abc import Iterator
from typing import Any

from .sources import Row, Source, without_nulls


def memory_source(rows: Any, name: str = "rows", columns: dict[str, str] | None = None) -> Source:
    """Return rows that are in memory as a source."""
    values = list(rows)

    def read() -> Iterator[Row]:
        for number, value in enumerate(values):
            yield Row(number, f"{name}:{number + 1}", without_nulls(value))

    return Source(name, read, lambda: len(values), (), (name,))
