"""Reductions in two levels, against float64 at every kind of size."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_simpo.kernels.two_level import SEGMENT, Reduction, reduce_in_two_levels

# Less than a segment, whole segments, a common divisor (Qwen's), odd, GPT-2's and SmolLM2's.
SIZES = [1, 31, 255, 256, 257, 1000, 151_936, 50_257, 49_152]
LAYOUTS = ["contiguous", "strided"]


def in_float64(reduction: Reduction, values: np.ndarray) -> np.ndarray:
    if reduction is mx.sum:
        return values.sum(axis=-1)
    return np.logaddexp.reduce(values, axis=-1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", [mx.sum, mx.logsumexp])
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(size: int, reduction: Reduction, layout) -> None:
    values = np.random.default_rng(size).random((2, 3, size)).astype(np.float32)
    actual = reduce_in_two_levels(reduction, mx.array(values), layout)
    assert actual.shape == (2, 3)
    np.testing.assert_allclose(actual, in_float64(reduction, values.astype(np.float64)), rtol=3e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_logsumexp_of_nothing_is_minus_infinity(size: int, layout) -> None:
    values = mx.full((2, size), -mx.inf)
    assert reduce_in_two_levels(mx.logsumexp, values, layout).tolist() == [-np.inf, -np.inf]
    values[0, 0] = 2.0
    assert reduce_in_two_levels(mx.logsumexp, values, layout).tolist() == [2.0, -np.inf]


@pytest.mark.parametrize("size", SIZES)
def test_no_sum_is_longer_than_it_needs_to_be(size: int) -> None:
    """The reason for two levels: what is reduced at once stays short."""
    lengths = []

    def recording(values: mx.array, /, axis: int, *, keepdims: bool = False) -> mx.array:
        lengths.append(values.shape[axis])
        return mx.sum(values, axis=axis, keepdims=keepdims)

    reduce_in_two_levels(recording, mx.zeros((1, size)), "contiguous")
    assert max(lengths[:-1]) <= SEGMENT
    assert lengths[-1] <= size // (SEGMENT // 8) + 1
