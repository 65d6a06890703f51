"""Arrays to a compiled kernel and back: one run for each seed, which must agree."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char, c_int32, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .build import MetalError, library, line_of

MAX_REPORTS = 8
MAX_ACCESSES = 2_000_000_000  # of one run; a loop that never ends is found by it
NEVER_WRITTEN = 0xFF  # what outputs are filled with: as floats NaN

Triple = tuple[int, int, int]


@dataclass
class Buffer:
    """A kernel's argument: ``data``, one-dimensional, is copied to it, and an output's back."""

    name: str
    data: np.ndarray
    is_output: bool = False
    is_initialised: bool = True


class _Triple(ctypes.Structure):
    _fields_ = [(axis, c_uint32) for axis in "xyz"]


# As in runtime.cpp and memory.h, which say what the fields mean.
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
    # PyDLL keeps other Python threads waiting: a library runs one kernel at a time.
    return ctypes.PyDLL(str(path))


def _described(buffer: Buffer, data: np.ndarray) -> _Buffer:
    return _Buffer(
        data.ctypes.data,
        data.nbytes,
        data.itemsize,
        buffer.is_output,
        buffer.is_initialised,
        buffer.name.encode()[:63],
    )


def _problem(path: Path, report: _Report) -> tuple[str, str]:
    """Its kind, and the line it is about, if any, with what is said of it."""
    message = report.message.decode()
    if report.file:
        message = f"{Path(report.file.decode()).name}:{report.line}: {message}"
    elif report.offset:
        message = f"{line_of(path, report.offset)}: {message}"
    return report.kind.decode(), message


def _run_once(
    name: str, path: Path, buffers: Sequence[Buffer], grid: Triple, group: Triple, seed: int
) -> list[np.ndarray]:
    """The outputs of one run; a MetalError if anything was found."""
    copies = [buffer.data.copy() for buffer in buffers]
    described = (_Buffer * len(buffers))(*map(_described, buffers, copies))
    reports = (_Report * MAX_REPORTS)()
    launch = _Launch(
        _Triple(*grid),
        _Triple(*group),
        seed,
        MAX_ACCESSES,
        described,
        reports,
        len(buffers),
        MAX_REPORTS,
    )
    found = _loaded(path).launch(ctypes.byref(launch))
    if found < 0:
        raise MemoryError(f"kernel {name!r}: its buffers do not fit into memory")
    if found:
        raise MetalError(name, [_problem(path, report) for report in reports[:found]])
    return [data for buffer, data in zip(buffers, copies, strict=True) if buffer.is_output]


def run(
    name: str,
    text: str,
    buffers: Sequence[Buffer],
    grid: Triple,
    threadgroup: Triple,
    seeds: Sequence[int],
) -> list[np.ndarray]:
    """The outputs of the kernel whose C++ is ``text``.

    grid: the number of threads along x, y and z.
    threadgroup: the number of those in a group, where the grid is not smaller.
    seeds: one run for each; 0 is the order of indices, 1 the reverse, others are random.

    Raises:
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
                problem = f"output {label!r} differs from element {different[0]} on"
                problem += f" between the orders of seeds {seeds[0]} and {seed}"
                raise MetalError(name, [("order-dependent", problem)])
    return outputs[0]
