"""Pointers that Metal rejects are rejected here too, where there is a clang that can tell."""

import mlx.core as mx
import pytest
from helpers.metal_kernels import LOGSUMEXP, SUM, changed

from metal_host.address_spaces import address_spaces, clang
from metal_host.signature import Signature, signature

pytestmark = pytest.mark.skipif(
    clang() is None, reason="address spaces are checked by clang++ 19 or newer, not installed"
)


def rows_signature(
    source: str, shape: tuple[int, ...] = (4, 300), dtype: mx.Dtype = mx.float32
) -> Signature:
    return signature(
        "rows", source, ["x"], [(dtype, shape)], ["out"], [mx.float32], [("T", dtype)]
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("source", [SUM, LOGSUMEXP], ids=["sum", "log-sum-exp"])
def test_correct_kernels(source: str, dtype: mx.Dtype) -> None:
    assert address_spaces(rows_signature(source, dtype=dtype), source) == ""


def test_vectors() -> None:
    source = """
        threadgroup vec<T, 4> shared[8], more[2][2];
        uint i = thread_position_in_grid.x;
        const device vec<T, 4>* p = reinterpret_cast<const device vec<T, 4>*>(x);
        float4 f = max(float4(p[i].x, 1.0f, 2.0f, 3.0f), float4(0.0f));
        shared[i % 8] = p[i];
        more[0][1] = shared[0];
        out[i] = dot(f, f) + simd_sum(float(more[0][1].x)) + (any(f > float4(1.0f)) ? 1 : 0);
    """
    assert address_spaces(rows_signature(source), source) == ""


def test_inputs_under_eight_elements_are_constant() -> None:
    """const device T* xs = x compiles for eight elements and not for seven."""
    assert address_spaces(rows_signature(LOGSUMEXP, (2, 4)), LOGSUMEXP) == ""
    assert "source:7" in address_spaces(rows_signature(LOGSUMEXP, (1, 7)), LOGSUMEXP)


@pytest.mark.parametrize(
    "statement",
    [
        "const float* q = x;",
        "threadgroup float* q = out;",
        "device float* q = buf;",
        "const constant float* q = x;",
        "first(buf);",
    ],
)
def test_wrong_pointers(statement: str) -> None:
    header = "inline float first(const device float* p) { return p[0]; }"
    source = changed(SUM, ("float s = 0.0f;", f"float s = 0.0f; {statement}"))
    assert "source:6" in address_spaces(rows_signature(source), source, header)
    right = changed(SUM, ("float s = 0.0f;", "float s = 0.0f; first(x);"))
    assert address_spaces(rows_signature(right), right, header) == ""
