"""Hidden states → log-probabilities, a chunk at a time: values and gradients against float64 or
plain operations, for every kind of head, and the matrix products that they cost."""

import io
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import with_lora
from helpers.tiny import tiny_model
from mlx.utils import tree_flatten

from mlx_simpo.engine.head import Head, resolve_head
from mlx_simpo.engine.token_logps import (
    MAX_CHUNK_LOGITS,
    chunk_logits_beside_trunk,
    chunk_rows,
    differentiable,
    token_logps,
)
from mlx_simpo.kernels.built_in import mlx_response_logps
from mlx_simpo.kernels.choice import BUILT_IN

PLAIN_HEAD = Head(scale=1.0, softcap=0.0, is_projection=True)


class Trunk(nn.Module):
    """What `resolve_head` looks for beside a head; it is never run."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(4, width)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.embed_tokens(tokens)


class HeadedModel(nn.Module):
    """A head and nothing else, in the shape of an mlx-lm model."""

    def __init__(self, head: nn.Module, width: int) -> None:
        super().__init__()
        self.lm_head = head
        self.model = Trunk(width)
        self.layers: list[nn.Module] = []
        self.freeze()

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.lm_head(self.model(tokens))


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000, 49152, 50257])
def test_log_probabilities_and_their_gradient(vocabulary: int) -> None:
    """What the engine makes of its logits, against float64."""
    logps = differentiable(partial(mlx_response_logps, scale=1.0, softcap=0.0, gradient=True))
    rng = np.random.default_rng(vocabulary)
    values = (3 * rng.normal(size=(40, vocabulary))).astype(np.float32)
    values[1] += 1e4
    targets = rng.integers(0, vocabulary, 40)
    targets[0], targets[3] = 0, vocabulary - 1
    if vocabulary > 2:
        values[2, ::2], targets[2] = -np.inf, 1
    cotangents = rng.normal(size=40).astype(np.float32)
    wide = values.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    expected = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    each = np.arange(40)
    one_hot = np.zeros_like(wide)
    one_hot[each, targets] = 1

    def weighted(logits: mx.array) -> mx.array:
        return (logps(logits, mx.array(targets)) * mx.array(cotangents)).sum()

    actual = np.array(logps(mx.array(values), mx.array(targets)))
    gradient = np.array(mx.grad(weighted)(mx.array(values)))
    np.testing.assert_allclose(actual, expected[each, targets], rtol=3e-7, atol=3e-6)
    exact = cotangents[:, None] * (one_hot - np.exp(expected))
    np.testing.assert_allclose(gradient, exact, atol=5e-6)


def plain_logps(model: HeadedModel, hidden: mx.array, targets: mx.array) -> mx.array:
    """The definition, with all logits at once."""
    logits = model.lm_head(hidden).astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
    return picked - mx.logsumexp(logits, axis=-1)


def assert_equals_plain_logps(
    model: HeadedModel, targets: mx.array, chunk_logits: int = MAX_CHUNK_LOGITS
) -> None:
    """Values and gradient of hidden states against the definition; and that evaluation, which asks
    for no gradient, gives the same values."""
    width = model.model.embed_tokens.weight.shape[1]
    hidden = mx.random.normal((targets.size, width), key=mx.random.key(1))
    weights = mx.random.normal((targets.size,), key=mx.random.key(2))
    head = resolve_head(model)

    def chunked(hidden: mx.array, training: bool = True) -> mx.array:
        return token_logps(
            model, head, hidden, targets, training=training, chunk_logits=chunk_logits
        )

    def plain(hidden: mx.array) -> mx.array:
        return plain_logps(model, hidden, targets)

    np.testing.assert_allclose(chunked(hidden), plain(hidden), atol=1e-5)
    actual, expected = (
        mx.grad(lambda hidden, logps=logps: (logps(hidden) * weights).sum())(hidden)
        for logps in (chunked, plain)
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_array_equal(chunked(hidden, training=False), chunked(hidden))


@pytest.mark.parametrize("width", [8, 31, 896])
@pytest.mark.parametrize("count", [1, 7, 63, 64, 65])
def test_any_number_of_hidden_states(count: int, width: int) -> None:
    model = HeadedModel(nn.Linear(width, 1027, bias=False), width)
    targets = mx.random.randint(0, 1027, (count,), key=mx.random.key(3)).astype(mx.int32)
    assert_equals_plain_logps(model, targets, chunk_logits=1)  # the least: 64 rows


AFFINE = [("affine", bits, group) for bits in (4, 8) for group in (32, 64, 128)]


@pytest.mark.parametrize(
    ("mode", "bits", "group"), [*AFFINE, ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_quantized_heads(mode: str, bits: int, group: int) -> None:
    head = nn.Linear(256, 1024, bias=False).to_quantized(group, bits, mode)
    assert_equals_plain_logps(HeadedModel(head, 256), mx.arange(0, 1024, 11, dtype=mx.int32))


def test_a_head_with_a_bias() -> None:
    assert_equals_plain_logps(HeadedModel(nn.Linear(64, 1024), 64), mx.arange(30, dtype=mx.int32))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_in_half_precision_the_targets_logit_comes_off_before_rounding(dtype: mx.Dtype) -> None:
    """Against the same weights and hidden states in float32: several times nearer than what is left
    of logits that were rounded first."""
    mx.random.seed(0)  # of weights: the ratio below is 0.07 to 0.32, depending on them
    wide = nn.Linear(896, 5000, bias=False)
    narrow = nn.Linear(896, 5000, bias=False)
    narrow.weight = (12 * wide.weight).astype(dtype)
    wide.weight = narrow.weight.astype(mx.float32)
    noise = 0.5 * mx.random.normal((40, 896), key=mx.random.key(1))
    # Logits of 12 at the target, ±3 elsewhere.
    hidden = (0.25 * wide.weight[:40] + noise).astype(dtype)
    targets = mx.arange(40, dtype=mx.int32)
    exact = HeadedModel(wide, 896)
    expected = plain_logps(exact, hidden.astype(mx.float32), targets)
    model = HeadedModel(narrow, 896)
    actual = token_logps(model, PLAIN_HEAD, hidden, targets, training=False)
    rounded_first = plain_logps(model, hidden, targets)
    assert float(mx.std(actual - expected)) < 0.25 * float(mx.std(rounded_first - expected))


def matrix_products(output: Any) -> int:
    """The number of matrix products that ``output`` waits for."""
    graph = io.StringIO()
    mx.export_to_dot(graph, output)
    return len(re.findall(r'label ="(?:Quantized)?Matmul"|label ="AddMM"', graph.getvalue()))


def test_matrix_products_of_the_head() -> None:
    """One to evaluate, two to train, and three beside the one of the recomputation for a head that
    trains (of which the graph to the hidden states alone holds three)."""
    model = with_lora(tiny_model("llama", tie_word_embeddings=False))
    hidden, targets = mx.random.normal((5, 32)), mx.arange(5)
    head = resolve_head(model)
    mx.eval(hidden, targets)

    def gradient() -> mx.array:
        def total(hidden: mx.array) -> mx.array:
            return token_logps(model, head, hidden, targets, training=True).sum()

        return mx.grad(total)(hidden)

    assert matrix_products(token_logps(model, head, hidden, targets, training=False)) == 1
    assert matrix_products(gradient()) == 2
    model.lm_head.unfreeze()
    assert matrix_products(gradient()) == 3


def test_chunks_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty-four chunks need the memory of a few, because they wait for each other.

    One chunk alone needs two arrays of logits. MLX runs ahead and allocates what later operations
    return before the earlier ones have run: six or seven arrays, and one more or fewer with a few
    operations per chunk (docs/kernel.md), so that a tighter bound would not hold.
    """
    model = HeadedModel(nn.Linear(16, 10_000, bias=False), 16)
    hidden = mx.random.normal((64 * 64, 16))
    targets = mx.arange(len(hidden), dtype=mx.int32)
    mx.eval(model.lm_head.weight, hidden, targets)

    def logits_in_memory() -> float:
        """The peak, in arrays of one chunk's logits."""
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()

        def total(hidden: mx.array) -> mx.array:
            return token_logps(
                model, PLAIN_HEAD, hidden, targets, training=True, chunk_logits=64 * 10_000
            ).sum()

        mx.eval(mx.value_and_grad(total)(hidden))
        return (mx.get_peak_memory() - before) / (64 * 10_000 * 4)

    assert logits_in_memory() < 10
    monkeypatch.setattr(mx, "depends", lambda inputs, dependencies: inputs)
    assert logits_in_memory() > 20


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("count", "chunk_logits", "most"),
    [
        (1, 12_800, 128),
        (200, 12_800, 128),
        (257, 12_800, 128),
        (2100, MAX_CHUNK_LOGITS, 1024),  # a launch of the kernel takes no more rows
    ],
)
def test_no_chunk_has_more_logits_than_the_bound(
    count: int, chunk_logits: int, most: int, training: bool, trains: bool
) -> None:
    """As what computes log-probabilities sees them; together they are all hidden states, once."""
    model = HeadedModel(nn.Linear(8, 100, bias=False), 8)
    if trains:
        model.lm_head.unfreeze()
    shapes = []

    def recording(raw_logits: mx.array, targets: mx.array, **settings: Any) -> Any:
        shapes.append(raw_logits.shape)
        return mlx_response_logps(raw_logits, targets, **settings)

    token_logps(
        model,
        PLAIN_HEAD,
        mx.random.normal((count, 8)),
        mx.zeros(count, mx.int32),
        training=training,
        implementation=BUILT_IN._replace(response_logps=recording),
        chunk_logits=chunk_logits,
    )
    rows = [shape[0] for shape in shapes]
    assert sum(rows) == count
    assert max(rows) <= most
    assert len(rows) == -(-count // most)
    assert max(rows) - min(rows) < len(rows)  # no chunk is thin beside another


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 5000])
@pytest.mark.parametrize("chunk_logits", [0, 1, 100_000, MAX_CHUNK_LOGITS, 2**40])
def test_rows_of_a_chunk(count: int, chunk_logits: int) -> None:
    """Few enough for the bound and for one launch of the kernel; 64 are too few to divide."""
    rows = chunk_rows(count, 1000, chunk_logits)
    assert 1 <= rows <= min(count, 1024, max(64, chunk_logits // 1000))
    assert -(-count // rows) == -(-count // min(1024, max(64, chunk_logits // 1000)))


def test_the_chunk_grows_with_what_the_trunk_holds() -> None:
    """More positions, or more layers that save their activations; a layer that is recomputed counts
    as the four of which it takes the memory."""
    one = chunk_logits_beside_trunk(100, 64, 1)
    assert one == chunk_logits_beside_trunk(100, 64, 4) == 4 * 100 * 64
    assert chunk_logits_beside_trunk(200, 64, 1) == 2 * one
    assert chunk_logits_beside_trunk(100, 64, 32) == 8 * one


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_gradients_are_in_the_dtype_of_what_they_are_of(dtype: mx.Dtype, trains: bool) -> None:
    """In float32 they would take twice the memory, all the way down the trunk."""
    wide = HeadedModel(nn.Linear(16, 300, bias=False), 16)
    wide.set_dtype(dtype)
    narrow = HeadedModel(nn.Linear(16, 300, bias=False), 16)
    narrow.update(wide.parameters())
    wide.set_dtype(mx.float32)
    if trains:
        wide.lm_head.unfreeze()
        narrow.lm_head.unfreeze()
    hidden = (4 * mx.random.normal((70, 16), key=mx.random.key(1))).astype(dtype)
    targets, cotangents = mx.arange(70), mx.random.normal((70,), key=mx.random.key(2))

    def gradients(model: HeadedModel, hidden: mx.array, logps: Callable) -> Any:
        def total(weights: dict, hidden: mx.array) -> mx.array:
            model.update(weights)
            return (logps(model, hidden) * cotangents).sum()

        return mx.grad(total, argnums=(0, 1))(model.trainable_parameters(), hidden)

    actual = gradients(
        narrow, hidden,
        lambda model, x: token_logps(
            model, PLAIN_HEAD, x, targets, training=True, chunk_logits=1
        ),
    )  # fmt: skip
    expected = gradients(
        wide, hidden.astype(mx.float32), lambda model, x: plain_logps(model, x, targets)
    )
    both = [dict(tree_flatten(g)) for g in (actual, expected)]
    assert len(both[0]) == len(both[1]) == 1 + trains
    for name, gradient in both[0].items():
        assert gradient.dtype == dtype
        exact = both[1][name]
        assert mx.abs(gradient - exact).max() < 0.02 * mx.abs(exact).max()


def test_training_is_as_exact_as_evaluation_in_half_precision() -> None:
    """Both shift the logits within the product, before they are rounded."""
    width, vocabulary, count = 64, 300, 80
    model = HeadedModel(nn.Linear(width, vocabulary, bias=False), width)
    keys = mx.random.split(mx.random.key(0), 3)
    weight = mx.random.normal((vocabulary, width), key=keys[0]).astype(mx.bfloat16)
    model.lm_head.weight = weight
    hidden = (3 * mx.random.normal((count, width), key=keys[1])).astype(mx.bfloat16)
    targets = mx.argmax(hidden @ weight.T, axis=1).astype(mx.int32)
    wide = hidden.astype(mx.float32) @ weight.T.astype(mx.float32)
    exact = np.array(
        mx.take_along_axis(wide, targets[:, None], 1)[:, 0] - mx.logsumexp(wide, axis=1)
    )
    for training in (True, False):
        logps = token_logps(model, PLAIN_HEAD, hidden, targets, training=training)
        unshifted = wide.astype(mx.bfloat16).astype(mx.float32)
        rounded = mx.take_along_axis(unshifted, targets[:, None], 1)[:, 0]
        rounded = rounded - mx.logsumexp(unshifted, axis=1)
        off, off_unshifted = (np.std(np.array(a) - exact) for a in (logps, rounded))
        assert off < off_unshifted / 2
