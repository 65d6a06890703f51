"""Read prompts from files: text with one prompt per line, or records with prompts in them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..config.sources import SourceConfig
from ..data.columns import our_row
from ..data.json_rows import json_rows
from ..data.messages import describe
from ..data.records import parse_tools
from ..data.rows import InvalidRecordError, Row
from ..data.sources import STDIN, open_as_it_is
from ..data.text_files import TextInput, open_characters, standard_input, text_file
from ..errors import SimPOError
from ..paths import local_path
from .prompts import NamedPrompt, check_prompt, with_system_turn


def read_prompts(name: str, columns: Mapping[str, str] | None = None) -> list[NamedPrompt]:
    """Read all prompts of a file.

    Args:
        name: a .txt file has one prompt per line, and blank lines are skipped. Any other file is
            read as a dataset is (`data.sources`): each record has a ``prompt``, text or messages,
            or ``messages``, and may have a ``system`` text and ``tools``. "-": standard input, JSON
            if it begins with "{", else text.
        columns: other names of these columns, as data.columns has them.

    Raises:
        SimPOError: it cannot be read, has no prompts, or a prompt that cannot be used.
    """
    if name == STDIN:
        text = standard_input()
        name = text.name
        is_json = _first_character(text) == "{"
        prompts = _from_rows(json_rows(text), columns) if is_json else _from_lines(text)
    elif name.lower().endswith(".txt"):
        prompts = _from_lines(text_file(local_path(name)))
    else:
        prompts = _from_rows(open_as_it_is(SourceConfig(name)).rows(), columns)
    if not prompts:
        raise SimPOError(f"{name} has no prompts; it must have at least one")
    return prompts


def read_standard_input() -> str:
    """Return standard input as one text.

    Raises:
        SimPOError: it is a terminal or closed, or not UTF-8.
    """
    with open_characters(standard_input()) as characters:
        return characters.read()


def _first_character(text: TextInput) -> str:
    with open_characters(text) as characters:
        return next((line.lstrip()[0] for line in characters if line.strip()), "")


def _from_lines(text: TextInput) -> list[NamedPrompt]:
    with open_characters(text) as lines:
        return [
            NamedPrompt(line.strip(), f"{text.name}:{number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]


def _from_rows(rows: Iterator[Row], columns: Mapping[str, str] | None) -> list[NamedPrompt]:
    return [_record_prompt(our_row(row, columns or {}), row.value) for row in rows]


def _record_prompt(row: Row, columns: Iterable[Any]) -> NamedPrompt:
    """Return the prompt of one record with our names.

    Args:
        columns: as the data has them, for the message.

    Raises:
        SimPOError: it has none that can be used.
    """
    record = row.value
    if row.problem or not isinstance(record, dict):
        problem = row.problem or f"it is {describe(record)} and must be a JSON object"
        raise SimPOError(f"{row.source} cannot be read: {problem}")
    prompt = record.get("prompt", record.get("messages"))
    if prompt is None:
        raise SimPOError(
            f"{row.source} has no prompt and no messages; it has "
            f"{', '.join(map(str, columns)) or 'no columns'}; name the column of the prompts with "
            "data.columns, as in data.columns={prompt: question}"
        )
    try:
        tools = parse_tools(record)
    except InvalidRecordError as error:
        raise SimPOError(f"{row.source} cannot be used: {': '.join(error.args)}") from None
    check_prompt(prompt, row.source)
    result = NamedPrompt(prompt, row.source, tools)
    system = record.get("system")
    if not isinstance(system, str | None):
        raise SimPOError(f"{row.source}: system is {describe(system)}; it must be text")
    return with_system_turn(result, system) if system and system.strip() else result
