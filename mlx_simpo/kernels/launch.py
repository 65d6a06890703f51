"""Launches the kernel of response_logps.metal: on Metal as it is, on CUDA behind cuda.h."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..device import is_gpu

# MLX indexes arrays with 32 bits, and a GPU's watchdog may kill a long launch.
MOST_ELEMENTS, MOST_ROWS = 2**31 - 1, 1024
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

_FOLDER = Path(__file__).parent
# MLX adds a parameter to the kernel's signature for every input, every `<input>_shape` and every
# attribute of a thread that this text mentions; it does not look into the header, so they must all
# appear here. Inputs may be in any address space (MLX puts those under eight elements into
# `constant`), so `process_row` takes them as a template type; outputs are always in `device`.
_CALL = """
    const {unsigned} row = {row};
    {shared} float maxima[32];
    {shared} float sums[32];
    response_logps::ThreadPosition position = {position};
    const int size = raw_logits_shape[1];
    response_logps::process_row<T, {has_gradient}>(
        raw_logits + size_t(row) * size, size, targets[row], settings[0], settings[1],
        logps + row, {d_raw_logits}, maxima, sums, position);
"""
_METAL = {
    "unsigned": "uint",
    "shared": "threadgroup",
    "row": "threadgroup_position_in_grid.y",
    "position": "{thread_index_in_threadgroup, threads_per_threadgroup.x, "
    "thread_index_in_simdgroup, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup}",
    "null": "(device T*)nullptr",
}
_CUDA = {
    "unsigned": "unsigned int",
    "shared": "__shared__",
    "row": "blockIdx.y",
    "position": "{threadIdx.x, blockDim.x, threadIdx.x % 32, threadIdx.x / 32, blockDim.x / 32}",
    "null": "(T*)nullptr",
}
# CUDA has none. As empty macros they would empty CUDA's own: __device__ is __attribute__((device)).
_ADDRESS_SPACES = re.compile(r"\b(constant|device|threadgroup) (?=\w)")


def backend() -> str | None:
    """Return where the kernel can run now, "Metal" or "CUDA"; None if MLX runs on the CPU."""
    if not is_gpu():
        return None
    return "Metal" if mx.metal.is_available() else "CUDA" if mx.cuda.is_available() else None


def kernel_response_logps(
    raw_logits: mx.array, targets: mx.array, *, scale: float, softcap: float, gradient: bool
) -> tuple[mx.array, mx.array | None]:
    """Return log p(targets) and its gradient with respect to the raw logits, from the kernel.

    See `kernels.choice.ResponseLogps` for arguments and results.

    Raises:
        ValueError: a dtype that the kernel does not take, or too many rows or logits.
    """
    rows, size = raw_logits.shape
    if raw_logits.dtype not in DTYPES or targets.dtype != mx.int32:
        raise ValueError(
            f"logits are {raw_logits.dtype} and targets {targets.dtype}; the kernel takes logits "
            "in float32, float16 or bfloat16 and targets in int32"
        )
    if rows > MOST_ROWS or raw_logits.size > MOST_ELEMENTS:
        raise ValueError(
            f"{rows} rows of {size} logits are too many; a launch takes at most {MOST_ROWS} rows "
            f"and {MOST_ELEMENTS} logits: pass fewer rows at a time"
        )
    threads = _threads_per_row(size, raw_logits.itemsize)
    kernel = _kernel(backend(), gradient)
    outputs = kernel(
        inputs=[raw_logits, targets, mx.array([scale, softcap], mx.float32)],
        template=[("T", raw_logits.dtype)],
        grid=(threads, rows, 1),  # counts threads, not threadgroups
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows,), (rows, size)][: 1 + gradient],
        output_dtypes=[mx.float32, raw_logits.dtype][: 1 + gradient],
    )
    return outputs[0], outputs[1] if gradient else None


def _threads_per_row(size: int, itemsize: int) -> int:
    """Return one thread per 16 bytes of a row, in whole simdgroups of 32, at most 1024."""
    return 32 * min(-(-size * itemsize // 512), 32)


@cache
def _kernel(backend: str | None, gradient: bool) -> Any:
    """Return the kernel, which MLX compiles when it is first launched for a dtype."""
    make = mx.fast.cuda_kernel if backend == "CUDA" else mx.fast.metal_kernel
    return make(**kernel_definition(backend, gradient=gradient))


def kernel_definition(backend: str | None, *, gradient: bool) -> dict[str, Any]:
    """Return the arguments of mx.fast.metal_kernel, or of mx.fast.cuda_kernel for "CUDA"."""
    words = _CUDA if backend == "CUDA" else _METAL
    source = _CALL.format(
        has_gradient=str(gradient).lower(),
        d_raw_logits="d_raw_logits + size_t(row) * size" if gradient else words["null"],
        **words,
    )
    header = (_FOLDER / "response_logps.metal").read_text(encoding="utf-8")
    if backend == "CUDA":
        header = (_FOLDER / "cuda.h").read_text(encoding="utf-8") + _ADDRESS_SPACES.sub("", header)
    return {
        # MLX caches compiled kernels by name, so each source needs a name of its own.
        "name": "mlx_simpo_response_logps" + ("_and_gradient" if gradient else ""),
        "input_names": ["raw_logits", "targets", "settings"],
        "output_names": ["logps", "d_raw_logits"][: 1 + gradient],
        "source": source,
        "header": header,
    }
