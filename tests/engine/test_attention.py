"""Attention in tiles against its definition in float64 and against MLX's own gradient."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.graphs import ELEMENTWISE, PRODUCTS, count, primitives
from hypothesis import given
from hypothesis import strategies as st

from mlx_simpo.engine import attention as module
from mlx_simpo.engine.attention import CausalMask, attention, split_into_tiles
from mlx_simpo.engine.figures import CPU, GPU

SCALE = 0.3
# new positions, positions before them, query heads, key heads
SHAPES = [(1, 0, 1, 1), (5, 0, 4, 4), (7, 9, 6, 2), (64, 3, 4, 1), (130, 70, 2, 2)]


def random_inputs(shape: tuple[int, int, int, int], n: int = 2) -> list[mx.array]:
    """Queries, keys, values, and the gradient of the output."""
    new, old, heads, kv_heads = shape
    sizes = ((heads, new, 8), (kv_heads, old + new, 8), (kv_heads, old + new, 6), (heads, new, 6))
    return [mx.random.normal((n, *size), key=mx.random.key(i)) for i, size in enumerate(sizes)]


def make_mask(kind: str | None, new: int, old: int) -> mx.array | str | None:
    """A window of three positions as booleans; the other kinds as they are."""
    if kind != "window":
        return kind
    position, key = mx.arange(old, old + new)[:, None], mx.arange(old + new)
    return (key <= position) & (key > position - 3)


def attention_in_float64(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, visible: np.ndarray
) -> np.ndarray:
    """softmax(scale · QKᵀ) V, head by head."""
    out = np.zeros((*queries.shape[:3], values.shape[-1]))
    for n, head in np.ndindex(queries.shape[:2]):
        kv_head = head * keys.shape[1] // queries.shape[1]
        scores = SCALE * queries[n, head] @ keys[n, kv_head].T
        weights = np.where(visible, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
        out[n, head] = weights / weights.sum(axis=-1, keepdims=True) @ values[n, kv_head]
    return out


def mlx_attention(
    mask: mx.array | str | None, queries: mx.array, keys: mx.array, values: mx.array
) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=SCALE, mask=mask)


def our_attention(
    mask: mx.array | str | None,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    tile_scores: int = CPU.tile_scores,
) -> mx.array:
    return attention(queries, keys, values, SCALE, mask, tile_scores)


def gradients(run: Callable[..., mx.array], inputs: list[mx.array]) -> list[np.ndarray]:
    """Those of queries, keys and values."""
    *primals, d_out = inputs

    def total(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return (run(queries, keys, values) * d_out).sum()

    return [np.array(g) for g in mx.grad(total, argnums=(0, 1, 2))(*primals)]


@pytest.mark.parametrize("saved_scores", [0, module.MAX_SAVED_SCORES])
@pytest.mark.parametrize("tile_scores", [1, CPU.tile_scores])
@pytest.mark.parametrize("kind", [None, "causal", "window"])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(
    shape: tuple[int, int, int, int],
    kind: str | None,
    tile_scores: int,
    saved_scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_SAVED_SCORES", saved_scores)
    monkeypatch.setattr(module, "MIN_TILE_ROWS", 16)
    new, old = shape[:2]
    mask, inputs = make_mask(kind, new, old), random_inputs(shape)
    visible = np.tri(new, old + new, old, dtype=bool) if kind == "causal" else np.ones((), bool)
    visible = np.array(mask) if isinstance(mask, mx.array) else visible

    queries, keys, values = (np.array(a, np.float64) for a in inputs[:3])
    expected = attention_in_float64(queries, keys, values, visible)

    def run(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return our_attention(mask, q, k, v, tile_scores)

    np.testing.assert_allclose(run(*inputs[:3]), expected, atol=2e-6)

    ours, theirs = (gradients(f, inputs) for f in (run, partial(mlx_attention, mask)))
    for actual, wide in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(actual, wide, atol=2e-5 * np.abs(wide).max() + 1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("rows", [2, module.MIN_TILE_ROWS])
def test_half_precision_is_as_near_to_float32_as_mlx_is(
    rows: int, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum over 75 tiles in half precision would be rounded 75 times."""
    monkeypatch.setattr(module, "MIN_TILE_ROWS", rows)
    inputs, ours = random_inputs((150, 20, 4, 2)), partial(our_attention, tile_scores=1)
    exact = gradients(partial(ours, "causal"), inputs)

    def errors(run: Callable[..., mx.array]) -> np.ndarray:
        def rounded(*arrays: mx.array) -> mx.array:
            return run("causal", *(array.astype(dtype) for array in arrays))

        pairs = zip(gradients(rounded, inputs), exact, strict=True)
        return np.array([np.std(actual - expected) for actual, expected in pairs])

    assert (errors(ours) < 1.1 * errors(mlx_attention)).all()


@given(
    st.integers(1, 3000),
    st.integers(0, 3000),
    st.integers(1, 64),
    st.sampled_from([CPU.tile_scores, GPU.tile_scores]),
)
def test_tiles_cover_every_row_once_and_see_no_more_than_they_need(
    new: int, old: int, heads: int, tile_scores: int
) -> None:
    tiles = split_into_tiles((1, heads, new, 8), old + new, tile_scores, causal=True)
    edges = [0, *(tile.stop for tile in tiles)]
    assert [(tile.start, tile.stop) for tile in tiles] == list(pairwise(edges))
    assert edges[-1] == new
    for tile in tiles:
        assert tile.num_keys == old + tile.stop
        assert (
            0
            < tile.stop - tile.start
            <= max(module.MIN_TILE_ROWS, tile_scores / heads / (old + new))
        )


def test_memory_grows_with_the_length_and_not_with_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_SAVED_SCORES", 0)

    def peak(length: int) -> int:
        inputs = random_inputs((length, 0, 4, 2), n=1)
        mx.eval(inputs)
        mx.clear_cache()
        mx.reset_peak_memory()
        gradients(partial(our_attention, "causal"), inputs)
        return mx.get_peak_memory() - mx.get_active_memory()

    # A busy machine frees a tile's arrays later, and never sooner: the least of some runs.
    assert min(peak(4096) for _ in range(4)) < 2.2 * min(peak(2048) for _ in range(4))


def test_one_tile_takes_six_products_and_three_steps_of_the_softmax() -> None:
    """Scale and mask are within the products, and there is nothing to add up."""
    *primals, d_out = random_inputs((40, 20, 4, 2))
    mx.eval(primals, d_out)
    out, gradients = mx.vjp(partial(our_attention, None), primals, [d_out])
    names = primitives(*out, *gradients)
    assert count(names, *PRODUCTS) == 6
    assert (count(names, *ELEMENTWISE), names["Sum"], names["Softmax"]) == (3, 1, 1)
    sums = ("Full", "Scatter", "SliceUpdate", "SliceUpdate Sum", "Concatenate", "Slice")
    assert count(names, *sums) == 0


@pytest.mark.parametrize("tile_scores", [1, CPU.tile_scores])
def test_layers_of_a_pass_share_the_arrays_of_its_mask(
    tile_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (130, 20, 4, 2)
    queries, keys, values, _ = random_inputs(shape)
    mx.eval(queries, keys, values)

    def layers(mask: mx.array | str | None) -> list[mx.array]:
        return [attention(queries, keys, values, SCALE, mask, tile_scores) for _ in range(3)]

    apart, shared = layers("causal"), layers(CausalMask())
    mask = CausalMask()
    layers(mask)
    tiles = len(split_into_tiles(queries.shape, 150, tile_scores, causal=True))
    assert len(mask.biases) == tiles
    assert [primitives(*outs)["Select"] for outs in (apart, shared)] == [3 * tiles, tiles]
    for one, two in zip(apart, shared, strict=True):
        np.testing.assert_array_equal(one, two)

    monkeypatch.setattr(module, "MAX_SAVED_SCORES", 0)  # long sequences: their masks would add up
    mask = CausalMask()
    layers(mask)
    assert mask.biases == {}


def test_a_mask_serves_layers_of_other_heads_and_dtypes() -> None:
    """As in a model whose layers differ."""
    mask = CausalMask()
    for heads, dtype in [(4, mx.float32), (2, mx.float32), (4, mx.float16), (4, mx.float32)]:
        q, k, v = (a.astype(dtype) for a in random_inputs((9, 4, heads, 2))[:3])
        expected = our_attention("causal", q, k, v)
        np.testing.assert_array_equal(our_attention(mask, q, k, v), expected)


@pytest.mark.parametrize(("n", "times"), [(2, 1), (3, 2)])
def test_the_bound_on_saved_probabilities_counts_those_of_the_whole_batch(
    n: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of all heads; beyond it, they are computed a second time."""
    monkeypatch.setattr(module, "MAX_SAVED_SCORES", 2 * 4 * 5 * 7)
    original, calls = module._probabilities, 0

    def counting(*args: Any) -> mx.array:
        nonlocal calls
        calls += 1
        return original(*args)

    monkeypatch.setattr(module, "_probabilities", counting)
    gradients(partial(our_attention, None), random_inputs((5, 2, 4, 2), n))
    assert calls == times
