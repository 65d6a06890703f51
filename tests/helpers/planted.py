"""Bugs planted in Metal kernels, which the Metal host must report, and correct kernels, which it
must accept."""

from helpers.metal_kernels import LOGSUMEXP, SUM, Case, changed

ELEMENTWISE = {"shape": (1, 32), "threads": 32, "outputs": 32}  # for kernels without rows
INDEX = "uint i = thread_position_in_grid.x; "
IN_ARRAY = INDEX + (
    "threadgroup float b[32]; b[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup);"
)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
IN_LOOP = BARRIER + " // in the loop"
TREE_STEP = "if (lid < o) buf[lid] += buf[lid + o];"
SIMD_SUM = "s = metal::simd_sum(s);\n    if"


def butterfly(mask: int) -> str:
    """Return simd_sum written as shuffles between lanes that are ``mask`` apart, half of it, …"""
    return f"for (ushort k = {mask}; k; k /= 2) s += metal::simd_shuffle_xor(s, k);\n    if"


BOUNDS = [
    Case("read past the end", "out-of-bounds", changed(SUM, ("i < x_shape", "i <= x_shape"))),
    Case(
        "read of the next row",
        "wrong-result",
        changed(SUM, ("i < x_shape[1]", "i <= x_shape[1] - (row == 3 ? 1 : 0)")),
    ),
    Case("write past the end", "out-of-bounds", changed(SUM, ("out[row]", "out[row + 1]"))),
    Case("negative index", "out-of-bounds", changed(SUM, ("out[row]", "out[(int)row - 1]"))),
    Case(
        "index off by 50 million",
        "out-of-bounds",
        changed(SUM, ("buf[lid] = s;", "buf[lid] = s + 0.0f * x[50000000 + lid];")),
    ),
    Case("threadgroup array too small", "out-of-bounds", changed(SUM, ("buf[256]", "buf[100]"))),
    Case(
        "threadgroup array too small for a pointer",
        "out-of-bounds",
        changed(
            SUM,
            ("buf[256];", "buf[100]; threadgroup float* q = buf;"),
            ("buf[lid] = s", "q[lid] = s"),
        ),
    ),
    Case(
        "array of a thread too small",
        "out-of-bounds",
        changed(
            SUM,
            (
                "buf[lid] = s;",
                "float own[4]; for (uint j = 0; j < 5; ++j) own[j] = s; buf[lid] = own[lid & 3];",
            ),
        ),
    ),
    Case(
        "unsigned index below zero",
        "out-of-bounds",
        INDEX + "uint n = i - i; out[i] = x[metal::min(i + 40u, n - 1)];",
        ELEMENTWISE,
    ),
    Case(
        "read of a vector past the end",
        "out-of-bounds",
        INDEX + "out[i] = dot(((const device float4*)x)[i], float4(1.0f));",
        {"shape": (1, 30), "threads": 8, "outputs": 8},
    ),
    Case(
        "write to an input",
        "write-to-input",
        changed(SUM, ("buf[lid] = s;", "((device float*)x)[lid] = 0; buf[lid] = s;")),
    ),
]

RACES = [
    Case("no barrier before the tree", "race", changed(SUM, (BARRIER, ""))),
    Case("no barrier in the tree", "race", changed(SUM, (IN_LOOP, ""))),
    Case("no barrier between simdgroups", "race", changed(LOGSUMEXP, (BARRIER, ""))),
    Case(
        "barrier for other memory",
        "race",
        changed(SUM, (BARRIER, BARRIER.replace("mem_threadgroup", "mem_device"))),
    ),
    Case(
        "barrier of the simdgroup only",
        "race",
        changed(SUM, (BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);")),
    ),
    Case(
        "barrier of the simdgroup, for other memory",
        "race",
        changed(IN_ARRAY, ("mem_threadgroup", "mem_device")) + "out[i] = b[31 - i];",
        ELEMENTWISE,
    ),
    Case(
        "no barrier between lanes",
        "race",
        INDEX + "threadgroup float b[32]; b[i] = x[i]; out[i] = b[31 - i];",
        ELEMENTWISE,
    ),
    Case(
        "two threadgroups write one element",
        "race",
        changed(SUM, ("out[row] =", "out[row / 2] =")),
        {"outputs": 2},
    ),
    Case(
        "write while other lanes may still read",
        "race",
        IN_ARRAY + "float v = b[31 - i]; b[i] = v; simdgroup_barrier(mem_flags::mem_threadgroup);"
        "out[i] = b[i];",
        ELEMENTWISE,
    ),
    Case(
        "simd_sum used as a barrier",
        "race",
        IN_ARRAY + "float v = simd_sum(b[0]); if (i == 0) b[0] = v; out[i] = v;",
        ELEMENTWISE,
    ),
    Case(
        "write after reads by two simdgroups, barrier for no memory",
        "race",
        INDEX + "threadgroup float b[1]; if (i == 0) b[0] = x[0];"
        f"{BARRIER} float v = i % 32 == 0 ? b[0] : 0.0f; threadgroup_barrier(mem_flags::mem_none);"
        "if (i == 0) b[0] = 1.0f; out[i] = v;",
        {"shape": (1, 64), "threads": 64, "outputs": 64},
    ),
    Case(
        "output read without a barrier for device memory",
        "race",
        INDEX + f"out[i] = x[i]; {BARRIER} if (i == 0) out[0] = out[5];",
        ELEMENTWISE,
    ),
]

DIVERGENCE = [
    Case(
        "return before a barrier",
        "divergent-barrier",
        changed(SUM, ("float s = 0.0f;", "if (lid >= x_shape[1] / 3) return; float s = 0.0f;")),
    ),
    Case(
        "barrier in a branch",
        "divergent-barrier",
        changed(
            SUM,
            (TREE_STEP, "if (lid < o) { buf[lid] += buf[lid + o];"),
            (IN_LOOP, BARRIER + "}"),
        ),
    ),
    Case(
        "return from a loop with a barrier",
        "divergent-barrier",
        changed(SUM, (TREE_STEP, TREE_STEP + " if (lid > 100 && o < 32) return;")),
    ),
    Case(
        "one barrier for each half",
        "divergent-barrier",
        changed(SUM, (BARRIER, f"if (lid < 64) {BARRIER} else\n {BARRIER}")),
    ),
    Case(
        "return before a barrier of the simdgroup",
        "divergent-barrier",
        INDEX + "out[i] = x[i]; if (i > 9) return; simdgroup_barrier(mem_flags::mem_none);",
        ELEMENTWISE,
    ),
    Case(
        "simd operation in a branch",
        "divergent-simd",
        changed(LOGSUMEXP, (SIMD_SUM, "if (lane < 16) " + SIMD_SUM)),
    ),
    Case("width 64 assumed", "absent-lane", changed(LOGSUMEXP, (SIMD_SUM, butterfly(32)))),
    Case("width 16 assumed", "wrong-result", changed(LOGSUMEXP, (SIMD_SUM, butterfly(8)))),
    Case(
        "half a simdgroup missing",
        "absent-lane",
        changed(LOGSUMEXP, (SIMD_SUM, butterfly(16))),
        {"threads": 48},
    ),
    Case(
        "one simdgroup assumed",
        "wrong-result",
        changed(
            LOGSUMEXP, ("lane < groups ? part_m", "lane < 1 ? part_m"),
            ("lane < groups ? part_s", "lane < 1 ? part_s"),
        ),
    ),
    Case("tree over 96 threads, no power of two", "wrong-result", SUM, {"threads": 96}),
]  # fmt: skip

VALUES = [
    Case(
        "threadgroup memory never written",
        "uninitialised-read",
        changed(
            LOGSUMEXP,
            ("lane < groups ? part_m[lane] : -INFINITY", "part_m[lane]"),
            ("lane < groups ? part_s[lane] : 0.0f", "part_s[lane]"),
        ),
    ),
    Case(
        "value left behind by another threadgroup",
        "uninitialised-read",
        changed(SUM, ("buf[lid] = s;", "if (row == 0 || lid < 64) buf[lid] = s;")),
    ),
    Case(
        "row never written",
        "unwritten-output",
        changed(SUM, ("if (lid == 0) out", "if (lid == 0 && row != 2) out")),
    ),
    Case(
        "addition to an output", "uninitialised-read", changed(SUM, ("out[row] =", "out[row] +="))
    ),
    Case("variable without a value", "wrong-result", changed(SUM, ("float s = 0.0f;", "float s;"))),
    Case(
        "misaligned vector",
        "undefined-behaviour",
        INDEX + "out[i] = ((const device float4*)(x + 1))[i].x;",
        {"shape": (1, 64), "threads": 8, "outputs": 8},
    ),
    Case(
        "index that overflows 32 bits",
        "overflow",
        "int i = thread_position_in_grid.x; int j = (i + 70000) * 70000;"
        "out[i] = x[i] + (j == 12345);",
        ELEMENTWISE,
    ),
    Case("threadgroup memory over 32 KiB", "threadgroup-memory",
         changed(SUM, ("buf[256]", "buf[9000]"))),
    Case("two arrays over 32 KiB", "threadgroup-memory",
         changed(SUM, ("buf[256]", "buf[5000], more[5000]"))),
    Case("endless loop", "runaway", INDEX + "while (x[0] == x[0]) out[i] = x[i];",
         ELEMENTWISE),
]  # fmt: skip

LANGUAGE = [
    Case(
        "implicit conversion of float to bfloat",
        "compile",
        INDEX + "T t = 1.0f; out[i] = t + x[i];",
        {"dtype": "bfloat16", **ELEMENTWISE},
    ),
    Case("max of float and int", "compile", INDEX + "out[i] = metal::max(x[i], 0);", ELEMENTWISE),
    Case("double", "compile", INDEX + "double d = x[i]; out[i] = d;", ELEMENTWISE),
]

CORRECT = [
    Case("sum", None, SUM),
    Case("log-sum-exp", None, LOGSUMEXP),
    Case(
        "output read after a barrier for device memory",
        None,
        INDEX + "out[i] = x[i]; threadgroup_barrier(mem_flags::mem_device);"
        "if (i == 0) out[0] = out[5];",
        ELEMENTWISE,
    ),
    Case("barrier between lanes", None, IN_ARRAY + "out[i] = b[31 - i];", ELEMENTWISE),
    Case(
        "write after a barrier that orders all reads",
        None,
        IN_ARRAY + "float v = b[0] + b[31 - i]; simdgroup_barrier(mem_flags::mem_threadgroup);"
        "b[i] = v; if (i == 0) b[0] += 1.0f; out[i] = b[i];",
        ELEMENTWISE,
    ),
    Case(
        "write after barriers for reads by all",
        None,
        INDEX + "threadgroup float b[1]; if (i == 0) b[0] = x[0];"
        f"{BARRIER} float v = b[0]; {BARRIER} if (i == 0) b[0] = 1.0f;"
        f"{BARRIER} v += b[0]; {BARRIER} if (i == 0) b[0] += 1.0f; {BARRIER} out[i] = v + b[0];",
        {"shape": (1, 64), "threads": 64, "outputs": 64},
    ),
    Case(
        "one barrier for both kinds of memory",
        None,
        INDEX + "threadgroup float b[64]; b[i] = x[i]; out[i] = x[i];"
        "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);"
        "float v = b[63 - i] + out[63 - i];"
        "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);"
        "b[i] = v; out[i] = b[i];",
        {"shape": (1, 64), "threads": 64, "outputs": 64},
    ),
    Case("simd_sum after half of the simdgroup has returned", None,
         INDEX + "if (i >= 16) { out[i] = 0; return; } out[i] = simd_sum(x[i]);", ELEMENTWISE),
]  # fmt: skip
