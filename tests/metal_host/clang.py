"""Lets Clang (libclang from PyPI) read a kernel's C++ text, for what g++ does not know."""

import re
from collections.abc import Sequence

from clang.cindex import Diagnostic, Index, TranslationUnit

from .build import HERE

FILE = "kernel.cpp"  # in memory
# libclang comes without headers. The target decides on the size of types alone.
FLAGS = ["-std=gnu++17", "-Wno-everything", "-nostdinc", f"-I{HERE / 'freestanding'}", f"-I{HERE}"]
LINE = re.compile(r'#line (\d+) "(\w+)"')


def parse(text: str, flags: Sequence[str]) -> TranslationUnit:
    """Return what Clang understands of a text."""
    return Index.create().parse(FILE, [*flags, *FLAGS], [(FILE, text)])


def errors(unit: TranslationUnit, text: str) -> str:
    """Return its errors, one per line, or an empty string."""
    severe = [d for d in unit.diagnostics if d.severity >= Diagnostic.Error]
    return "\n".join(f"{_position(e.location.line, text)}: {e.spelling}" for e in severe)


def _position(line: int, text: str) -> str:
    """Return the line of header or source by the #line directive before it: "header:12"."""
    for back, before in enumerate(reversed(text.split("\n")[: line - 1])):
        if directive := LINE.match(before):
            return f"{directive[2]}:{int(directive[1]) + back}"
    return f"{FILE}:{line}"
