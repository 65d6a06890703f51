"""Shingles and their sketches, against sets of the words themselves."""

import json

import numpy as np
from helpers.tiny import user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.prompt_words import PromptWords, read_words
from mlx_simpo.data.shingles import NO_HASH, SKETCH_SIZE, ShingleSets, shingles, similarity

WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=5, max_size=40)


def prompts(*texts: list[str]) -> PromptWords:
    return read_words(json.dumps([user(" ".join(text))]).encode() for text in texts)


def triples(words: list[str]) -> set[tuple[str, ...]]:
    padded = ["<", "<", *words, ">", ">"]
    return {tuple(padded[i : i + 3]) for i in range(len(padded) - 2)}


@given(WORDS, WORDS)
@settings(deadline=None, max_examples=100)
def test_similarity_is_that_of_the_words(one: list[str], other: list[str]) -> None:
    words = prompts(one, other)
    sets = ShingleSets(words.words, words.spans)
    expected = len(triples(one) & triples(other)) / len(triples(one) | triples(other))
    assert sets.similarity(0, 1) == similarity(words.words, words.spans, 0, 1) == expected
    assert sets.sizes.tolist() == [len(triples(one)), len(triples(other))]
    share = len(triples(one) & triples(other)) / len(triples(one))
    assert sets.share_in(0, sets, 1) == share


def test_a_sketch_has_the_smallest_hashes() -> None:
    texts = [[f"w{n}" for n in range(size)] for size in (5, 13, 14, 15, 200)]
    words = prompts(*texts)
    sketches = ShingleSets(words.words, words.spans).sketches
    for row, text in enumerate(texts):
        hashes, _ = shingles(words.words, words.spans.take(slice(row, row + 1)))
        assert len(hashes) == len(text) + 2
        expected = sorted(hashes.tolist())[:SKETCH_SIZE]
        assert sketches[row].tolist() == expected + [int(NO_HASH)] * (SKETCH_SIZE - len(expected))


def test_hashes_are_spread_evenly() -> None:
    """Sketches are random samples only if hashes of similar words are not similar."""
    words = prompts(*([f"word{n}", "a", "b", "c", f"x{n}"] for n in range(2000)))
    hashes, _ = shingles(words.words, words.spans)
    counts = np.bincount((np.unique(hashes) >> np.uint64(60)).astype(int), minlength=16)
    assert counts.min() > 0.85 * counts.mean()
    assert counts.max() < 1.15 * counts.mean()


def test_many_texts_are_hashed_in_parts() -> None:
    texts = [[f"w{n}", *"abcdef"] for n in range(5000)]
    words = prompts(*texts)
    sets = ShingleSets(words.words, words.spans)
    assert set(sets.sizes.tolist()) == {9}
    for row in (0, 2047, 2048, 4999):
        alone, _ = shingles(words.words, words.spans.take(slice(row, row + 1)))
        assert sets.sketches[row, :9].tolist() == alone.tolist()
