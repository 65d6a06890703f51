"""Pieces of Markdown in which text written by other people has no effect as markup."""

import math
import re
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already."""

    def line(cells: Sequence[str]) -> str:
        # A bar ends a cell, even in code.
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join(map(line, [head, ["---"] * len(head), *rows]))


def code(text: str) -> str:
    """Return text as code within a line; characters that are not printable become escapes."""
    text = printable(text)
    # Code may hold backticks if its fence is longer than any run of them.
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


def printable(text: str) -> str:
    """Return text on one line; characters that are not printable become escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_value(value: Any) -> str:
    """Return a setting's value as Markdown."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value))
    return str(value) if is_number(value) else code(str(value))
