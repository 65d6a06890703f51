"""The machine that MLX runs on: its default device and its memory."""

import os
import platform

import mlx.core as mx


def is_gpu() -> bool:
    """Return whether MLX's default device is a GPU (Metal or CUDA)."""
    return mx.default_device().type == mx.gpu


def processor() -> str:
    """Return the name of the chip that MLX runs on."""
    return str(mx.device_info().get("device_name", platform.processor() or "unknown"))


def total_memory_bytes() -> int:
    """Return the machine's physical memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
