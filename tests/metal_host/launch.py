"""Runs a compiled kernel on arrays: once for each seed, with the same results."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char, c_int32, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .build import MetalError, library, line_of

MAX_REPORTS = 8
MAX_ACCESSES = 2_000_000_000  # in one run; how endless loops are detected
NEVER_WRITTEN = 0xFF  # the bytes that outputs are filled with; NaN as a float

Triple = tuple[int, int, int]


@dataclass
class Buffer:
    """An argument: one-dimensional ``data`` that is copied in, and for an output back out."""

    name: str
    data: np.ndarray
    is_output: bool = False
    is_initialised: bool = True


class _Triple(ctypes.Structure):
    _fields_ = [(axis, c_uint32) for axis in "xyz"]


# As in runtime.cpp and report.h, which explain the fields.
class _Buffer(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("bytes", c_uint64),
        ("item_bytes", c_uint64),
        ("writable", c_int32),
        ("initialised", c_int32),
        ("name", c_char * 64),
    ]


class _Report(ctypes.Structure):
    _fields_ = [
        ("kind", c_char * 32),
        ("message", c_char * 400),
        ("file", c_char * 64),
        ("line", c_int32),
        ("offset", c_uint64),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", _Triple),
        ("group", _Triple),
        ("seed", c_uint64),
        ("max_accesses", c_uint64),
        ("buffers", POINTER(_Buffer)),
        ("reports", POINTER(_Report)),
        ("buffer_count", c_int32),
        ("max_reports", c_int32),
    ]


@cache
def _loaded(path: Path) -> ctypes.PyDLL:
    # PyDLL keeps the GIL: a library can run only one kernel at a time.
    return ctypes.PyDLL(str(path))


def _as_struct(buffer: Buffer, data: np.ndarray) -> _Buffer:
    return _Buffer(
        data.ctypes.data,
        data.nbytes,
        data.itemsize,
        buffer.is_output,
        buffer.is_initialised,
        buffer.name.encode()[:63],
    )


def _problem(path: Path, report: _Report) -> tuple[str, str]:
    """Return a problem's kind and message, which begins with the kernel's line if that is known."""
    message = report.message.decode()
    if report.file:
        message = f"{Path(report.file.decode()).name}:{report.line}: {message}"
    elif report.offset:
        message = f"{line_of(path, report.offset)}: {message}"
    return report.kind.decode(), message


def _run_once(
    name: str, path: Path, buffers: Sequence[Buffer], grid: Triple, group: Triple, seed: int
) -> list[np.ndarray]:
    """Run the kernel once and return its outputs.

    Raises:
        MemoryError: the buffers do not fit into memory.
        MetalError: a check has failed.
    """
    copies = [buffer.data.copy() for buffer in buffers]
    structs = (_Buffer * len(buffers))(*map(_as_struct, buffers, copies))
    reports = (_Report * MAX_REPORTS)()
    launch = _Launch(
        _Triple(*grid),
        _Triple(*group),
        seed,
        MAX_ACCESSES,
        structs,
        reports,
        len(buffers),
        MAX_REPORTS,
    )
    count = _loaded(path).launch(ctypes.byref(launch))
    if count < 0:
        raise MemoryError(f"the buffers of kernel {name!r} do not fit into memory")
    if count:
        raise MetalError(name, [_problem(path, report) for report in reports[:count]])
    return [data for buffer, data in zip(buffers, copies, strict=True) if buffer.is_output]


def run(
    name: str,
    text: str,
    buffers: Sequence[Buffer],
    grid: Triple,
    threadgroup: Triple,
    seeds: Sequence[int],
) -> list[np.ndarray]:
    """Run the kernel whose C++ is ``text`` once per seed and return its outputs.

    Args:
        grid: the number of threads along x, y and z.
        threadgroup: the number of threads of a threadgroup, cut off where the grid is smaller.
        seeds: the order of threads in each run: 0 is by index, 1 the reverse, others are random.

    Raises:
        MemoryError: the buffers do not fit into memory.
        MetalError: it does not compile, a check has failed, or the outputs of two seeds differ.
    """
    path = library(name, text)
    x, y, z = map(min, threadgroup, grid)
    group = (x, y, z)
    outputs = [_run_once(name, path, buffers, grid, group, seed) for seed in seeds]
    labels = [buffer.name for buffer in buffers if buffer.is_output]
    for seed, others in zip(seeds[1:], outputs[1:], strict=True):
        for label, first, other in zip(labels, outputs[0], others, strict=True):
            different = np.flatnonzero(first != other)
            if len(different):
                problem = f"output {label!r} differs, first at element {different[0]},"
                problem += f" between the orders of seeds {seeds[0]} and {seed}"
                raise MetalError(name, [("order-dependent", problem)])
    return outputs[0]
