"""Encoded pairs in files: written one after the other, read through memory maps.

A folder holds
records.bin   a RECORD a pair: where its tokens and texts stand, and its numbers
tokens.bin    int32: the chosen sequence of a pair, then its rejected one
text.bin      UTF-8: a pair's source ("file:line"), then its prompt as `pairs.prompt_text`
"""

import mmap
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np

from .encode import EncodedPair, TokenizedSequence

FILES = ("records.bin", "tokens.bin", "text.bin")
# The numbers of a pair that need no tokens to be read; see `column`.
NUMBERS: dict[str, Callable[[EncodedPair], int]] = {
    "chosen": lambda pair: len(pair.chosen.tokens),
    "rejected": lambda pair: len(pair.rejected.tokens),
    "chosen_score_start": lambda pair: pair.chosen.score_start,
    "rejected_score_start": lambda pair: pair.rejected.score_start,
    "index": lambda pair: pair.index,
    "boundary_tokens": lambda pair: pair.boundary_tokens,
    "cut_prompt": lambda pair: pair.cut_prompt,
    "cut_response": lambda pair: pair.cut_response,
}
# The system counts what was read of a mapped file as memory of the program. It is given back after
# so many reads, and stays in the system's own cache while there is room.
READS_KEPT = 256
PLACES = ("first_token", "first_byte", "source_bytes", "prompt_bytes")
# 68 bytes a pair; sizes and order of bytes are part of the files' format (`keys.FORMAT`).
RECORD = np.dtype(
    [(name, "<i8" if name in ("index", *PLACES) else "<i4") for name in (*NUMBERS, *PLACES)]
)


class TokenizedPairs(Sequence[EncodedPair]):
    """The pairs in a folder, or some of them; an `EncodedPair` is made when it is asked for.

    Nothing but the places of a part's pairs (8 bytes each) is in memory. The files may be renamed
    and deleted while they are in use, not changed.

    Args:
        folder: written by `TokenWriter`.
    """

    def __init__(self, folder: Path) -> None:
        records, tokens, text = (Mapped(folder / name) for name in FILES)
        self._records = np.frombuffer(records.content, RECORD)
        self._tokens, self._text = tokens, text
        self._rows: np.ndarray | None = None  # all of them

    def __len__(self) -> int:
        return len(self._records if self._rows is None else self._rows)

    @overload
    def __getitem__(self, index: int) -> EncodedPair: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenizedPairs": ...
    def __getitem__(self, index: int | slice) -> "EncodedPair | TokenizedPairs":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        record = self._record(index)
        content = self._tokens.read()
        both = record["chosen"] + record["rejected"]
        tokens = np.frombuffer(content, "<i4", both, 4 * record["first_token"])
        first = record["first_byte"]
        source = self._text.read()[first : first + record["source_bytes"]]
        return EncodedPair(
            TokenizedSequence(tokens[: record["chosen"]], record["chosen_score_start"]),
            TokenizedSequence(tokens[record["chosen"] :], record["rejected_score_start"]),
            record["index"],
            source.decode("utf-8", "surrogatepass"),
            record["boundary_tokens"],
            record["cut_prompt"],
            record["cut_response"],
        )

    def take(self, places: np.ndarray) -> "TokenizedPairs":
        """The pairs at these places (int [n]) of this sequence, in this order."""
        part = object.__new__(TokenizedPairs)
        part._records, part._tokens, part._text = self._records, self._tokens, self._text
        part._rows = places if self._rows is None else self._rows[places]
        return part

    def numbers(self, name: str) -> np.ndarray:
        """One of NUMBERS for all pairs: int32 or int64 [N]."""
        values = self._records[name]
        return values if self._rows is None else values[self._rows]

    def prompts(self) -> Iterable[bytes]:
        """The prompts' texts in turn, as they were given to the writer."""
        for place in range(len(self)):
            record = self._record(place)
            first = record["first_byte"] + record["source_bytes"]
            yield self._text.read()[first : first + record["prompt_bytes"]]

    def _record(self, place: int) -> dict[str, int]:
        row = place if self._rows is None else self._rows[place]
        return dict(zip(RECORD.names or (), self._records[row].item(), strict=True))


class TokenWriter:
    """Writes the files of a folder, pair by pair; a context that closes them."""

    def __init__(self, folder: Path) -> None:
        with ExitStack() as files:
            self._records, self._tokens, self._text = (
                files.enter_context((folder / name).open("wb")) for name in FILES
            )
            self._files = files.pop_all()
        self.pairs = 0
        self._first_token = self._first_byte = 0

    def add(self, pair: EncodedPair, prompt: bytes) -> None:
        """Append a pair and its prompt's text; OSError if there is no room."""
        source = pair.source.encode("utf-8", "surrogatepass")  # a file's name may be no text
        record = np.zeros((), RECORD)
        for name, number in NUMBERS.items():
            record[name] = number(pair)
        places = (self._first_token, self._first_byte, len(source), len(prompt))
        for name, value in zip(PLACES, places, strict=True):
            record[name] = value
        self._records.write(record.tobytes())
        for side in (pair.chosen, pair.rejected):
            self._tokens.write(side.tokens.astype("<i4").tobytes())
        self._text.write(source + prompt)
        self.pairs += 1
        self._first_token += len(pair.chosen.tokens) + len(pair.rejected.tokens)
        self._first_byte += len(source) + len(prompt)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()


class Mapped:
    """A file as a memory map; an empty one, which cannot be mapped, as no bytes."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            is_empty = path.stat().st_size == 0
            self.content: Any = (
                b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            )
        self._reads = 0

    def read(self) -> Any:
        """The content, to take a part of it. Parts that were taken before stay what they are."""
        self._reads += 1
        if self._reads % READS_KEPT == 0 and self.content:
            self.content.madvise(mmap.MADV_DONTNEED)
        return self.content


def column(pairs: Sequence[EncodedPair], name: str) -> np.ndarray:
    """One of NUMBERS for each pair, int [N], without reading tokens where they are in files."""
    if isinstance(pairs, TokenizedPairs):
        return pairs.numbers(name)
    return np.fromiter(map(NUMBERS[name], pairs), np.int64, len(pairs))


def lengths(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """Each pair's `EncodedPair.length`, int [N]."""
    return np.maximum(column(pairs, "chosen"), column(pairs, "rejected"))
