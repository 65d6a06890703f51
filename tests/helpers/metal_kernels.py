"""Two correct Metal kernels, and the form in which planted bugs are written down."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

# The sum of each row of x: every thread adds up some elements, then a tree adds up the threads.
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

# log Σ exp of each row of x, in one pass: max and sum of each thread, then of each simdgroup, then
# of the threadgroup.
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
        float new_m = metal::max(m, v);
        s = s * metal::exp(m - new_m) + metal::exp(v - new_m);
        m = new_m;
    }
    float group_m = metal::simd_max(m);
    s = m == -INFINITY ? 0.0f : s * metal::exp(m - group_m);
    s = metal::simd_sum(s);
    if (lane == 0) { part_m[group] = group_m; part_s[group] = s; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 0) {
        uint groups = (n + 31) / 32;
        float pm = lane < groups ? part_m[lane] : -INFINITY;
        float ps = lane < groups ? part_s[lane] : 0.0f;
        float row_m = metal::simd_max(pm);
        ps = pm == -INFINITY ? 0.0f : ps * metal::exp(pm - row_m);
        ps = metal::simd_sum(ps);
        if (lane == 0) out[row] = row_m + metal::log(ps);
    }
"""


@dataclass(frozen=True)
class Case:
    """A kernel and the kind of problem that the Metal host must report for it.

    kind: of the MetalError; "wrong-result" where only the numbers show it; None if the kernel is
        correct. launch: dtype and shape of x, and arguments of `launch_rows`.
    """

    title: str
    kind: str | None
    source: str
    launch: dict[str, Any] = field(default_factory=dict)


def changed(source: str, *replacements: tuple[str, str]) -> str:
    """Return the source with the first occurrence of each text replaced; none may be missing."""
    for old, new in replacements:
        assert old in source, old
        source = source.replace(old, new, 1)
    return source


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def launch_rows(
    source: str, x: mx.array, threads: int = 128, outputs: int | None = None
) -> mx.array:
    """Run a kernel with the input x, one threadgroup per row, and return its float32 output."""
    kernel: Any = mx.fast.metal_kernel("rows", ["x"], ["out"], source)
    (out,) = kernel(
        inputs=[x],
        template=[("T", x.dtype)],
        grid=(len(x) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(outputs or len(x),)],
        output_dtypes=[mx.float32],
    )
    return out
