"""Encoded pairs on disk: written one after the other, read back through memory maps.

A folder holds three files:
records.bin   one RECORD_DTYPE per pair: its numbers, and where its tokens and texts begin
tokens.bin    int32: for each pair the chosen sequence, then the rejected one
text.bin      UTF-8: for each pair its source ("file:line"), then its prompt (`pairs.prompt_text`)
"""

import mmap
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np

from .encode import EncodedPair, TokenizedSequence

FILES = ("records.bin", "tokens.bin", "text.bin")
# The numbers of a pair that can be read without its tokens; see `column`. "chosen" and "rejected"
# are lengths of whole sequences, prompt included.
COLUMNS: dict[str, Callable[[EncodedPair], int]] = {
    "chosen": lambda pair: len(pair.chosen.tokens),
    "rejected": lambda pair: len(pair.rejected.tokens),
    "chosen_score_start": lambda pair: pair.chosen.score_start,
    "rejected_score_start": lambda pair: pair.rejected.score_start,
    "index": lambda pair: pair.index,
    "boundary_tokens": lambda pair: pair.boundary_tokens,
    "cut_prompt": lambda pair: pair.cut_prompt,
    "cut_response": lambda pair: pair.cut_response,
    "template_tokens": lambda pair: pair.template_tokens,
    "dropped": lambda pair: pair.dropped,
}
# Offsets count from the start of tokens.bin (in tokens) and text.bin (in bytes), sizes in bytes.
OFFSETS_AND_SIZES = ("token_offset", "text_offset", "source_size", "prompt_size")
# 76 bytes per pair. Order, sizes and byte order of the fields are the file format
# (`keys.FORMAT`); their names are not in the file.
RECORD_DTYPE = np.dtype(
    [
        (name, "<i8" if name in ("index", *OFFSETS_AND_SIZES) else "<i4")
        for name in (*COLUMNS, *OFFSETS_AND_SIZES)
    ]
)
# Pages read through a memory map count as the process's memory until they are released. After this
# many reads they are; the operating system keeps them in its page cache while there is room.
READS_BEFORE_RELEASE = 256


class StoredPairs(Sequence[EncodedPair]):
    """Pairs on disk, whose numbers can be read without their tokens.

    A subclass has the methods that have no body here.
    """

    @overload
    def __getitem__(self, index: int) -> EncodedPair: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> "EncodedPair | Self":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self._pair(index)

    @abstractmethod
    def _pair(self, index: int) -> EncodedPair:
        """Read the pair at an index; IndexError beyond the last."""

    @abstractmethod
    def take(self, indices: np.ndarray) -> Self:
        """Return the pairs at ``indices`` (int [n]) of this sequence, in that order."""

    @abstractmethod
    def column(self, name: str) -> np.ndarray:
        """Return one of COLUMNS for all pairs: int32 [N], or int64 [N] for "index"."""

    @abstractmethod
    def largest_token_ids(self) -> np.ndarray:
        """Return the largest token id of each pair, see the function of this name."""

    @abstractmethod
    def _prompt(self, index: int) -> bytes:
        """Read the text of the prompt of the pair at an index."""

    def prompts(self) -> Iterable[bytes]:
        """Yield the text of each pair's prompt, as it was passed to `TokenWriter.add`."""
        return map(self._prompt, range(len(self)))


class TokenizedPairs(StoredPairs):
    """The pairs in a folder, or a selection of them; each `EncodedPair` is created when indexed.

    Only the row numbers of a selection (8 bytes per pair) are held in memory. The files may be
    renamed and deleted while in use, but must not be modified.

    Args:
        folder: written by `TokenWriter`.

    Raises:
        OSError: a file is missing or cannot be mapped.
        ValueError: records.bin does not consist of whole records.
    """

    def __init__(self, folder: Path) -> None:
        records, tokens, text = (_MappedFile(folder / name) for name in FILES)
        self._records = np.frombuffer(records.content, RECORD_DTYPE)
        self._tokens, self._text = tokens, text
        self._rows: np.ndarray | None = None  # None: all rows

    def __len__(self) -> int:
        return len(self._records if self._rows is None else self._rows)

    def _pair(self, index: int) -> EncodedPair:
        record = self._record(index)
        num_tokens = record["chosen"] + record["rejected"]
        offset = 4 * record["token_offset"]  # in bytes, of int32
        tokens = np.frombuffer(self._tokens.read(), "<i4", num_tokens, offset)
        start = record["text_offset"]
        source = self._text.read()[start : start + record["source_size"]]
        return EncodedPair(
            TokenizedSequence(tokens[: record["chosen"]], record["chosen_score_start"]),
            TokenizedSequence(tokens[record["chosen"] :], record["rejected_score_start"]),
            record["index"],
            source.decode("utf-8", "surrogatepass"),
            record["boundary_tokens"],
            record["cut_prompt"],
            record["cut_response"],
            record["template_tokens"],
            record["dropped"],
        )

    def take(self, indices: np.ndarray) -> "TokenizedPairs":
        """Return the pairs at these indices; they share the files of these."""
        selection = object.__new__(TokenizedPairs)  # shares the maps: no file is opened again
        selection._records, selection._tokens = self._records, self._tokens
        selection._text = self._text
        selection._rows = indices if self._rows is None else self._rows[indices]
        return selection

    def column(self, name: str) -> np.ndarray:
        """Return one of COLUMNS, or of OFFSETS_AND_SIZES, for all pairs."""
        values = self._records[name]
        return values if self._rows is None else values[self._rows]

    def largest_token_ids(self) -> np.ndarray:
        """Return the largest token id of each pair, uint32 [N]."""
        starts = self.column("token_offset")
        ends = starts + self.column("chosen") + self.column("rejected")
        result = np.empty(len(self), np.uint32)
        for index in np.argsort(starts):  # in the file's order, which is faster to read
            tokens = np.frombuffer(self._tokens.read(), "<u4")
            result[index] = tokens[starts[index] : ends[index]].max()
        return result

    def _prompt(self, index: int) -> bytes:
        record = self._record(index)
        start = record["text_offset"] + record["source_size"]
        return self._text.read()[start : start + record["prompt_size"]]

    def _record(self, index: int) -> dict[str, int]:
        row = index if self._rows is None else self._rows[index]
        return dict(zip(RECORD_DTYPE.names or (), self._records[row].item(), strict=True))


class TokenWriter:
    """Context manager that writes the files of a folder, pair by pair."""

    def __init__(self, folder: Path) -> None:
        with ExitStack() as files:
            self._records, self._tokens, self._text = (
                files.enter_context((folder / name).open("wb")) for name in FILES
            )
            self._files = files.pop_all()
        self.num_pairs = 0
        self._token_offset = self._text_offset = 0

    def add(self, pair: EncodedPair, prompt: bytes) -> None:
        """Append a pair and the text of its prompt.

        Raises:
            OSError: the files cannot be written, e.g. because the disk is full.
        """
        # The name of a file may contain bytes that are not UTF-8: Python has them as surrogates.
        source = pair.source.encode("utf-8", "surrogatepass")
        record = np.zeros((), RECORD_DTYPE)
        for name, value_of in COLUMNS.items():
            record[name] = value_of(pair)
        layout = (self._token_offset, self._text_offset, len(source), len(prompt))
        for name, value in zip(OFFSETS_AND_SIZES, layout, strict=True):
            record[name] = value
        self._records.write(record.tobytes())
        for sequence in (pair.chosen, pair.rejected):
            self._tokens.write(sequence.tokens.astype("<i4").tobytes())
        self._text.write(source + prompt)
        self.num_pairs += 1
        self._token_offset += len(pair.chosen.tokens) + len(pair.rejected.tokens)
        self._text_offset += len(source) + len(prompt)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()


class _MappedFile:
    """A file as a read-only memory map that releases the memory it has read."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            is_empty = path.stat().st_size == 0  # mmap raises for an empty file
            self.content: Any = (
                b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            )
        self._reads = 0

    def read(self) -> Any:
        """Return the whole content, to be sliced. Earlier slices stay valid."""
        self._reads += 1
        if self._reads % READS_BEFORE_RELEASE == 0 and self.content:
            self.content.madvise(mmap.MADV_DONTNEED)
        return self.content


def largest_token_ids(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """Return the largest token id of each pair, uint32 [N]; a negative one counts as very large."""
    if isinstance(pairs, StoredPairs):
        return pairs.largest_token_ids()
    return np.array(
        [
            max(s.tokens.astype(np.int32).view(np.uint32).max() for s in (p.chosen, p.rejected))
            for p in pairs
        ],
        np.uint32,
    )


def column(pairs: Sequence[EncodedPair], name: str) -> np.ndarray:
    """Return one of COLUMNS for each pair, int [N], without reading tokens of pairs on disk."""
    if isinstance(pairs, StoredPairs):
        return pairs.column(name)
    return np.fromiter(map(COLUMNS[name], pairs), np.int64, len(pairs))


def content_sha256(pairs: Sequence[EncodedPair]) -> str:
    """Return the SHA-256 of the pairs' tokens and of where their scoring starts, in this order.

    Where the pairs were read from does not count.
    """
    digest = sha256()
    for pair in pairs:
        for sequence in (pair.chosen, pair.rejected):
            digest.update(b"%d %d " % (len(sequence.tokens), sequence.score_start))
            digest.update(sequence.tokens.astype("<i4").tobytes())
    return digest.hexdigest()


def lengths(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """Return `EncodedPair.length` for each pair, int [N]."""
    return np.maximum(column(pairs, "chosen"), column(pairs, "rejected"))
