"""MLX's operations against float64, over the matrix that the kernel is held to."""

import mlx.core as mx
import pytest
from helpers.logit_rows import DTYPES, SHAPES, assert_right, case, hard_rows

from mlx_simpo.kernels.built_in import built_in


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 1 / 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rows"), SHAPES)
def test_matrix(size: int, rows: int, dtype: mx.Dtype, scale: float, softcap: float) -> None:
    given = case(size, rows, dtype, scale, softcap)
    found = built_in(*given[:2], scale=scale, softcap=softcap, gradient=True)
    assert_right(found, given)
    without = built_in(*given[:2], scale=scale, softcap=softcap, gradient=False)
    assert without[1] is None
    assert mx.array_equal(without[0], found[0], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 33, 1027])
def test_hard_rows(size: int, dtype: mx.Dtype) -> None:
    given = hard_rows(size, dtype)
    assert_right(built_in(*given[:2], scale=1.0, softcap=0.0, gradient=True), given)
