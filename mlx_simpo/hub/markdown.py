"""Pieces of Markdown in which text of other people's making stays text."""

import math
import re
from collections.abc import Sequence
from typing import Any


def section(title: str, body: str) -> str:
    """A section; "" if it has no body."""
    return f"## {title}\n\n{body}" if body else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""

    def line(cells: Sequence[str]) -> str:
        # A bar ends a cell, even in code.
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join(map(line, [heads, ["---"] * len(heads), *rows]))


def code(text: str) -> str:
    """``text`` as code within a line; what is not printable, line breaks too, as escapes."""
    seen = printable(text)
    longest = max(map(len, re.findall("`+", seen)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{seen}{space}{fence}"


def printable(text: str) -> str:
    """``text`` on one line: what is not printable as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fenced(language: str, lines: str) -> str:
    """A block of code."""
    return f"```{language}\n{lines}\n```"


def number(value: Any) -> bool:
    """Whether a value is a number that can be shown: neither true or false, nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Any) -> str:
    """A setting's value in a cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value) if number(value) else code(str(value))
