"""The part of Metal's language and library that the Metal host supports, against NumPy."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from metal_host import MetalError, metal_kernel, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
types = pytest.mark.parametrize("dtype", FLOATS, ids=str)
LANES = np.arange(64) % 32


def each(body: str, *inputs: mx.array, out: mx.Dtype, header: str = "") -> np.ndarray:
    """Run ``body`` in 64 threads (two simdgroups) on inputs a, b and c, and return out."""
    kernel = metal_kernel(
        "each",
        list("abc"[: len(inputs)]),
        ["out"],
        f"uint i = thread_position_in_grid.x; uint lane = thread_index_in_simdgroup; {body}",
        header,
    )
    (output,) = kernel(
        inputs=inputs,
        template=[("T", inputs[0].dtype)],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[out],
    )
    return np.array(output.astype(mx.float32) if out in FLOATS else output)


def numbers(dtype: mx.Dtype, count: int = 64) -> tuple[mx.array, np.ndarray]:
    """Return numbers between 0.5 and 3, and the same in float64."""
    array = mx.array(np.random.default_rng(3).uniform(0.5, 3, count).astype(np.float32))
    array = array.astype(dtype)
    return array, np.array(array.astype(mx.float32)).astype(np.float64)


# --- mathematics -----------------------------------------------------------------------------

UNARY: dict[str, Callable] = {
    "exp": np.exp,
    "exp2": np.exp2,
    "exp10": lambda x: 10**x,
    "log": np.log,
    "log2": np.log2,
    "log10": np.log10,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: x**-0.5,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "fabs": np.abs,
    "abs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "rint": np.rint,
    "trunc": np.trunc,
    "sign": np.sign,
}


@types
def test_functions_of_one_number(dtype: mx.Dtype) -> None:
    """All in one kernel: each thread writes the largest relative error of any function."""
    x, exact = numbers(dtype)
    table = mx.array(np.stack([f(exact) for f in UNARY.values()], axis=1).astype(np.float32))
    calls = "".join(
        f"worst = max(worst, fabs(float({space}{name}(x)) / b[i * {len(UNARY)} + {k}] - 1.0f));"
        for k, name in enumerate(UNARY)
        for space in ["", "metal::", *(["metal::precise::", "metal::fast::"] if k < 14 else [])]
        if not name.startswith(("floor", "trunc"))  # zero: compared below
    )
    worst = each(
        f"T x = a[i]; float worst = 0.0f; {calls} out[i] = worst;", x, table, out=mx.float32
    )
    assert worst.max() < {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    actual = each("out[i] = T(floor(a[i]) - trunc(-a[i]));", x, out=dtype)
    assert np.array_equal(actual, 2 * np.floor(exact))


@types
def test_functions_of_several_numbers(dtype: mx.Dtype) -> None:
    x, a = numbers(dtype)
    y, b = x[::-1], a[::-1]
    rounded = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    expected = {
        "min(a[i], b[i])": np.minimum(a, b),
        "metal::max(a[i], b[i])": np.maximum(a, b),
        "fast::pow(a[i], b[i])": a**b,
        "divide(a[i], b[i])": a / b,
        "fma(a[i], b[i], a[i])": a * b + a,
        "clamp(a[i], T(1.0f), T(2.0f))": np.clip(a, 1, 2),
        "select(a[i], b[i], i % 2 == 0)": np.where(np.arange(64) % 2, a, b),
        "T(isnan(T(NAN))) + T(isinf(-T(INFINITY))) * T(2)": np.full(64, 3.0),
        "T(a[i] * 2 + b[i] - 1)": a * 2 + b - 1,
    }
    for text, exact in expected.items():
        assert np.allclose(each(f"out[i] = {text};", x, y, out=dtype), exact, rtol=2 * rounded), (
            text
        )


def test_integers() -> None:
    a = mx.arange(-32, 32)
    n = np.arange(-32, 32)
    expected = {
        "min(a[i], 5) + max(a[i], -3) + clamp(a[i], -2, 2) + abs(a[i])": (
            np.minimum(n, 5) + np.maximum(n, -3) + np.clip(n, -2, 2) + np.abs(n)
        ),
        "int(uint(a[i]) % 7u)": n.astype(np.uint32) % 7,
        "int((ulong(i) << 40) >> 38) + int(size_t(lane) * 100000000ul / 1000000ul)": (
            np.arange(64) * 4 + LANES * 100
        ),
    }
    for text, exact in expected.items():
        assert np.array_equal(each(f"out[i] = {text};", a, out=mx.int32), exact), text
    bytes_ = mx.arange(64, dtype=mx.uint8) * 5
    actual = each("out[i] = uchar(a[i] + 1);", bytes_, out=mx.uint8)
    assert np.array_equal(actual, np.array(bytes_) + 1)


@types
def test_vectors(dtype: mx.Dtype) -> None:
    x, exact = numbers(dtype, 256)
    body = """
        vec<T, 4> v = reinterpret_cast<const device vec<T, 4>*>(a)[i];
        metal::float4 f = float4(v) * 2 + float4(1, 0, 0, 0);
        f.w -= f[0];
        f += float4(0.5f);
        float2 top = max(float2(f.x, f.y), float2(3.0f));
        out[i] = dot(f, float4(1.0f)) + top.x - top.y + (any(f > 100.0f) ? 1e9f : 0.0f);
    """
    f = exact.reshape(64, 4) * 2 + [1, 0, 0, 0]
    f[:, 3] -= f[:, 0]
    f += 0.5
    top = np.maximum(f[:, :2], 3)
    assert np.allclose(each(body, x, out=mx.float32), f.sum(1) + top[:, 0] - top[:, 1], atol=1e-5)


@types
def test_wide_reads_of_a_struct(dtype: mx.Dtype) -> None:
    """Eight elements at once, as a kernel may read a row of logits."""
    header = "template <typename T> struct alignas(4 * sizeof(T)) Eight { T items[8]; };\n"
    body = """
        Eight<T> e = *(const device Eight<T>*)(a + 8 * i);
        float sum = 0;
        for (int k = 0; k < 8; k++) sum += float(e.items[k]);
        out[i] = sum;
    """
    x, exact = numbers(dtype, 512)
    actual = each(body, x, out=mx.float32, header=header)
    assert np.allclose(actual, exact.reshape(64, 8).sum(1), rtol=1e-6)


def test_bits_and_roundings() -> None:
    # Ties between two bfloats, the largest float, −∞, and NaN with one bit set and with all.
    special = [0x3F808000, 0x3F818000, 0xBF808000, 0x7F7FFFFF, 0xFF800000, 0x7F800001, 0x7FFFFFFF]
    random = np.random.default_rng(0).integers(0, 2**32, 64 - len(special))
    words = mx.array(np.append(special, random).astype(np.uint32))
    floats = words.view(mx.float32)
    actual = each("out[i] = as_type<uint>(as_type<float>(a[i]));", words, out=mx.uint32)
    assert np.array_equal(actual, np.array(words))
    for dtype in (mx.bfloat16, mx.float16):
        name = str(dtype).removeprefix("mlx.core.") + "_t"
        actual = each(f"out[i] = float({name}(a[i]));", floats, out=mx.float32)
        exact = np.array(floats.astype(dtype).astype(mx.float32))
        normal = ~(np.abs(exact) < 1e-4)  # denormals are flushed
        assert np.array_equal(actual[normal], exact[normal], equal_nan=True), dtype


def test_denormals_are_zero() -> None:
    x = mx.full((64,), 1e-30)
    assert (each("out[i] = (a[i] * 1e-10f) * 1e30f;", x, out=mx.float32) == 0).all()


# --- simdgroups ------------------------------------------------------------------------------

BY_LANES = {
    "simd_sum(a[i])": lambda x: np.repeat(x.sum(1), 32),
    "simd_max(a[i])": lambda x: np.repeat(x.max(1), 32),
    "simd_min(a[i])": lambda x: np.repeat(x.min(1), 32),
    "simd_shuffle(a[i], 31 - lane)": lambda x: x[:, ::-1],
    "simd_shuffle_xor(a[i], 5)": lambda x: x[:, np.arange(32) ^ 5],
    "simd_shuffle_down(a[i], 3)": lambda x: x[:, [*range(3, 32), 29, 30, 31]],
    "simd_shuffle_up(a[i], 2)": lambda x: x[:, [0, 1, *range(30)]],
    "simd_shuffle_rotate_down(a[i], 3)": lambda x: np.roll(x, -3, axis=1),
    "simd_shuffle_rotate_up(a[i], 3)": lambda x: np.roll(x, 3, axis=1),
    "simd_broadcast(a[i], 9)": lambda x: np.repeat(x[:, 9], 32),
    "simd_broadcast_first(a[i])": lambda x: np.repeat(x[:, 0], 32),
    "T(simd_all(lane < 32)) + T(simd_any(lane > 31))": lambda x: np.ones(64),
    "simd_sum(vec<T, 2>(a[i], T(1))).y": lambda x: np.full(64, 32.0),
}


@types
@pytest.mark.parametrize("text", BY_LANES)
def test_simd_operations(text: str, dtype: mx.Dtype) -> None:
    x, exact = numbers(dtype)
    expected = np.ravel(BY_LANES[text](exact.reshape(2, 32)))
    close = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    assert np.allclose(each(f"out[i] = {text};", x, out=dtype), expected, rtol=close)


# --- what Metal rejects ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["min(a[i], 1)", "max(1, a[i])", "clamp(a[i], 0, 1)", "std::exp(a[i])", "expm1(a[i])"]
)
def test_calls_that_do_not_compile(text: str) -> None:
    with pytest.raises(MetalError) as error:
        each(f"out[i] = {text};", numbers(mx.float32)[0], out=mx.float32)
    assert error.value.kinds == {"compile"}
    assert "source:1" in str(error.value)


def test_threadgroup_variables_belong_in_the_kernel() -> None:
    header = "inline void f() {\n  threadgroup float b[4];\n}"
    with pytest.raises(MetalError, match="header:2: threadgroup variables"):
        each("out[i] = a[i];", numbers(mx.float32)[0], out=mx.float32, header=header)
    with pytest.raises(MetalError, match="source:2: threadgroup variables"):
        each("\n threadgroup float b[64] = {0.0f}; out[i] = b[i];", mx.zeros(64), out=mx.float32)


def test_constants_outside_of_functions() -> None:
    header = "constant float TABLE[3] = {1.0f, 2.0f, 4.0f};\n"
    actual = each("out[i] = TABLE[i % 3];", numbers(mx.float32)[0], out=mx.float32, header=header)
    assert np.array_equal(actual, np.resize([1, 2, 4], 64))
