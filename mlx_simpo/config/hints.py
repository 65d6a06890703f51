"""Hints at the setting that an unknown name means: another tool's, or the nearest of ours."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from .alias_rules import Here
from .aliases import as_words, as_yaml, meaning, plain_name
from .value_types import RawText, plain_value


def hint_at_setting(path: str, names: Sequence[str], value: Any, others: Mapping[str, Any]) -> str:
    """Return a hint at what an unknown setting is here, such as ``; under train: write steps: 9``.

    Args:
        path: the unknown setting as the user wrote it, with or without its section.
        names: all settings, with their sections (``lora.rank``).
        others: what is written beside it, and its values.
    """
    is_raw = isinstance(value, RawText)
    plain = {name: plain_value(v) for name, v in others.items()}
    is_ours = plain_name(path) in {plain_name(name) for name in names}
    here = None if is_ours else meaning(path, value, plain)
    if here is None and not is_raw and (ours := _misplaced(path, names)):
        here = Here({ours: value}, True)
    if here is None:
        return hint_at_name(path, names)
    return f"; {as_words(here) if is_raw else as_yaml(here)}"


def _misplaced(path: str, names: Sequence[str]) -> str | None:
    """Return the one setting whose name, with or without its section, is written in a wrong place,
    such as ``lora.rank: 8`` or ``rank: 8`` outside the section lora."""
    leaf = path.rpartition(".")[2]
    same = [name for name in names if path in (name, name.replace(".", "_"))]
    same = same or [name for name in names if name.rpartition(".")[2] == leaf]
    return same[0] if len(same) == 1 else None


def hint_at_name(path: str, names: Sequence[str]) -> str:
    """Return a hint at the nearest name, such as ``; did you mean 'lora.rank'?``."""
    leaf = path.rpartition(".")[2]
    same_words = [name for name in names if _words(name) == _words(path)]  # lora_rank
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    by_leaf = {name.rpartition(".")[2]: name for name in names}
    close = difflib.get_close_matches(leaf, by_leaf, n=1)
    candidates = (
        same_words
        or same_leaf
        or [by_leaf[c] for c in close]
        or difflib.get_close_matches(path, names, n=1)
    )
    if not candidates:
        return "; `mlx-simpo train --help` lists them all"
    return f"; did you mean {candidates[0]!r}?"


def hint_at_section(name: str, sections: Sequence[str]) -> str:
    """Return a hint at the section that ``name`` misspells, or an empty string."""
    close = difflib.get_close_matches(name.lower(), sections, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _words(name: str) -> list[str]:
    """Split a name into lower-case words at dots, hyphens and underscores."""
    return name.lower().replace("-", "_").replace(".", "_").split("_")
