"""Pairs of several sources as one sequence, and how much of each source an epoch takes."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .encode import EncodedPair
from .order import EpochOrder
from .tokens import StoredPairs


class SourceCounts(NamedTuple):
    """What a run has of a source.

    pairs: to train on. quarantined: its records that are not used. per_epoch: pairs that an epoch
    takes. share: of the pairs of an epoch, from 0 to 1.
    """

    pairs: int
    quarantined: int
    per_epoch: int
    share: float


class Mixture(StoredPairs):
    """The pairs of several sources, one source after the other, or a selection of them.

    Each `EncodedPair` is created when indexed; its index is the row number in its own source.

    Args:
        parts: the pairs of each source by its name.
        weights: of each source, or None: see `order.EpochOrder`.
    """

    def __init__(
        self, parts: Mapping[str, StoredPairs], weights: Sequence[float] | None = None
    ) -> None:
        self.names, self.weights = tuple(parts), weights
        self._parts = tuple(parts.values())
        # Where each part begins in the sequence of all pairs.
        self._starts = np.cumsum([0, *map(len, self._parts)])[:-1]
        self._rows = np.arange(sum(map(len, self._parts)))

    def __len__(self) -> int:
        return len(self._rows)

    def _pair(self, index: int) -> EncodedPair:
        part, row = self._locate(index)
        return part[row]

    def _prompt(self, index: int) -> bytes:
        part, row = self._locate(index)
        return part._prompt(row)

    def _locate(self, index: int) -> tuple[StoredPairs, int]:
        """Return the part that has the pair at an index, and its row there."""
        row = self._rows[index]
        source = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._parts[source], int(row - self._starts[source])

    def take(self, indices: np.ndarray) -> "Mixture":
        """Return the pairs at these indices; each stays one of its source."""
        selection = object.__new__(Mixture)
        selection.__dict__.update(self.__dict__)
        selection._rows = self._rows[indices]
        return selection

    def column(self, name: str) -> np.ndarray:
        """Return one of COLUMNS for all pairs."""
        return self._gather(lambda part: part.column(name))

    def largest_token_ids(self) -> np.ndarray:
        """Return the largest token id of each pair, uint32 [N]."""
        return self._gather(lambda part: part.largest_token_ids())

    def _gather(self, values_of: Callable[[StoredPairs], np.ndarray]) -> np.ndarray:
        """Return the values that a function has for the pairs of a part, int [N] for all pairs."""
        numbers, values = self.source_numbers, []
        for number, part in enumerate(self._parts):
            rows = self._rows[numbers == number] - self._starts[number]
            values.append(values_of(part.take(rows)))
        result = np.concatenate(values)
        result[np.argsort(numbers, kind="stable")] = result.copy()
        return result

    @property
    def source_numbers(self) -> np.ndarray:
        """Of each pair, the number of its source in ``names``: int [N]."""
        return np.searchsorted(self._starts, self._rows, "right") - 1

    @property
    def sizes(self) -> dict[str, int]:
        """How many of these pairs each source has."""
        counts = np.bincount(self.source_numbers, minlength=len(self.names)).tolist()
        return dict(zip(self.names, counts, strict=True))


def epoch_order(pairs: Sequence[EncodedPair], seed: int) -> EpochOrder:
    """Return the order of training on pairs of any kind; those of a mixture follow its weights."""
    if not isinstance(pairs, Mixture):
        return EpochOrder([np.arange(len(pairs))], None, seed)
    numbers = pairs.source_numbers
    groups = [np.flatnonzero(numbers == n) for n in range(len(pairs.names))]
    return EpochOrder(groups, pairs.weights, seed)
