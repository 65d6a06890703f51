"""Text as UTF-8 from files, compressed files and standard input.

Text in another encoding is an error that names the encoding and the command that converts it: a
wrong guess would train on garbled letters without anybody noticing.
"""

import codecs
import gzip
import io
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, BinaryIO

from ..errors import SimPOError
from .rows import first_line

# Endings of compressed files, and the program that writes their content to standard output.
COMPRESSED = {".gz": "gzip -dc", ".zst": "zstd -dc"}
# Bytes of text to tell an encoding by.
_SAMPLE_BYTES = 1 << 16
# Byte order marks, the longer ones first; iconv reads the mark of UTF-16 and UTF-32 itself.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Which of the first four bytes are zero if a text without a mark begins with ASCII characters.
_ZEROS = {"x000": "UTF-32LE", "000x": "UTF-32BE", "x0x0": "UTF-16LE", "0x0x": "UTF-16BE"}
_NO_TEXT = {
    b"\x1f\x8b": "gzip data; its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd data; its name must end in .zst",
    b"PAR1": "Parquet data; its name must end in .parquet",
    b"ARROW1": "Arrow data; its name must end in .arrow",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook; save it as CSV in UTF-8",
}
# Encodings of more than one byte per character: iconv's name, Python's, and the characters that
# text in it has, as a range and the least share of all that are not ASCII. The order matters: what
# is valid in one is often valid in a later one, too.
_MULTIBYTE = (
    ("SHIFT_JIS", "cp932", "\u3040", "\u30ff", 0.3),
    ("EUC-JP", "euc_jp", "\u3040", "\u30ff", 0.3),
    ("EUC-KR", "cp949", "\uac00", "\ud7a3", 0.8),
    ("GB18030", "gb2312", "\u3000", "\uffef", 0.8),
    ("BIG5", "big5", "\u3000", "\uffef", 0.8),
    ("GB18030", "gb18030", "\u3000", "\uffef", 0.8),
)


@dataclass(frozen=True)
class TextInput:
    """Text that can be read again and again.

    name: for messages and locations. open: returns its bytes, decompressed, from the start.
    path: its file, or None for standard input.
    """

    name: str
    open: Callable[[], IO[bytes]]
    path: Path | None = None


def text_file(path: Path) -> TextInput:
    """Return the text in a file, decompressed if its name ends in .gz or .zst."""
    return TextInput(str(path), lambda: _open_file(path), path)


def standard_input() -> TextInput:
    """Return the text in standard input, which is read once and stays in memory.

    Raises:
        SimPOError: it is a terminal, closed, or cannot be read.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise SimPOError("- is standard input, and no data comes from there; pipe or redirect some")
    try:
        content = _read_all(sys.stdin.buffer)
    except OSError as error:
        raise SimPOError(f"cannot read standard input: {error}") from None
    return TextInput("stdin", lambda: io.BytesIO(content))


@lru_cache(1)
def _read_all(stream: BinaryIO) -> bytes:
    # Whoever opens "-" a second time in this process gets the same content.
    return stream.read()


def _open_file(path: Path) -> Any:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        from pyarrow import CompressedInputStream, PythonFile

        return CompressedInputStream(PythonFile(path.open("rb"), "r"), "zstd")
    return path.open("rb")


@contextmanager
def open_bytes(text: TextInput) -> Iterator[io.BufferedReader]:
    """Open text as bytes; errors while it is open become a SimPOError.

    Raises:
        SimPOError: it cannot be read or decompressed, or its first bytes are no UTF-8.
    """
    try:
        with ExitStack() as stack:
            raw: Any = stack.enter_context(text.open())
            stream = stack.enter_context(io.BufferedReader(raw))
            _check_first_bytes(text, stream.peek(8)[:8])
            yield stream
    except (OSError, EOFError, zlib.error) as error:  # EOFError: a truncated gzip file
        raise SimPOError(f"cannot read {text.name}: {first_line(error)}") from None


@contextmanager
def open_characters(text: TextInput) -> Iterator[io.TextIOWrapper]:
    """Open text as characters, without a byte order mark and with its own line breaks.

    Raises:
        SimPOError: it cannot be read or decompressed, or is not UTF-8.
    """
    try:
        with (
            open_bytes(text) as stream,
            io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as characters,
        ):
            yield characters
    except UnicodeDecodeError:
        raise encoding_error(text) from None


def _check_first_bytes(text: TextInput, first: bytes) -> None:
    """Raise a SimPOError if text begins like other data, or in an encoding with zero bytes."""
    for start, what in _NO_TEXT.items():
        if first.startswith(start):
            if text.path is None:
                kind = what.partition(";")[0]
                raise SimPOError(
                    f"{text.name} is {kind}, not text; name the file itself in the place of -"
                )
            raise SimPOError(f"{text.name} is not text but {what}")
    encoding = next((name for mark, name in _MARKS.items() if first.startswith(mark)), None)
    encoding = encoding or _ZEROS.get("".join("x" if byte else "0" for byte in first[:4]))
    if encoding is not None:
        raise SimPOError(f"{text.name} is {encoding}, not UTF-8; {_conversion(text, encoding)}")


def encoding_error(text: TextInput) -> SimPOError:
    """Return the error for text that is not UTF-8: its encoding, and how to convert it."""
    sample = b""
    with open_bytes(text) as lines:
        for line in lines:
            if not _is_utf8(line):
                sample += line[:_SAMPLE_BYTES]
            if len(sample) >= _SAMPLE_BYTES:
                break
    encoding = guess_encoding(sample)
    return SimPOError(
        f"{text.name} is not UTF-8; its encoding looks like {encoding}; "
        f"{_conversion(text, encoding)}"
    )


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def guess_encoding(sample: bytes) -> str:
    """Return iconv's name of the encoding that text that is not UTF-8 seems to have."""
    # Whole lines, or the last character may be cut in two.
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    # Bytes above ASCII stand side by side in the encodings of several bytes per character, and in
    # Cyrillic words; in the languages of Western Europe an accented letter is among ASCII letters.
    high = [byte >= 0x80 for byte in sample]
    adjacent = sum(a and b for a, b in pairwise(high))
    if adjacent <= sum(high) / 4:
        return "WINDOWS-1252"
    for name, codec, first, last, share in _MULTIBYTE:
        try:
            letters = [c for c in sample.decode(codec) if not c.isascii()]
        except UnicodeDecodeError:
            continue
        if letters and sum(first <= c <= last for c in letters) >= share * len(letters):
            return name
    return "WINDOWS-1251" if adjacent > sum(high) / 2 else "WINDOWS-1252"


def _conversion(text: TextInput, encoding: str) -> str:
    """Return what to type to have the text in UTF-8."""
    iconv = f"iconv -f {encoding} -t UTF-8"
    if text.path is None:
        return f"pipe it through `{iconv}`"
    path, unpack = text.path, COMPRESSED.get(text.path.suffix)
    if unpack is not None:
        iconv = f"{unpack} {shlex.quote(str(path))} | {iconv}"
        path = path.with_suffix("")
    else:
        iconv = f"{iconv} {shlex.quote(str(path))}"
    output = path.with_name(f"{path.stem}.utf8{path.suffix}")
    return f"convert it with `{iconv} > {shlex.quote(str(output))}`"
