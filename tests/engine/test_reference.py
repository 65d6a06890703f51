"""The reference's log-probabilities against float64 NumPy, and what must not change them."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.engine.collate_stacked import collate_stacked
from mlx_simpo.engine.reference import average_logps, logsumexp
from mlx_simpo.kernels import two_level

MODEL = tiny_model()


def numpy_logps(logits: np.ndarray, tokens: list[int], start: int) -> float:
    """Mean log-softmax of the tokens from ``start`` on, in float64."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    logps = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return float(np.mean([logps[t - 1, tokens[t]] for t in range(start, len(tokens))]))


def random_pair(rng: np.random.Generator, longest: int = 40) -> EncodedPair:
    prompt = rng.integers(0, 500, rng.integers(1, 12)).tolist()
    first, second = (
        TokenizedSequence(
            np.array(prompt + rng.integers(0, 500, n).tolist(), np.int32), len(prompt)
        )
        for n in rng.integers(1, longest - len(prompt), 2)
    )
    return EncodedPair(first, second)


def reference_logps(pairs: list[EncodedPair]) -> np.ndarray:
    return np.array(average_logps(MODEL, *collate_stacked(pairs).arrays))


@pytest.mark.parametrize("seed", range(4))
def test_equals_numpy_row_by_row(seed: int) -> None:
    """Each row alone, unpadded, through the model; softmax and mean in float64."""
    rng = np.random.default_rng(seed)
    pairs = [random_pair(rng) for _ in range(3)]
    rows = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    expected = [
        numpy_logps(np.array(MODEL(mx.array(r.tokens)[None]))[0], r.tokens.tolist(), r.score_start)
        for r in rows
    ]
    np.testing.assert_allclose(reference_logps(pairs), expected, atol=2e-5)


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_batch_composition_order_and_padding_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [random_pair(rng) for _ in range(4)]
    together = reference_logps(pairs)
    alone = np.concatenate([reference_logps([p]) for p in pairs])
    np.testing.assert_allclose(together[:4], alone[::2], atol=2e-5)
    np.testing.assert_allclose(together[4:], alone[1::2], atol=2e-5)
    order = rng.permutation(4)
    shuffled = reference_logps([pairs[i] for i in order])
    np.testing.assert_allclose(shuffled[:4], together[:4][order], atol=2e-5)
    # A longer companion means more padding for the others.
    long = TokenizedSequence(rng.integers(0, 500, 90).astype(np.int32), 5)
    longer = [*pairs, EncodedPair(long, long)]
    np.testing.assert_allclose(reference_logps(longer)[:4], together[:4], atol=2e-5)


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=10)
def test_only_scored_tokens_count(seed: int) -> None:
    """Token 5's own log-probability, from the means with and without it."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 500, 20).astype(np.int32)
    sequences = {start: TokenizedSequence(tokens, start) for start in (5, 6)}
    means = {n: reference_logps([EncodedPair(s, s)])[0] for n, s in sequences.items()}
    logits = np.array(MODEL(mx.array(tokens)[None]))[0]
    logp_of_token_5 = means[5] * 15 - means[6] * 14
    expected = numpy_logps(logits, tokens.tolist()[:6], 5)
    np.testing.assert_allclose(logp_of_token_5, expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("segment", [1, 7, 32, 4096])
def test_the_size_of_a_segment_does_not_matter(
    segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [random_pair(np.random.default_rng(3))]
    expected = reference_logps(pairs)
    monkeypatch.setattr(two_level, "SEGMENT", segment)
    np.testing.assert_allclose(reference_logps(pairs), expected, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000, 49152, 50257])
def test_logsumexp_and_its_gradient(vocabulary: int) -> None:
    """Against float64; at 49152 mx.logsumexp itself is a hundred times further off on a CPU."""
    rng = np.random.default_rng(vocabulary)
    values = (3 * rng.normal(size=(40, vocabulary))).astype(np.float32)
    values[1] += 50.0
    if vocabulary > 2:
        values[2, ::2] = -np.inf
    if vocabulary > 1000:
        values[3, :512] = -np.inf  # whole segments of nothing
    wide = values.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    expected = np.log(np.exp(wide - top).sum(axis=-1)) + top[:, 0]
    function: Any = logsumexp  # mlx types the results of a custom function as object
    total, gradient = mx.value_and_grad(lambda x: function(x).sum())(mx.array(values))
    each = np.array(logsumexp(mx.array(values)))
    np.testing.assert_allclose(each, expected, rtol=3e-7, atol=3e-6)
    assert total.item() == pytest.approx(expected.sum(), rel=1e-6)
    np.testing.assert_allclose(np.array(gradient), np.exp(wide - expected[:, None]), atol=5e-6)


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    """A model in bfloat16 gives bfloat16 logits; log-sum-exp over them must not round again."""

    def model(tokens: mx.array) -> mx.array:
        mx.random.seed(1)
        return mx.random.normal((*tokens.shape, 2000)).astype(mx.bfloat16)

    tokens = mx.arange(12)[None]
    logp = average_logps(model, tokens, mx.array([1]), mx.array([12]))
    logits = np.array(model(tokens[:, :-1]).astype(mx.float32))[0]
    assert logp.dtype == mx.float32
    assert logp.item() == pytest.approx(numpy_logps(logits, list(range(12)), 1), abs=1e-5)
