"""Launches the kernel of response_logps.metal: on Metal as it is, on CUDA behind cuda.h."""

from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..device import is_gpu

# MLX indexes with 32 bits, and a long launch can be killed by a GPU's watchdog.
MOST_ELEMENTS, MOST_ROWS = 2**31 - 1, 1024
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

_FOLDER = Path(__file__).parent
# MLX names a kernel's inputs, the shape of an input and a thread's attributes in the signature if
# they stand here. What is an argument below may lie in any address space (a small input is put into
# `constant`), but for the outputs.
_CALL = """
    const {unsigned} row = {row};
    {shared} float maxima[32];
    {shared} float sums[32];
    response_logps::Place place = {place};
    const int size = products_shape[1];
    response_logps::row<T, {has_gradient}>(
        products + size_t(row) * size, size, targets[row], settings[0], settings[1],
        logps + row, {gradient}, maxima, sums, place);
"""
_METAL = {
    "unsigned": "uint",
    "shared": "threadgroup",
    "row": "threadgroup_position_in_grid.y",
    "place": "{thread_index_in_threadgroup, threads_per_threadgroup.x, "
    "thread_index_in_simdgroup, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup}",
    "none": "(device T*)nullptr",
}
_CUDA = {
    "unsigned": "unsigned int",
    "shared": "__shared__",
    "row": "blockIdx.y",
    "place": "{threadIdx.x, blockDim.x, threadIdx.x % 32, threadIdx.x / 32, blockDim.x / 32}",
    "none": "(T*)nullptr",
}


def backend() -> str | None:
    """Where the kernel can run now, "Metal" or "CUDA"; None if MLX's device is the CPU."""
    if not is_gpu():
        return None
    return "Metal" if mx.metal.is_available() else "CUDA" if mx.cuda.is_available() else None


def launch(
    products: mx.array, targets: mx.array, *, scale: float, softcap: float, gradient: bool
) -> tuple[mx.array, mx.array | None]:
    """What `response_logps` returns, from the kernel.

    Raises:
        ValueError: a shape or dtype that the kernel is not made for.
    """
    rows, size = products.shape
    if products.dtype not in DTYPES or targets.dtype != mx.int32:
        raise ValueError(
            f"logits are {products.dtype} and targets {targets.dtype}; the kernel takes float32, "
            "float16 or bfloat16, and int32"
        )
    if rows > MOST_ROWS or products.size > MOST_ELEMENTS:
        raise ValueError(
            f"{rows} rows of {size} logits; a launch takes {MOST_ROWS} rows and {MOST_ELEMENTS} "
            "logits at most: give it fewer rows at a time"
        )
    name = backend()
    threads = _threads(size, products.itemsize)
    found = _kernel(name, gradient)(
        inputs=[products, targets, mx.array([scale, softcap], mx.float32)],
        template=[("T", products.dtype)],
        grid=(threads, rows, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows,), (rows, size)][: 1 + gradient],
        output_dtypes=[mx.float32, products.dtype][: 1 + gradient],
    )
    return found[0], found[1] if gradient else None


def _threads(size: int, itemsize: int) -> int:
    """Threads of a row: as many as have 16 bytes to read, in whole simdgroups."""
    reads = size * itemsize / 16
    return min(max(32, -(-int(reads) // 32) * 32), 1024)


@cache
def _kernel(backend: str | None, gradient: bool) -> Any:
    """The kernel, compiled by MLX at its first launch for a dtype."""
    make = mx.fast.cuda_kernel if backend == "CUDA" else mx.fast.metal_kernel
    return make(**text(backend, gradient=gradient))


def text(backend: str | None, *, gradient: bool) -> dict[str, Any]:
    """The arguments of mx.fast.metal_kernel, or of mx.fast.cuda_kernel for "CUDA"."""
    words = _CUDA if backend == "CUDA" else _METAL
    source = _CALL.format(
        has_gradient=str(gradient).lower(),
        gradient="gradient + size_t(row) * size" if gradient else words["none"],
        **words,
    )
    header = (_FOLDER / "response_logps.metal").read_text(encoding="utf-8")
    if backend == "CUDA":
        header = (_FOLDER / "cuda.h").read_text(encoding="utf-8") + header
    return {
        # MLX keeps compiled kernels by their name: one for each text.
        "name": "mlx_simpo_response_logps" + ("_and_gradient" if gradient else ""),
        "input_names": ["products", "targets", "settings"],
        "output_names": ["logps", "gradient"][: 1 + gradient],
        "source": source,
        "header": header,
    }
