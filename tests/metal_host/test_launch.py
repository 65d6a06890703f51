"""The Metal host in place of mx.fast.metal_kernel: arrays in and out, errors, gradients."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.metal_kernels import LOGSUMEXP, SUM, float64, launch_rows, normal

import metal_host.launch
from metal_host import MetalError, metal_kernel, missing, stand_in

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


# --- arrays in and out -----------------------------------------------------------------------


def test_a_strided_input_is_made_contiguous() -> None:
    x = normal(300, 4).T
    with stand_in():
        assert np.allclose(float64(launch_rows(SUM, x)), float64(x).sum(1), atol=1e-4)


def test_strides_lead_to_the_elements() -> None:
    """An input that need not be contiguous is not, so a kernel that relies on it is wrong."""
    source = "uint3 p = thread_position_in_grid; out[p.y * x_shape[1] + p.x] = x[{}];"
    x = normal(6, 5)
    call = {
        "inputs": [x],
        "grid": (5, 6, 1),
        "threadgroup": (5, 2, 1),
        "output_shapes": [x.shape],
        "output_dtypes": [x.dtype],
    }
    for index, is_correct in {
        "p.y * x_strides[0] + p.x * x_strides[1]": True,
        "p.y * 5 + p.x": False,
    }.items():
        kernel = metal_kernel("strided", ["x"], ["out"], source.format(index), "", False)
        assert mx.array_equal(kernel(**call)[0], x).item() == is_correct


def test_scalars_several_outputs_and_init_value() -> None:
    source = (
        "uint i = thread_position_in_grid.x; twice[i] = bfloat(x[i] * s); if (i < 3) some[i] += n;"
    )
    kernel = metal_kernel("several", ["x", "s", "n"], ["twice", "some"], source)
    twice, some = kernel(
        inputs=[mx.arange(8, dtype=mx.float16), 2.0, 5],
        grid=(8, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(2, 4), (4,)],
        output_dtypes=[mx.bfloat16, mx.int32],
        init_value=1,
        stream=mx.cpu,
    )
    assert twice.tolist() == [[0, 2, 4, 6], [8, 10, 12, 14]]
    assert (twice.dtype, some.tolist()) == (mx.bfloat16, [6, 6, 6, 1])


def test_wrong_calls_are_errors() -> None:
    kernel = metal_kernel("k", ["x"], ["out"], "out[0] = x[0];")
    call = {
        "grid": (1, 1, 1),
        "threadgroup": (1, 1, 1),
        "output_shapes": [(1,)],
        "output_dtypes": [mx.float32],
    }
    with pytest.raises(ValueError, match="expected 1 inputs"):
        kernel(inputs=[], **call)
    with pytest.raises(ValueError, match="at most 1024 threads"):
        kernel(inputs=[1.0], **{**call, "threadgroup": (64, 32, 1)})
    with pytest.raises(ValueError, match="there are no threads in grid"):
        kernel(inputs=[1.0], **{**call, "grid": (0, 1, 1)})
    with pytest.raises(ValueError, match=r"kernels with .*complex64 cannot be executed here"):
        kernel(inputs=[mx.array(1j)], **call)
    with pytest.raises(NotImplementedError, match="atomic outputs cannot be executed here"):
        metal_kernel("k", ["x"], ["out"], "", atomic_outputs=True)


def test_a_problem_has_its_line_and_element() -> None:
    header = "#include <metal_stdlib>\ninline float at(const device float* x, uint i) {\n\n"
    header += "  return x[i];\n}"
    kernel = metal_kernel(
        "k", ["x"], ["out"], "uint i = thread_position_in_grid.x;\nout[i] = at(x, i + 1);", header
    )
    with pytest.raises(MetalError) as error:
        kernel(
            inputs=[mx.zeros((8,))],
            grid=(8, 1, 1),
            threadgroup=(4, 1, 1),
            output_shapes=[(8,)],
            output_dtypes=[mx.float32],
        )
    assert "header:4" in str(error.value)
    assert "read of buffer 'x' at element 8 of 8" in str(error.value)


@pytest.mark.parametrize("writer", range(3))
def test_threadgroups_do_not_wait_for_each_other(writer: int) -> None:
    """One writes what all have read: no order makes that right, even if it is the last to run."""
    source = f"""
        uint group = threadgroup_position_in_grid.x;
        seen[group] = sum[0];
        if (group == {writer}) sum[0] += x;
    """
    kernel = metal_kernel("across", ["x"], ["sum", "seen"], source)
    with pytest.raises(MetalError, match="by another threadgroup") as error, stand_in((0,)):
        kernel(
            inputs=[1.0],
            grid=(3, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,), (3,)],
            output_dtypes=[mx.float32] * 2,
            init_value=0,
        )
    assert error.value.kinds == {"race"}


def test_the_outputs_of_all_orders_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit. The runs are replaced, since all known causes are reported as something else."""
    outputs = iter([[np.array([1, 2])], [np.array([1, 3])]])
    monkeypatch.setattr(metal_host.launch, "_run_once", lambda *_: next(outputs))
    with pytest.raises(MetalError, match="differs, first at element 1,") as error, stand_in((0, 1)):
        launch_rows(SUM, normal(1, 2))
    assert error.value.kinds == {"order-dependent"}


# --- in place of MLX's function --------------------------------------------------------------


def test_the_stand_in_is_removed_afterwards() -> None:
    before = mx.fast.metal_kernel
    with stand_in():
        assert mx.fast.metal_kernel is metal_kernel
    assert mx.fast.metal_kernel is before


def test_compiled_functions_and_gradients() -> None:
    @mx.custom_function
    def log_sum_exp(x: mx.array) -> mx.array:
        return launch_rows(LOGSUMEXP, x, 32)

    @log_sum_exp.vjp
    def gradient(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return cotangent[:, None] * mx.softmax(x, axis=1)

    x = normal(3, 50)
    with stand_in(seeds=(0,)):
        function: Any = log_sum_exp  # mlx types the results of a custom function as object
        step = mx.compile(mx.value_and_grad(lambda x: function(2 * x).sum()))
        value, grad = step(x)
    e = np.exp(2 * float64(x))
    assert value.item() == pytest.approx(np.log(e.sum(1)).sum(), rel=1e-6)
    assert np.allclose(float64(grad), 2 * e / e.sum(1, keepdims=True), atol=1e-6)


def test_a_kernel_has_no_gradient_of_its_own() -> None:
    """As in MLX, it is an error; zero would be wrong and go unnoticed."""
    with stand_in(seeds=(0,)), pytest.raises(ValueError, match="a custom kernel has no gradient"):
        mx.eval(mx.grad(lambda x: launch_rows(SUM, x).sum())(normal(2, 8)))
