"""Attention in blocks against its definition in float64 and against MLX's own gradient."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_simpo.engine import attention as module
from mlx_simpo.engine.attention import attention, blocks_of

SCALE = 0.3
# new positions, positions before them, heads, heads of the keys
SHAPES = [(1, 0, 1, 1), (5, 0, 4, 4), (7, 9, 6, 2), (64, 3, 4, 1), (130, 70, 2, 2)]


def arrays(shape: tuple[int, int, int, int], n: int = 2) -> list[mx.array]:
    """Queries, keys, values, and the slope of what is made of them."""
    new, old, heads, groups = shape
    sizes = ((heads, new, 8), (groups, old + new, 8), (groups, old + new, 6), (heads, new, 6))
    return [
        mx.random.normal((n, *size), key=mx.random.key(number)) for number, size in enumerate(sizes)
    ]


def mask_of(kind: str | None, new: int, old: int) -> mx.array | str | None:
    """Of a window of three positions; the others as they are."""
    if kind != "window":
        return kind
    place, key = mx.arange(old, old + new)[:, None], mx.arange(old + new)
    return (key <= place) & (key > place - 3)


def in_float64(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    """softmax(scale · QKᵀ) V, a head at a time."""
    out = np.zeros((*queries.shape[:3], values.shape[-1]))
    for n, head in np.ndindex(queries.shape[:2]):
        group = head * keys.shape[1] // queries.shape[1]
        scores = SCALE * queries[n, head] @ keys[n, group].T
        weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
        out[n, head] = weights / weights.sum(axis=-1, keepdims=True) @ values[n, group]
    return out


def original(
    mask: mx.array | str | None, queries: mx.array, keys: mx.array, values: mx.array
) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=SCALE, mask=mask)


def slopes(run: Callable[..., mx.array], given: list[mx.array]) -> list[np.ndarray]:
    def total(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return (run(queries, keys, values) * given[3]).sum()

    return [np.array(g) for g in mx.grad(total, argnums=(0, 1, 2))(*given[:3])]


@pytest.mark.parametrize("kept", [0, module.KEPT])
@pytest.mark.parametrize("block", [1, module.BLOCK_CPU])
@pytest.mark.parametrize("kind", [None, "causal", "window"])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(
    shape: tuple[int, int, int, int],
    kind: str | None,
    block: int,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for constant, value in {"BLOCK_CPU": block, "BLOCK_GPU": block, "KEPT": kept}.items():
        monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr(module, "ROWS", 16)
    new, old = shape[:2]
    mask, given = mask_of(kind, new, old), arrays(shape)
    seen = np.tri(new, old + new, old, dtype=bool) if kind == "causal" else np.ones((), bool)
    seen = np.array(mask) if isinstance(mask, mx.array) else seen

    expected = in_float64(*(np.array(a, np.float64) for a in given[:3]), seen)
    np.testing.assert_allclose(attention(*given[:3], SCALE, mask), expected, atol=2e-6)

    found = slopes(lambda q, k, v: attention(q, k, v, SCALE, mask), given)
    for ours, theirs in zip(found, slopes(partial(original, mask), given), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max() + 1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_as_near_to_float32_as_mlx_is(
    dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_CPU", 1)
    given = arrays((150, 20, 4, 2))
    exact = slopes(lambda q, k, v: attention(q, k, v, SCALE, "causal"), given)

    def errors(run: Callable[..., mx.array]) -> np.ndarray:
        def through(*arrays: mx.array) -> mx.array:
            return run(*(array.astype(dtype) for array in arrays))

        return np.array([np.std(f - e) for f, e in zip(slopes(through, given), exact, strict=True)])

    ours = errors(lambda q, k, v: attention(q, k, v, SCALE, "causal"))
    assert (ours < 1.1 * errors(partial(original, "causal"))).all()


@given(st.integers(1, 3000), st.integers(0, 3000), st.integers(1, 64))
def test_blocks_cover_every_row_once_and_see_no_more_than_they_need(
    new: int, old: int, heads: int
) -> None:
    blocks = blocks_of((1, heads, new, 8), old + new, causal=True)
    edges = [0, *(block.stop for block in blocks)]
    assert [(block.start, block.stop) for block in blocks] == list(pairwise(edges))
    assert edges[-1] == new
    for block in blocks:
        assert block.keys == old + block.stop
        rows = block.stop - block.start
        assert 0 < rows <= max(module.ROWS, module.BLOCK_CPU / heads / (old + new))


def test_memory_grows_with_the_length_and_not_with_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "KEPT", 0)

    def peak(length: int) -> int:
        given = arrays((length, 0, 4, 2), n=1)
        mx.eval(given)
        mx.clear_cache()
        mx.reset_peak_memory()
        slopes(lambda q, k, v: attention(q, k, v, SCALE, "causal"), given)
        return mx.get_peak_memory() - mx.get_active_memory()

    assert peak(4096) < 2.2 * peak(2048)
