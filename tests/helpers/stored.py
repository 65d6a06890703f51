"""Pairs in files, as `data.tokens` writes them, and their content for comparisons."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.data.tokens import TokenizedPairs, TokenWriter


def write_and_open(
    folder: Path, pairs: Sequence[EncodedPair], prompts: Sequence[bytes]
) -> TokenizedPairs:
    """Write pairs with the texts of their prompts into a new folder, and open it."""
    folder.mkdir()
    with TokenWriter(folder) as writer:
        for pair, prompt in zip(pairs, prompts, strict=True):
            writer.add(pair, prompt)
    assert writer.num_pairs == len(pairs)
    return TokenizedPairs(folder)


def plain(pair: EncodedPair) -> tuple:
    """All that a pair has, as values that can be compared."""
    sequences = [(s.tokens.tolist(), s.score_start) for s in (pair.chosen, pair.rejected)]
    return (
        *sequences,
        pair.index,
        pair.source,
        pair.boundary_tokens,
        pair.cut_prompt,
        pair.cut_response,
        pair.template_tokens,
        pair.dropped,
    )


def make_pairs(count: int, source: str = "f") -> list[EncodedPair]:
    """Pairs of different lengths, numbered from 0."""

    def sequence(n: int) -> TokenizedSequence:
        return TokenizedSequence(np.arange(n, dtype=np.int32), 1)

    return [
        EncodedPair(sequence(3 + i % 5), sequence(2 + i % 7), i, f"{source}:{i}")
        for i in range(count)
    ]
