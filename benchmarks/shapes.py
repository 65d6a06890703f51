"""Batches of 4 real pairs in the shapes that training meets, tokenized by our own rules.

All are of one length-sorted epoch, as the baseline wants them, drawn with a seed.
"""

from collections.abc import Callable

import numpy as np

from mlx_simpo.config.simpo_config import DataConfig
from mlx_simpo.data.encode import Encoder, encode_pairs
from mlx_simpo.data.pairs import load_pairs
from mlx_simpo.model.loading import load_only_tokenizer

Pair = dict
Batches = list[list[Pair]]
SIZE = 4


def tokenized(model: str, data: str) -> list[Pair]:
    """Pairs as lists of token ids: chosen, rejected, and start, where their responses begin."""
    encoder = Encoder(load_only_tokenizer(model), DataConfig())
    encoded, _ = encode_pairs(encoder, load_pairs(data).pairs)
    return [
        {
            "chosen": pair.chosen.tokens.tolist(),
            "rejected": pair.rejected.tokens.tolist(),
            "start": pair.chosen.score_start,
        }
        for pair in encoded
    ]


def longest(pair: Pair) -> int:
    return max(len(pair["chosen"]), len(pair["rejected"]))


def response_lengths(pair: Pair) -> tuple[int, int]:
    return len(pair["chosen"]) - pair["start"], len(pair["rejected"]) - pair["start"]


def drawn(pairs: list[Pair], count: int) -> Batches:
    """So many batches of the length-sorted pairs: one from each part of the epoch, so that short
    and long ones have their share, in a random order."""
    ordered = sorted(pairs, key=longest)
    batches = [ordered[i : i + SIZE] for i in range(0, len(ordered) - SIZE + 1, SIZE)]
    rng = np.random.default_rng(0)
    parts = np.array_split(np.arange(len(batches)), count)
    return [batches[rng.choice(part)] for part in rng.permutation(np.array(parts, dtype=object))]


def natural(pairs: list[Pair], count: int) -> Batches:
    """The data as they are."""
    return drawn(pairs, count)


def short_prompts(pairs: list[Pair], count: int) -> Batches:
    """Prompts below 60 tokens, responses of 150 to 400."""
    return drawn(
        [p for p in pairs if p["start"] < 60 and all(150 <= n <= 400 for n in response_lengths(p))],
        count,
    )


def balanced(pairs: list[Pair], count: int) -> Batches:
    """Prompts about as long as the responses, at least 60 tokens each."""
    alike = [
        p
        for p in pairs
        if p["start"] >= 60 and all(0.6 <= n / p["start"] <= 1.6 for n in response_lengths(p))
    ]
    return drawn(alike, count)


def long_prompts(pairs: list[Pair], count: int) -> Batches:
    """Several turns: 250 to 350 tokens of prompt, responses of 16 to 100. Earlier turns are another
    pair's conversation, as there are too few such pairs in the data."""
    short = [p for p in pairs if all(16 <= n <= 100 for n in response_lengths(p))]
    before = [p["chosen"] for p in pairs if 200 <= len(p["chosen"]) <= 280]
    rng = np.random.default_rng(1)
    joined = []
    for pair in short:
        earlier = before[rng.integers(len(before))]
        if 250 <= len(earlier) + pair["start"] <= 350:
            joined.append(
                {
                    "chosen": earlier + pair["chosen"],
                    "rejected": earlier + pair["rejected"],
                    "start": len(earlier) + pair["start"],
                }
            )
    return drawn(joined, count)


def very_long(pairs: list[Pair], count: int) -> Batches:
    """One pair of 2048 tokens, half of them prompt: as long as a CPU has patience for."""
    text = [token for pair in pairs for token in pair["chosen"]]
    prompt, one, two = text[:1024], text[1024:2048], text[4096:5120]
    return [[{"chosen": prompt + one, "rejected": prompt + two, "start": 1024}]]


SHAPES: dict[str, Callable[[list[Pair], int], Batches]] = {
    "natural": natural,
    "short_prompts": short_prompts,
    "balanced": balanced,
    "long_prompts": long_prompts,
    "very_long": very_long,
}
