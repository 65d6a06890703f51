"""Read prompts from files: text with one prompt per line, or records with prompts in them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config.sources import SourceConfig
from ..data.records import describe, parse_tools
from ..data.rows import InvalidRecordError, Row
from ..data.sources import open_source
from ..errors import SimPOError
from ..files import require_regular_file
from ..paths import local_path
from .prompts import NamedPrompt, check_prompt, with_system_turn

STDIN = "-"


def read_prompts(
    name: str, columns: Mapping[str, str] | None = None, stdin: Iterable[str] = ()
) -> list[NamedPrompt]:
    """Read all prompts of a file.

    Args:
        name: a .txt file has one prompt per line, and blank lines are skipped. Any other file is
            read as a dataset is (`data.sources`): each record has a ``prompt``, text or messages,
            or ``messages``, and may have a ``system`` text and ``tools``. "-": ``stdin``, JSON
            Lines if its first line begins with "{", else text.
        columns: other names of these columns, as data.columns has them.

    Raises:
        SimPOError: it cannot be read, has no prompts, or a prompt that cannot be used.
    """
    if name == STDIN:
        prompts = _stdin_prompts(list(stdin), columns or {})
    elif name.lower().endswith(".txt"):
        prompts = _text_prompts(_text_lines(local_path(name)), name)
    else:
        rows = open_source(SourceConfig(name), require_pairs=False).rows()
        prompts = [_record_prompt(row, columns or {}) for row in rows]
    if not prompts:
        shown = "standard input" if name == STDIN else name
        raise SimPOError(f"{shown} has no prompts; it must have at least one")
    return prompts


def _text_lines(path: Path) -> list[str]:
    try:
        text = require_regular_file(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SimPOError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise SimPOError(f"cannot read {path}: {error.strerror or error}") from None
    return text.split("\n")  # not splitlines, which divides at characters that a prompt may have


def _text_prompts(lines: Iterable[str], name: str) -> list[NamedPrompt]:
    return [
        NamedPrompt(line.strip(), f"{name}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _stdin_prompts(lines: list[str], columns: Mapping[str, str]) -> list[NamedPrompt]:
    named = "standard input"
    first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("{"):
        return _text_prompts(lines, named)
    return [_record_prompt(row, columns) for row in _json_rows(lines, named)]


def _json_rows(lines: Iterable[str], name: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield Row(0, f"{name}:{number}", json.loads(line))
            except (ValueError, RecursionError) as error:
                yield Row(0, f"{name}:{number}", None, f"invalid JSON: {error}")


def _record_prompt(row: Row, columns: Mapping[str, str]) -> NamedPrompt:
    """Return the prompt of one record.

    Raises:
        SimPOError: it has none that can be used.
    """
    if row.problem or not isinstance(row.value, dict):
        problem = row.problem or f"it is {describe(row.value)} and must be a JSON object"
        raise SimPOError(f"{row.source} cannot be read: {problem}")
    record: dict[str, Any] = row.value
    column = columns.get("prompt", "prompt")
    prompt = record.get(column, record.get("messages"))
    if prompt is None:
        names = ", ".join(map(str, record)) or "no columns"
        raise SimPOError(
            f"{row.source} has neither {column} nor messages; it has {names} (data.columns names "
            "other columns: data.columns={prompt: question})"
        )
    try:
        tools = parse_tools(record)
    except InvalidRecordError as error:
        raise SimPOError(f"{row.source} cannot be used: {': '.join(error.args)}") from None
    check_prompt(prompt, row.source)
    result = NamedPrompt(prompt, row.source, tools)
    system = record.get(columns.get("system", "system"))
    if system is None:
        return result
    if not isinstance(system, str):
        raise SimPOError(f"{row.source}: system is {describe(system)}; it must be text")
    return with_system_turn(result, system)
