"""Two right Metal kernels, and how a spoilt one and what must be found in it are written down."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

# The sum of each row of x: every thread adds up some elements, then a tree over threadgroup memory.
SUM = """
    uint row = threadgroup_position_in_grid.x;
    uint lid = thread_position_in_threadgroup.x;
    uint n = threads_per_threadgroup.x;
    threadgroup float buf[256];
    float s = 0.0f;
    for (uint i = lid; i < x_shape[1]; i += n) s += x[row * x_shape[1] + i];
    buf[lid] = s;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint o = n / 2; o > 0; o /= 2) {
        if (lid < o) buf[lid] += buf[lid + o];
        threadgroup_barrier(mem_flags::mem_threadgroup); // in the loop
    }
    if (lid == 0) out[row] = buf[0];
"""

# log Σ exp of each row of x, in one pass: a greatest value and a sum for each thread, then for each
# simdgroup, then for the threadgroup.
LOGSUMEXP = """
    uint row = threadgroup_position_in_grid.x;
    uint lid = thread_position_in_threadgroup.x;
    uint n = threads_per_threadgroup.x;
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    threadgroup float part_m[32], part_s[32];
    const device T* xs = x + size_t(row) * x_shape[1];
    float m = -INFINITY, s = 0.0f;
    for (uint i = lid; i < x_shape[1]; i += n) {
        float v = float(xs[i]);
        float greater = metal::max(m, v);
        s = s * metal::exp(m - greater) + metal::exp(v - greater);
        m = greater;
    }
    float greatest = metal::simd_max(m);
    s = m == -INFINITY ? 0.0f : s * metal::exp(m - greatest);
    s = metal::simd_sum(s);
    if (lane == 0) { part_m[group] = greatest; part_s[group] = s; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 0) {
        uint groups = (n + 31) / 32;
        float pm = lane < groups ? part_m[lane] : -INFINITY;
        float ps = lane < groups ? part_s[lane] : 0.0f;
        float of_all = metal::simd_max(pm);
        ps = pm == -INFINITY ? 0.0f : ps * metal::exp(pm - of_all);
        ps = metal::simd_sum(ps);
        if (lane == 0) out[row] = of_all + metal::log(ps);
    }
"""


@dataclass(frozen=True)
class Case:
    """A kernel, how it is launched, and what must be found: nothing, a MetalError of that kind, or
    "wrong-result" where only the numbers tell."""

    title: str
    found: str | None
    source: str
    launch: dict[str, Any] = field(default_factory=dict)


def changed(source: str, *replacements: tuple[str, str]) -> str:
    """The source with the first of each text replaced, which must be there."""
    for old, new in replacements:
        assert old in source, old
        source = source.replace(old, new, 1)
    return source


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def by_rows(source: str, x: mx.array, threads: int = 128, outputs: int | None = None) -> mx.array:
    """What a kernel with an input x and an output of float32 makes of x, a threadgroup a row."""
    kernel = mx.fast.metal_kernel("rows", ["x"], ["out"], source)
    (out,) = kernel(
        inputs=[x],
        template=[("T", x.dtype)],
        grid=(len(x) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(outputs or len(x),)],
        output_dtypes=[mx.float32],
    )
    return out
