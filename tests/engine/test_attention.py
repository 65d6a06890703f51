"""Attention in tiles against its definition in float64 and against MLX's own gradient."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.float64 import attention_in_float64
from helpers.graphs import ELEMENTWISE, PRODUCTS, count, primitives
from hypothesis import given
from hypothesis import strategies as st

from mlx_simpo.engine import attention as module
from mlx_simpo.engine.attention import CausalMask, attention, split_into_tiles
from mlx_simpo.engine.figures import CPU, GPU

SCALE = 0.3
# new positions, positions before them, query heads, key heads
SHAPES = [(1, 0, 1, 1), (1, 6, 4, 2), (7, 9, 6, 2), (64, 3, 4, 1), (50, 21, 2, 2)]


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


def visible_keys(kind: str | None, new: int, old: int) -> np.ndarray:
    """Which keys [T, S] each query sees."""
    window = {None: new + old, "causal": new + old, "window": 3}[kind]
    distance = np.arange(old, old + new)[:, None] - np.arange(old + new)
    return (distance < window) & ((distance >= 0) | (kind is None))


@pytest.mark.parametrize("saved_scores", [0, module.MAX_SAVED_SCORES])
@pytest.mark.parametrize("rows", [3, module.MIN_TILE_ROWS])
@pytest.mark.parametrize("kind", [None, "causal", "window"])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(
    shape: tuple[int, int, int, int],
    kind: str | None,
    rows: int,
    saved_scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one tile and in several, the last of which are larger than the others."""
    monkeypatch.setattr(module, "MAX_SAVED_SCORES", saved_scores)
    monkeypatch.setattr(module, "MIN_TILE_ROWS", rows)
    new, old = shape[:2]
    mask, inputs = make_mask(kind, new, old), random_inputs(shape)
    q64, k64, v64 = (np.array(a, np.float64) for a in inputs[:3])
    expected = attention_in_float64(q64, k64, v64, SCALE, visible_keys(kind, new, old))

    def run(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return our_attention(mask, q, k, v, tile_scores=1)

    np.testing.assert_allclose(run(*inputs[:3]), expected, atol=2e-6)

    ours, theirs = (gradients(f, inputs) for f in (run, partial(mlx_attention, mask)))
    for actual, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(actual, other, atol=2e-5 * np.abs(other).max() + 1e-6)


@pytest.mark.parametrize("kind", ["causal", "window"])
@pytest.mark.parametrize("level", [-1e5, 1e5])
def test_scores_far_from_zero(level: float, kind: str) -> None:
    """Of keys that are seen and, further up, of those that are not."""
    new, old = 7, 9
    inputs = random_inputs((new, old, 4, 2))
    # Numbers of which float32 holds products and sums exactly.
    queries, keys, values = ((4 * a).round() / 4 for a in inputs[:3])
    queries[..., 0], keys[..., 0] = 1.0, 4 * level
    keys[:, :, -1, 0] = 4 * level + 2e4  # only the last query sees it
    q64, k64, v64 = (np.array(a, np.float64) for a in (queries, keys, values))
    expected = attention_in_float64(q64, k64, v64, 0.25, visible_keys(kind, new, old))
    mask = make_mask(kind, new, old)
    run = partial(attention, scale=0.25, mask=mask)
    np.testing.assert_allclose(run(queries, keys, values), expected, atol=2e-6)
    exact = [queries, keys.at[..., 0].add(-4 * level), values, inputs[3]]
    for actual, other in zip(
        gradients(run, [queries, keys, values, inputs[3]]),
        gradients(partial(mx.fast.scaled_dot_product_attention, scale=0.25, mask=mask), exact),
        strict=True,
    ):
        # Queries' first entry is multiplied by keys that differ by the level.
        np.testing.assert_allclose(actual[..., 1:], other[..., 1:], atol=1e-5)


@pytest.mark.parametrize("dtypes", [*product((mx.float32, mx.bfloat16), repeat=3)])
def test_arrays_of_several_dtypes(dtypes: tuple[mx.Dtype, ...]) -> None:
    """Value and gradients have the dtypes of MLX's, and are computed in the widest."""
    *primals, d_out = random_inputs((7, 9, 4, 2))
    primals = [a.astype(dtype) for a, dtype in zip(primals, dtypes, strict=True)]
    (ours, our_vjps), (theirs, vjps) = (
        mx.vjp(partial(run, "causal"), primals, [d_out.astype(mx.result_type(*dtypes))])
        for run in (our_attention, mlx_attention)
    )
    assert [a.dtype for a in (*ours, *our_vjps)] == [a.dtype for a in (*theirs, *vjps)]
    all_dtypes = [ours[0].dtype, *dtypes]
    for one, two, dtype in zip([*ours, *our_vjps], [*theirs, *vjps], all_dtypes, strict=True):
        rounding = 1e-5 if dtype == mx.float32 else 2e-2
        assert mx.abs(one - two).max() <= rounding * mx.abs(two).max()


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
    st.integers(1, 3),
    st.integers(1, 64),
    st.booleans(),
    st.sampled_from([CPU.tile_scores, GPU.tile_scores]),
)
def test_tiles_cover_every_row_once_and_see_no_more_than_they_need(
    new: int, old: int, n: int, heads: int, causal: bool, tile_scores: int
) -> None:
    """They are as few as their size allows, and of one size but for a row."""
    tiles = split_into_tiles((n, heads, new, 8), old + new, tile_scores, causal=causal)
    edges = [0, *(tile.stop for tile in tiles)]
    assert [(tile.start, tile.stop) for tile in tiles] == list(pairwise(edges))
    assert edges[-1] == new
    most = max(module.MIN_TILE_ROWS, tile_scores // (n * heads * (old + new)))
    assert len(tiles) == math.ceil(new / most)
    for tile in tiles:
        assert tile.num_keys == old + (tile.stop if causal else new)
        assert tile.stop - tile.start in (new // len(tiles), math.ceil(new / len(tiles)))


def test_memory_grows_with_the_length_and_not_with_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_SAVED_SCORES", 0)

    def peak(length: int) -> int:
        inputs = random_inputs((length, 0, 4, 2), n=1)
        mx.eval(inputs)
        mx.clear_cache()
        mx.reset_peak_memory()
        gradients(partial(our_attention, "causal", tile_scores=1), inputs)
        return mx.get_peak_memory() - mx.get_active_memory()

    # A busy machine frees a tile's arrays later, and never sooner: the lesser of two runs. All
    # scores would be sixteen times as many.
    assert min(peak(2048) for _ in range(2)) < 6 * min(peak(512) for _ in range(2))


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
    """As in a model whose layers differ, and of other lengths."""
    mask = CausalMask()
    sizes = [(9, 4, 4, 2), (9, 4, 2, 2), (9, 3, 4, 2), (8, 5, 4, 2), (9, 4, 4, 2)]
    for shape, dtype in product(sizes, [mx.float32, mx.float16]):
        q, k, v = (a.astype(dtype) for a in random_inputs(shape)[:3])
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
