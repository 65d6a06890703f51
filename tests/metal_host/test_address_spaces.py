"""Pointers that Metal rejects are rejected here too."""

import mlx.core as mx
import pytest
from helpers.metal_kernels import LOGSUMEXP, SUM, changed

from metal_host.address_spaces import address_spaces
from metal_host.signature import Signature, signature


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


# Of an address space that the pointer or the function does not expect; x and out are in device
# memory, buf is in threadgroup memory, own is a thread's.
WRONG = [
    "const float* q = x;",
    "threadgroup float* q = out;",
    "device float* q = buf;",
    "const constant float* q = x;",
    "first(buf);",
    # Casts of every kind. Only reinterpret_cast is an error for Clang by itself.
    "const float* q = (const float*)x;",
    "const thread float* q = (const thread float*)&x[1];",
    "device T* q = (device T*)buf;",
    "float f = ((const threadgroup float*)(x + 1))[2];",
    "float f = *(device float*)(thread float*)own;",
    "float f = (float)((const device float*)own)[1] + (float)x[0];",
    "device float4* q = reinterpret_cast<device float4*>(buf);",
    "(thread float&)out[0] = 1.0f;",
    "float f = DeviceFloats(buf)[1];",
    "float f = *static_cast<device float*>((device void*)own);",
    "any_cast<const device float*>(own);",
    "any_call<const device float*>(own);",
]
RIGHT = [
    "float f = first(x) + (float)(own[0] + x[1]);",
    "const device float4* q = (const device float4*)(x + 4);",
    "device T* q = (device T*)nullptr;",
    "float f = ((threadgroup float*)buf)[1] + DeviceFloats(x + 1)[0] + float(int(lid));",
    "(device float&)out[0] = (float)(*(const thread float*)own);",
    "device uint* q = (device uint*)out;",
    "any_cast<const device float*>(x); any_call<const device float*>(x);",
]
HEADER = """typedef const device float* DeviceFloats;
inline float first(const device float* p) { return p[0]; }
template <class To, class From> To any_cast(From value) { To other = (To)value; return other; }
template <class To, class From> To any_call(From value) { return To(value); }
"""


def errors(statement: str) -> str:
    """Return what is wrong with a statement in the sixth line of a kernel."""
    source = changed(SUM, ("float s = 0.0f;", f"float s = 0.0f, own[2]; {statement}"))
    return address_spaces(rows_signature(source), source, HEADER)


@pytest.mark.parametrize("statement", WRONG)
def test_wrong_pointers(statement: str) -> None:
    line = {"any_cast": "header:3", "any_call": "header:4"}.get(statement[:8], "source:6")
    assert line in errors(statement)


@pytest.mark.parametrize("statement", RIGHT)
def test_right_pointers(statement: str) -> None:
    assert errors(statement) == ""
