"""What every command prints: notes on stderr; on stdout tables for people, JSON for programs.

rich is imported where something is printed with it: it takes longer than the parser itself.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ..errors import one_line, redacted, visible
from ..version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from ..convert import Conversion


def announce(text: str) -> None:
    """Say on stderr what a command is about to do, before the imports that take a second or more.

    Later notes come there too (see `reporting.display`).
    """
    sys.stderr.write(f"mlx-simpo {__version__}: {escaped(text)} …\n")
    sys.stderr.flush()


def print_note(text: str) -> None:
    """Print to stderr what somebody should know who goes on."""
    sys.stderr.write(f"mlx-simpo: {escaped(text)}\n")


def print_error(error: object) -> None:
    """Print an error to stderr as the one line that every mistake of a user gets."""
    sys.stderr.write(f"mlx-simpo: error: {escaped(one_line(error))}\n")


def print_json(value: Any) -> None:
    """Print JSON to stdout, for other programs."""
    print_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_text(text: str) -> None:
    r"""Print to stdout; what is not valid Unicode (half of an emoji) as \u escapes.

    A terminal gets no control characters either, which a program gets as they are.
    """
    text = visible(text) if sys.stdout.isatty() else text
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode())


def print_conversion(options: argparse.Namespace, result: "Conversion") -> None:
    """Print the folder that a conversion has written, or with --json all of the result."""
    if options.json:
        print_json(result.as_dict())
    else:
        print_text(f"{result.output}\n")


def plain_console() -> "Console":
    """Return standard output; what looks like markup or an emoji's name is printed as it is."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def escaped(text: str) -> str:
    """Return ``text`` without tokens and passwords, and with escapes for what a terminal would act
    on or cannot show."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in redacted(text))
