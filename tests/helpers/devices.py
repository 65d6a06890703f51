"""A CPU and a GPU for tests, on any machine.

No test may depend on which of the two the machine has: a test about one of them asks for it here.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import mlx.core as mx
import pytest
from metal_host import missing, stand_in

from mlx_simpo.engine.fused_attention import forget_checks
from mlx_simpo.kernels import choice, launch


@contextmanager
def on_cpu() -> Iterator[None]:
    """Make the CPU MLX's default device, as it is where there is no GPU."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)


@contextmanager
def on_stand_in_gpu(backend: str = "Metal") -> Iterator[None]:
    """Let MLX report a GPU of Metal or CUDA and execute kernels on the CPU (see tests/metal_host);
    skip the test where kernels cannot be executed."""
    if reason := missing():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch, stand_in(seeds=(0, 1, 7)):
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
        patch.setattr(mx.metal, "is_available", lambda: backend == "Metal")
        patch.setattr(mx.cuda, "is_available", lambda: backend == "CUDA")
        forget_kernels()
        try:
            yield
        finally:
            forget_kernels()


@contextmanager
def on_gpu() -> Iterator[None]:
    """The machine's GPU, or the stand-in where it has none."""
    if launch.backend() is None:
        with on_stand_in_gpu():
            yield
    else:
        yield


def on_stand_in_cuda() -> AbstractContextManager[None]:
    """Let MLX report a GPU of CUDA: see `on_stand_in_gpu`."""
    return on_stand_in_gpu("CUDA")


def forget_kernels() -> None:
    """Drop kernels that are cached, and what was checked of them and of MLX's operations."""
    launch._kernel.cache_clear()
    choice.check_kernel.cache_clear()
    forget_checks()
