"""Average log-probabilities against float64 NumPy, and what must not change them."""

from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.engine import reference
from mlx_simpo.engine import token_logps as logps
from mlx_simpo.engine.collate_stacked import collate_stacked
from mlx_simpo.engine.head import Head, resolve_head
from mlx_simpo.engine.reference import average_logps, logsumexp
from mlx_simpo.engine.token_logps import differentiable, forward_logps, token_logps
from mlx_simpo.kernels.built_in import mlx_response_logps

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
        TokenizedSequence(
            np.array(prompt + rng.integers(0, 500, n).tolist(), np.int32), len(prompt)
        )
        for n in rng.integers(1, longest - len(prompt), 2)
    ]
    return EncodedPair(*sides)


def scored(pairs: list[EncodedPair]) -> np.ndarray:
    batch = collate_stacked(pairs)
    return np.array(average_logps(MODEL, batch.tokens, batch.score_start, batch.score_end))


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
    long = EncodedPair(*[TokenizedSequence(rng.integers(0, 500, 90).astype(np.int32), 5)] * 2)
    np.testing.assert_allclose(scored([*pairs, long])[:4], together[:4], atol=2e-5)


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=10)
def test_only_scored_tokens_count(seed: int) -> None:
    """Chosen so that each token's own log-probability is known: row by row differences."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 500, 20).astype(np.int32)
    means = {
        start: scored(
            [EncodedPair(TokenizedSequence(tokens, start), TokenizedSequence(tokens, start))]
        )[0]
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
    monkeypatch.setattr(reference, "BLOCK", block)
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
    logps = differentiable(partial(mlx_response_logps, scale=1.0, softcap=0.0, gradient=True))
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


# --- rows of the trunk → log-probabilities, a chunk at a time ----------------------------------


class Headed(nn.Module):
    """A head and nothing else, in the shape of an mlx-lm model."""

    def __init__(self, head: nn.Module, width: int) -> None:
        super().__init__()
        self.lm_head = head
        self.model = SimpleNamespace(embed_tokens=nn.Embedding(4, width))
        self.layers: list[nn.Module] = []
        self.freeze()

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.lm_head(self.model(tokens))


def weighted_logps(model: Headed, targets: mx.array, *, chunked: bool) -> tuple[mx.array, mx.array]:
    """The log-probabilities of some rows and the gradient of a sum of them."""
    width = model.model.embed_tokens.weight.shape[1]
    rows = mx.random.normal((targets.size, width), key=mx.random.key(1))
    rows = rows.astype(model.model.embed_tokens.weight.dtype)
    weights = mx.random.normal((targets.size,), key=mx.random.key(2))

    def logps_of(rows: mx.array) -> mx.array:
        if chunked:
            return token_logps(model, rows, targets, training=True)
        logits = model.lm_head(rows).astype(mx.float32)
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
        return picked - mx.logsumexp(logits, axis=-1)

    gradient = mx.grad(lambda rows: (logps_of(rows) * weights).sum())(rows)
    if chunked:
        forward = token_logps(model, rows, targets, training=False)
        np.testing.assert_array_equal(forward, logps_of(rows))
    return logps_of(rows), gradient


@pytest.mark.parametrize("width", [8, 31, 896])
@pytest.mark.parametrize("count", [1, 7, 63, 64, 65])
def test_rows_and_chunks(count: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 1)  # 64 rows
    model = Headed(nn.Linear(width, 1027, bias=False), width)
    targets = mx.random.randint(0, 1027, (count,), key=mx.random.key(3)).astype(mx.int32)
    found, expected = (weighted_logps(model, targets, chunked=c) for c in (True, False))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


AFFINE = [("affine", bits, group) for bits in (4, 8) for group in (32, 64, 128)]


@pytest.mark.parametrize(
    ("mode", "bits", "group"), [*AFFINE, ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_quantized_heads(mode: str, bits: int, group: int) -> None:
    head = nn.Linear(256, 1024, bias=False).to_quantized(group, bits, mode)
    targets = mx.arange(0, 1024, 11, dtype=mx.int32)
    model = Headed(head, 256)
    found, expected = (weighted_logps(model, targets, chunked=c) for c in (True, False))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_in_half_precision_the_targets_logit_comes_off_before_rounding(dtype: mx.Dtype) -> None:
    """Against the same weights and rows in float32: several times nearer than rounded logits."""
    wide = nn.Linear(896, 5000, bias=False)
    narrow = nn.Linear(896, 5000, bias=False)
    narrow.weight = (12 * wide.weight).astype(dtype)
    wide.weight = narrow.weight.astype(mx.float32)
    model, exact = Headed(narrow, 896), Headed(wide, 896)
    model.model.embed_tokens.set_dtype(dtype)
    noise = 0.5 * mx.random.normal((40, 896), key=mx.random.key(1))
    rows = (0.25 * wide.weight[:40] + noise).astype(
        dtype
    )  # logits of 12 at the target, ±3 elsewhere
    targets = mx.arange(40, dtype=mx.int32)
    expected = token_logps(exact, rows.astype(mx.float32), targets, training=False)

    def error(head: Head) -> float:
        response_logps = partial(mlx_response_logps, scale=1.0, softcap=0.0, gradient=False)
        return float(mx.std(forward_logps(head, response_logps)(rows, targets) - expected))

    assert resolve_head(model).weight is not None
    assert error(resolve_head(model)) < 0.25 * error(Head(narrow, 1.0, 0.0))
