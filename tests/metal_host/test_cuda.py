"""CUDA kernels on the host: executed and checked like Metal's, and read by Clang as CUDA."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_host import MetalError, missing, stand_in
from metal_host.cuda import cuda_errors, cuda_signature

# Every thread adds up some elements of a row, a warp adds up its lanes, one thread the warps.
SUM = """
    __shared__ float partial[4];
    const int size = x_shape[1];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < size; i += blockDim.x) sum += float(x[blockIdx.y * size + i]);
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < WARPS; i++) sum += partial[i];
    if (threadIdx.x == 0) out[blockIdx.y] = T(square(sum)) + (x_ndim - 2) + x_strides[1] - 1;
"""
HEADER = "__device__ float square(float x) { return x * x; }\n"


def sums(source: str = SUM, dtype: mx.Dtype = mx.float32, threads: int = 128) -> mx.array:
    """Return the squared sums of three rows of integers, by a kernel."""
    kernel: Any = mx.fast.cuda_kernel("sums", ["x"], ["out"], source, HEADER)
    (out,) = kernel(
        inputs=[(mx.arange(600) % 5).reshape(3, 200).astype(dtype)],
        template=[("T", dtype), ("WARPS", -(-threads // 32))],
        grid=(threads, 3, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(3,)],
        output_dtypes=[dtype],
    )
    return out.astype(mx.float32)


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_kernel(dtype: mx.Dtype) -> None:
    with stand_in():
        assert mx.allclose(sums(dtype=dtype), mx.full((3,), 160_000.0), rtol=4e-3).item() == (
            dtype != mx.float16  # whose largest number is 65504
        )


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("__syncthreads();", "", "race"),
        ("threadIdx.x / 32]", "threadIdx.x]", "out-of-bounds"),
        ("0xffffffffu", "0xffffu", "absent-lane"),
        ("int d = 16", "int d = 32", "absent-lane"),
        ("% 32 == 0", "== 0", "uninitialised-read"),
        ("__syncthreads();", "if (threadIdx.x > 63) __syncthreads();", "divergent-barrier"),
        ("out[blockIdx.y]", "out[blockIdx.x]", "unwritten-output"),
    ],
)
def test_a_bug_is_reported(old: str, new: str, kind: str) -> None:
    assert SUM.count(old) == 1
    with stand_in(), pytest.raises(MetalError) as error:
        sums(SUM.replace(old, new))
    assert kind in error.value.kinds


def test_a_warp_that_is_not_full_has_no_lanes_to_add_up() -> None:
    with stand_in(), pytest.raises(MetalError) as error:
        sums(threads=40)
    assert error.value.kinds == {"absent-lane"}


def test_blocks_are_whole() -> None:
    """A grid that is no multiple of a block is rounded up; Metal cuts its threadgroups off."""
    source = "out[blockIdx.x * blockDim.x + threadIdx.x] = blockDim.x + gridDim.x;"
    with stand_in():
        kernel: Any = mx.fast.cuda_kernel("blocks", [], ["out"], source)
        (out,) = kernel(
            inputs=[],
            grid=(40, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(64,)],
            output_dtypes=[mx.int32],
        )
    assert np.array_equal(np.array(out), np.full(64, 34))


@pytest.mark.parametrize(
    ("header", "line"),
    [
        (HEADER, ""),
        (HEADER.replace("__device__", "inline"), "source:11"),
        ("#define device\n" + HEADER, "source:11"),  # empties __device__
        (HEADER.replace("x * x", "__shfl_down_sync(~0u, x, 1)"), "header:1"),
    ],
)
def test_clang_knows_functions_of_the_device(header: str, line: str) -> None:
    template = [("T", mx.bfloat16), ("WARPS", 4)]
    inputs, dtypes = [(mx.bfloat16, (3, 200))], [mx.bfloat16]
    errors = cuda_errors(
        cuda_signature("sums", SUM, ["x"], inputs, ["out"], dtypes, template), SUM, header
    )
    assert errors.startswith(line)
    assert bool(errors) == bool(line)
