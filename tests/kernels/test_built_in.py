"""MLX operations against float64, with the same rows of logits as the kernel."""

import mlx.core as mx
import pytest
from helpers.logit_rows import DTYPES, SETTINGS, SHAPES, assert_correct, case, hard_rows

from mlx_simpo.kernels.built_in import mlx_response_logps


@pytest.mark.parametrize(("scale", "softcap"), SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rows"), SHAPES)
def test_values_and_gradients(
    size: int, rows: int, dtype: mx.Dtype, scale: float, softcap: float
) -> None:
    inputs = case(size, rows, dtype, scale, softcap)
    settings = {"scale": scale, "softcap": softcap}
    outputs = mlx_response_logps(inputs.raw_logits, inputs.targets, **settings, gradient=True)
    assert outputs[0].dtype == mx.float32
    assert outputs[1] is not None
    assert outputs[1].dtype == dtype
    assert_correct(outputs, inputs)
    only_values = mlx_response_logps(inputs.raw_logits, inputs.targets, **settings, gradient=False)
    assert only_values[1] is None
    assert mx.array_equal(only_values[0], outputs[0], equal_nan=True)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 30.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 33, 1027])
def test_hard_rows(size: int, dtype: mx.Dtype, scale: float, softcap: float) -> None:
    inputs = hard_rows(size, dtype, scale, softcap)
    outputs = mlx_response_logps(
        inputs.raw_logits, inputs.targets, scale=scale, softcap=softcap, gradient=True
    )
    assert_correct(outputs, inputs)
