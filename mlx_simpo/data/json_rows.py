"""Rows of JSON Lines, and of JSON documents that hold a list of records.

JSON Lines is read here line by line rather than by `datasets`, whose reader forces one schema on
the file, fills missing keys with nulls and loses line numbers: an invalid row could then neither be
told from a valid one nor be located in the file. A document is read value by value for the same
reason, and so that memory holds one record at a time.
"""

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from ..errors import SimPOError
from .forms import RESPONSE_COLUMNS
from .rows import Row, repeated_name
from .text_files import TextInput, encoding_error, open_bytes, open_characters

# Lines that are not UTF-8, without one that is and has more than ASCII: a damaged line is
# quarantined, but so many are another encoding.
_MANY_LINES = 100
_CHUNK_CHARACTERS = 1 << 16
# A longer first line is not looked at to tell JSON Lines from a document.
_MAX_FIRST_LINE = 1 << 24
_SPACE = " \t\r\n"
_IN_NUMBERS = "+-.0123456789eE"


def _with_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; ValueError if a name occurs twice: nobody knows which is meant."""
    value = dict(pairs)
    if len(value) < len(pairs):
        name = repeated_name(name for name, _ in pairs)
        raise ValueError(f"{name!r} occurs twice in one object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_with_unique_names)
_EXPECTED = 'a list of records, an object with one such list ({"data": [...]}), or JSON Lines'


# --- JSON Lines ------------------------------------------------------------------------------


def _lines(text: TextInput) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of lines that are not blank; SimPOError if that fails."""
    with open_bytes(text) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line


def jsonl_rows(text: TextInput) -> Iterator[Row]:
    """Yield the rows of JSON Lines; an invalid line is a row with a problem.

    A list of records under the ending of JSON Lines is read as what it is.

    Raises:
        SimPOError: the text cannot be read, or is not UTF-8 at all.
    """
    first, is_only = _first_line(text)
    value = _object_in(first)
    is_list = isinstance(value, list) and value != [] and isinstance(value[0], dict)
    is_document = first.startswith(b"[") and (value is None or (is_only and is_list))
    return _document_rows(text) if is_document else _line_rows(text)


def count_jsonl(text: TextInput) -> int:
    """Return the number of rows that `jsonl_rows` yields."""
    first, _ = _first_line(text)
    if first.startswith(b"["):
        return sum(1 for _ in jsonl_rows(text))
    return sum(1 for _ in _lines(text))


def _line_rows(text: TextInput) -> Iterator[Row]:
    """Yield a row per line; SimPOError if the text cannot be read, or is not UTF-8 at all."""
    num_invalid = num_valid = 0  # of the lines with more than ASCII: as UTF-8
    for number, line in _lines(text):
        value, problem = None, None
        try:
            value = _DECODER.decode(line.decode("utf-8"))
            num_valid += not line.isascii()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            problem = f"not UTF-8: byte {byte:#04x} in column {error.start + 1}"
            num_invalid += 1
            if num_invalid >= _MANY_LINES and not num_valid:
                break
        except (ValueError, RecursionError) as error:
            problem = f"invalid JSON: {error}"
        yield Row(0, f"{text.name}:{number}", value, problem)
    if num_invalid > 1 and not num_valid:
        raise encoding_error(text)


# --- documents -------------------------------------------------------------------------------


def json_rows(text: TextInput) -> Iterator[Row]:
    """Yield the rows of a JSON document, or of JSON Lines: its content decides.

    Raises:
        SimPOError: it cannot be read, is neither, or has no list of records.
    """
    first, is_only = _first_line(text)
    is_lines = not is_only and isinstance(_object_in(first), dict)
    return _line_rows(text) if is_lines else _document_rows(text)


def _document_rows(text: TextInput) -> Iterator[Row]:
    with _open_document(text) as document:
        for line, value in _records(text, document):
            yield Row(0, f"{text.name}:{line}", value)
        if document.next_character():
            document.fail("more than one JSON value, and not one per line", document.position)


def count_json(text: TextInput) -> int:
    """Return the number of rows that `json_rows` yields."""
    return sum(1 for _ in json_rows(text))


def _first_line(text: TextInput) -> tuple[bytes, bool]:
    """Return (first line that is not blank, whether it is the only one)."""
    with open_bytes(text) as stream:
        first = stream.readline(_MAX_FIRST_LINE).removeprefix(codecs.BOM_UTF8)
        while first and not first.strip():
            first = stream.readline(_MAX_FIRST_LINE)
        return first.strip(), not any(line.strip() for line in stream)


def _object_in(line: bytes) -> Any:
    """Return the object or list that a line is by itself, or None."""
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


class _Document:
    """A JSON text that is read value by value. line: the number of the current line."""

    def __init__(self, name: str, characters: TextIO) -> None:
        self._name, self._characters = name, characters
        self._buffer = ""
        self.position, self.line = 0, 1

    def _read_more(self) -> bool:
        """Read as much again as is waiting, or a chunk; return whether there was any."""
        waiting = self._buffer[self.position :]
        more = self._characters.read(max(_CHUNK_CHARACTERS, len(waiting)))
        self._buffer, self.position = waiting + more, 0
        return bool(more)

    def _advance(self, end: int) -> None:
        self.line += self._buffer.count("\n", self.position, end)
        self.position = end

    def fail(self, problem: str, position: int) -> NoReturn:
        """Raise a SimPOError that names the line at a position in the buffer."""
        line = self.line + self._buffer.count("\n", self.position, position)
        raise SimPOError(f"{self._name}:{line}: invalid JSON: {problem}; it must be {_EXPECTED}")

    def next_character(self) -> str:
        """Return the next character that is not white space, without reading it; "" at the end."""
        while True:
            end = self.position
            while end < len(self._buffer) and self._buffer[end] in _SPACE:
                end += 1
            self._advance(end)
            if end < len(self._buffer):
                return self._buffer[end]
            if not self._read_more():
                return ""

    def skip(self, characters: str) -> str:
        """Read and return the next character; SimPOError unless it is one of these."""
        character = self.next_character()
        if not character or character not in characters:
            self.fail(f"no {' or '.join(characters)} where it must be", self.position)
        self._advance(self.position + 1)
        return character

    def value(self) -> Any:
        """Read and return the next value; SimPOError if it is invalid."""
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self.position)
            except json.JSONDecodeError as error:
                offset = error.pos - self.position
                if not self._read_more():
                    self.fail(error.msg, self.position + offset)
            except (ValueError, RecursionError) as error:  # a huge integer; deeply nested brackets
                self.fail(str(error), self.position)
            else:
                # A number near the end of the buffer may go on: the 1 of "1.5" is one, too.
                length, after = end - self.position, self._buffer[end : end + 1]
                is_whole = after not in _IN_NUMBERS if after else not isinstance(value, int | float)
                if is_whole or not self._read_more():
                    self._advance(self.position + length)
                    return value

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Read a list, yielding (line, element)."""
        self.skip("[")
        if self.next_character() == "]":
            self.skip("]")
            return
        while True:
            self.next_character()
            line = self.line
            yield line, self.value()
            if self.skip(",]") == "]":
                return

    def object_keys(self) -> Iterator[str]:
        """Read an object, yielding each key; whoever iterates reads the value after it."""
        self.skip("{")
        if self.next_character() == "}":
            self.skip("}")
            return
        while True:
            key = str(self.value())
            self.skip(":")
            yield key
            if self.skip(",}") == "}":
                return


@contextmanager
def _open_document(text: TextInput) -> Iterator[_Document]:
    """Open a JSON text; SimPOError if it cannot be read or is not UTF-8."""
    with open_characters(text) as characters:
        yield _Document(text.name, characters)


def _records(text: TextInput, document: _Document) -> Iterator[tuple[int, Any]]:
    """Yield (line, record) of the list in a document, or of the one record that it is."""
    first = document.next_character()
    if first == "[":
        yield from document.elements()
    elif first == "{":
        name = _list_of_records(text)
        if name is None:
            line = document.line
            yield line, document.value()
            return
        for key in document.object_keys():
            if key == name:
                yield from document.elements()
            else:
                document.value()
    elif first:
        document.fail("neither a list nor an object", document.position)


def _list_of_records(text: TextInput) -> str | None:
    """Return the key of the one list of objects in a JSON object; None if it is a record itself.

    Raises:
        SimPOError: it has several such lists, or is a table written column by column.
    """
    lists, objects, other = [], [], []  # keys, by their values
    with _open_document(text) as document:
        for key in document.object_keys():
            if document.next_character() != "[":
                (objects if isinstance(document.value(), dict) else other).append(key)
                continue
            # Element by element: the list may be most of a large file.
            are_objects = [isinstance(value, dict) for _, value in document.elements()]
            (lists if are_objects and all(are_objects) else other).append(key)
    keys = [*lists, *objects, *other]
    if len(objects) > 1 and objects == keys:
        what = "with one object per column"
    elif not RESPONSE_COLUMNS.isdisjoint(keys):
        return None
    elif len(lists) == 1:
        return lists[0]
    elif lists == keys and lists:
        what = f"with several lists of records ({', '.join(lists)})"
    else:
        return None
    raise SimPOError(
        f"{text.name} is a JSON object {what}; it must be {_EXPECTED} (pandas writes them with "
        'to_json(FILE, orient="records", lines=True))'
    )
