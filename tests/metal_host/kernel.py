"""A stand-in for mx.fast.metal_kernel whose kernels are executed on the host."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from . import launch
from .build import host_text
from .cuda import MAX_NDIM, cuda_signature
from .signature import Signature, Template, signature

Scalar = bool | int | float
SEEDS = (0, 1, 7)
MAX_THREADS = 1024

_seeds: tuple[int, ...] = SEEDS


def _to_numpy(array: mx.array) -> np.ndarray:
    """Return the same elements; NumPy has no bfloat16, so those come as their bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _to_mlx(bits: np.ndarray, dtype: mx.Dtype, shape: Sequence[int]) -> mx.array:
    return mx.array(bits).view(dtype).reshape(shape)


def _spread_out(array: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Lay an array out with shuffled axes and gaps between rows; return memory and strides (in
    elements)."""
    strides, size = [0] * array.ndim, 1
    for axis in generator.permutation(array.ndim):
        strides[axis] = size
        size *= array.shape[axis] + int(generator.integers(0, 3))
    memory = np.zeros(max(1, size), array.dtype)
    in_bytes = [stride * array.itemsize for stride in strides]
    np.lib.stride_tricks.as_strided(memory, array.shape, in_bytes)[...] = array
    return memory, strides


def _empty(size: int, dtype: mx.Dtype, init_value: Scalar | None) -> np.ndarray:
    """Return the content of an output before the kernel runs, as unsigned integers."""
    bits = np.dtype(f"uint{8 * dtype.size}")
    if init_value is not None:
        return _to_numpy(mx.full((size,), init_value, dtype)).view(bits)
    return np.full(size * dtype.size, launch.NEVER_WRITTEN, np.uint8).view(bits)


def _raise_no_gradient(*_: object) -> None:
    raise ValueError("a custom kernel has no gradient, as in MLX: define one for its caller")


def _check_sizes(what: str, values: Sequence[Any], names: Sequence[str]) -> None:
    if len(values) != len(names):
        raise ValueError(f"expected {len(names)} {what}, one for each name, but got {len(values)}")


@dataclass(frozen=True)
class MetalKernel:
    """The result of metal_kernel; called like the result of mx.fast.metal_kernel."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str
    ensure_row_contiguous: bool

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array | Scalar],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: launch.Triple,
        threadgroup: launch.Triple,
        template: Template | None = None,
        init_value: Scalar | None = None,
        verbose: bool = False,
        stream: object = None,
    ) -> list[mx.array]:
        """Execute the kernel and return its outputs, evaluated.

        ``verbose`` and ``stream`` are accepted and have no effect.

        Raises:
            MetalError: the kernel does not compile, or a check of its execution has failed.
            ValueError: the number of inputs or outputs, the grid or the threadgroup is not valid.
        """
        _check_sizes("inputs", inputs, self.input_names)
        _check_sizes("output shapes", output_shapes, self.output_names)
        _check_sizes("output types", output_dtypes, self.output_names)
        if min(*grid, *threadgroup) < 1:
            raise ValueError(f"there are no threads in grid {grid} and threadgroup {threadgroup}")
        if math.prod(threadgroup) > MAX_THREADS:
            raise ValueError(f"a threadgroup has at most {MAX_THREADS} threads, not {threadgroup}")

        def execute(*arrays: mx.array) -> list[mx.array]:
            kernel_signature = self._signature(
                self.name,
                self.source,
                self.input_names,
                [(a.dtype, a.shape) for a in arrays],
                self.output_names,
                output_dtypes,
                template or (),
            )
            outputs = [
                _empty(math.prod(shape), dtype, init_value)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            results = launch.run(
                self.name,
                host_text(kernel_signature, self.source, self.header),
                self._buffers(kernel_signature, arrays, outputs, init_value is not None),
                self._threads(grid, threadgroup),
                threadgroup,
                _seeds,
            )
            return [
                _to_mlx(bits, dtype, shape)
                for bits, dtype, shape in zip(results, output_dtypes, output_shapes, strict=True)
            ]

        # Without a vjp, gradients through the kernel would be zero instead of an error.
        differentiable: Any = mx.custom_function(execute)
        differentiable.vjp(_raise_no_gradient)
        return differentiable(*map(mx.array, inputs))

    @staticmethod
    def _signature(*arguments: Any) -> Signature:
        return signature(*arguments)

    @staticmethod
    def _threads(grid: launch.Triple, _threadgroup: launch.Triple) -> launch.Triple:
        """Return the grid: a threadgroup is cut off at its edge."""
        return grid

    def _buffers(
        self,
        kernel_signature: Signature,
        arrays: Sequence[mx.array],
        outputs: Sequence[np.ndarray],
        is_initialised: bool,
    ) -> list[launch.Buffer]:
        """Return the arguments of the function, except for the attributes."""
        inputs = self._inputs(arrays)
        return [
            launch.Buffer(p.name, outputs[p.index], True, is_initialised)
            if p.kind == "output"
            else launch.Buffer(p.name, inputs[p.index][p.kind])
            for p in kernel_signature.parameters
            if p.kind != "attribute"
        ]

    def _inputs(self, arrays: Sequence[mx.array]) -> list[dict[str, np.ndarray]]:
        """Return the possible arguments for each input, by the kind of parameter."""
        generator = np.random.default_rng(0)
        arguments = []
        for array in map(_to_numpy, arrays):
            strides = [s // array.itemsize for s in np.empty_like(array, order="C").strides]
            memory = np.ascontiguousarray(array).reshape(-1)
            if not self.ensure_row_contiguous and array.ndim:
                memory, strides = _spread_out(array, generator)
            arguments.append(
                {
                    "input": memory,
                    "shape": np.array(array.shape, np.int32),
                    "strides": np.array(strides, np.int64),
                    "ndim": np.array([array.ndim], np.int32),
                }
            )
        return arguments


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
) -> MetalKernel:
    """Create a kernel as mx.fast.metal_kernel does, to be executed and checked on the host.

    Raises:
        NotImplementedError: ``atomic_outputs`` is set.
    """
    if atomic_outputs:
        raise NotImplementedError("kernels with atomic outputs cannot be executed here")
    return MetalKernel(name, input_names, output_names, source, header, ensure_row_contiguous)


class CudaKernel(MetalKernel):
    """The result of cuda_kernel; called like the result of mx.fast.cuda_kernel."""

    @staticmethod
    def _signature(*arguments: Any) -> Signature:
        return cuda_signature(*arguments)

    @staticmethod
    def _threads(grid: launch.Triple, threadgroup: launch.Triple) -> launch.Triple:
        """Return the grid in whole blocks."""
        x, y, z = (-(-g // t) * t for g, t in zip(grid, threadgroup, strict=True))
        return x, y, z

    def _inputs(self, arrays: Sequence[mx.array]) -> list[dict[str, np.ndarray]]:
        arguments = super()._inputs(arrays)
        for argument in arguments:
            for kind in ("shape", "strides"):
                argument[kind] = np.pad(argument[kind], (0, MAX_NDIM - len(argument[kind])))
        return arguments


def cuda_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
) -> CudaKernel:
    """Create a kernel as mx.fast.cuda_kernel does, to be executed and checked on the host."""
    return CudaKernel(name, input_names, output_names, source, header, ensure_row_contiguous)


@contextmanager
def stand_in(seeds: Sequence[int] = SEEDS) -> Iterator[None]:
    """Replace mx.fast.metal_kernel and cuda_kernel, and turn mx.compile off: these kernels run when
    they are called, not when a graph is evaluated.

    Kernels that were created before keep running as they did: clear caches of kernels before
    entering and after leaving.

    Args:
        seeds: the orders of threads in which each kernel runs, see `launch.run`.
    """
    global _seeds
    before, _seeds = (mx.fast.metal_kernel, mx.fast.cuda_kernel, _seeds), tuple(seeds)
    mx.fast.metal_kernel, mx.fast.cuda_kernel = metal_kernel, cuda_kernel
    mx.disable_compile()
    try:
        yield
    finally:
        mx.fast.metal_kernel, mx.fast.cuda_kernel, _seeds = before
        mx.enable_compile()
