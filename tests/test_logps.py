"""Average log-probabilities against float64 NumPy, and what must not change them."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from mlx_simpo import logps
from mlx_simpo.data.batching import stack
from mlx_simpo.data.encode import EncodedPair, Scored
from mlx_simpo.kernels.built_in import built_in
from mlx_simpo.logps import average_logps, logsumexp, token_logps

MODEL = tiny_model()


def numpy_logps(logits: np.ndarray, tokens: list[int], start: int) -> float:
    """Mean log-softmax of the scored tokens, in float64."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    logp = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return float(np.mean([logp[t - 1, tokens[t]] for t in range(start, len(tokens))]))


def random_pair(rng: np.random.Generator, longest: int = 40) -> EncodedPair:
    prompt = rng.integers(0, 500, rng.integers(1, 12)).tolist()
    sides = [
        Scored(np.array(prompt + rng.integers(0, 500, n).tolist(), np.int32), len(prompt))
        for n in rng.integers(1, longest - len(prompt), 2)
    ]
    return EncodedPair(*sides)


def scored(pairs: list[EncodedPair]) -> np.ndarray:
    batch = stack(pairs)
    return np.array(average_logps(MODEL, batch.tokens, batch.start, batch.end))


@pytest.mark.parametrize("seed", range(4))
def test_equals_numpy_row_by_row(seed: int) -> None:
    """Each row alone, unpadded, through the model; softmax and mean in float64."""
    rng = np.random.default_rng(seed)
    pairs = [random_pair(rng) for _ in range(3)]
    rows = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    expected = [
        numpy_logps(np.array(MODEL(mx.array(r.tokens)[None]))[0], r.tokens.tolist(), r.start)
        for r in rows
    ]
    np.testing.assert_allclose(scored(pairs), expected, atol=2e-5)


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_batch_composition_order_and_padding_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [random_pair(rng) for _ in range(4)]
    together = scored(pairs)
    alone = np.concatenate([scored([p]) for p in pairs])
    np.testing.assert_allclose(together[:4], alone[::2], atol=2e-5)
    np.testing.assert_allclose(together[4:], alone[1::2], atol=2e-5)
    order = rng.permutation(4)
    shuffled = scored([pairs[i] for i in order])
    np.testing.assert_allclose(shuffled[:4], together[:4][order], atol=2e-5)
    # A longer companion means more padding for the others.
    long = EncodedPair(*[Scored(rng.integers(0, 500, 90).astype(np.int32), 5)] * 2)
    np.testing.assert_allclose(scored([*pairs, long])[:4], together[:4], atol=2e-5)


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=10)
def test_only_scored_tokens_count(seed: int) -> None:
    """Chosen so that each token's own log-probability is known: row by row differences."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 500, 20).astype(np.int32)
    means = {
        start: scored([EncodedPair(Scored(tokens, start), Scored(tokens, start))])[0]
        for start in (5, 6)
    }
    logits = np.array(MODEL(mx.array(tokens)[None]))[0]
    of_token_5 = means[5] * 15 - means[6] * 14
    np.testing.assert_allclose(
        of_token_5, numpy_logps(logits, tokens.tolist()[:6], 5), atol=5e-4, rtol=1e-4
    )


@pytest.mark.parametrize("block", [1, 7, 32, 4096])
def test_the_block_size_does_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [random_pair(np.random.default_rng(3))]
    expected = scored(pairs)
    monkeypatch.setattr(logps, "BLOCK", block)
    np.testing.assert_allclose(scored(pairs), expected, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000, 49152, 50257])
def test_logsumexp_and_its_gradient(vocabulary: int) -> None:
    """Against float64; at 49152 mx.logsumexp itself is a hundred times further off on a CPU."""
    rng = np.random.default_rng(vocabulary)
    values = (3 * rng.normal(size=(40, vocabulary))).astype(np.float32)
    values[1] += 50.0
    if vocabulary > 2:
        values[2, ::2] = -np.inf
    wide = values.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    expected = np.log(np.exp(wide - top).sum(axis=-1)) + top[:, 0]
    found, gradient = mx.value_and_grad(lambda x: logsumexp(x).sum())(mx.array(values))
    each = np.array(logsumexp(mx.array(values)))
    np.testing.assert_allclose(each, expected, rtol=3e-7, atol=3e-6)
    assert found.item() == pytest.approx(expected.sum(), rel=1e-6)
    np.testing.assert_allclose(np.array(gradient), np.exp(wide - expected[:, None]), atol=5e-6)


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000, 49152, 50257])
def test_token_logps_and_their_gradient(vocabulary: int) -> None:
    """What the shared engine makes of its logits: value and slope against float64."""
    logps = token_logps(partial(built_in, scale=1.0, softcap=0.0, gradient=True))
    rng = np.random.default_rng(vocabulary)
    values = (3 * rng.normal(size=(40, vocabulary))).astype(np.float32)
    values[1] += 1e4
    targets = rng.integers(0, vocabulary, 40)
    targets[0], targets[3] = 0, vocabulary - 1
    if vocabulary > 2:
        values[2, ::2], targets[2] = -np.inf, 1
    slopes = rng.normal(size=40).astype(np.float32)
    wide = values.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    expected = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    each = np.arange(40)
    one_hot = np.zeros_like(wide)
    one_hot[each, targets] = 1

    def weighted(logits: mx.array) -> mx.array:
        return (logps(logits, mx.array(targets)) * mx.array(slopes)).sum()

    found = np.array(logps(mx.array(values), mx.array(targets)))
    gradient = np.array(mx.grad(weighted)(mx.array(values)))
    np.testing.assert_allclose(found, expected[each, targets], rtol=3e-7, atol=3e-6)
    exact = slopes[:, None] * (one_hot - np.exp(expected))
    np.testing.assert_allclose(gradient, exact, atol=5e-6)


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    """A model in bfloat16 gives bfloat16 logits; log-sum-exp over them must not round again."""

    def model(tokens: mx.array) -> mx.array:
        mx.random.seed(1)
        return mx.random.normal((*tokens.shape, 2000)).astype(mx.bfloat16)

    tokens = mx.arange(12)[None]
    found = average_logps(model, tokens, mx.array([1]), mx.array([12]))
    logits = np.array(model(tokens[:, :-1]).astype(mx.float32))[0]
    assert found.dtype == mx.float32
    assert found.item() == pytest.approx(numpy_logps(logits, list(range(12)), 1), abs=1e-5)
