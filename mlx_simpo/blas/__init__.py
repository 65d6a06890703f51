"""OpenBLAS for MLX on a Linux CPU, loaded into this process before MLX.

The MLX wheel for Linux links a reference BLAS: its float32 matrix products run at a thirtieth to an
eightieth of what the same cores reach with OpenBLAS. The dynamic loader looks a symbol up in the
global scope first, so a library that was opened with RTLD_GLOBAL before MLX takes the place of
those routines, as it does in LD_PRELOAD. `import mlx_simpo` calls `load`.

That also holds for what is imported later: torch, too, computes with OpenBLAS in such a process.

The PyPI wheel ``cmeel-openblas`` (the extra ``openblas``) brings the library for x86-64 and ARM.
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from ..errors import one_line
from ..paths import cache_folder

_WHEEL = "cmeel.prefix/lib/libopenblas.so.0"
_SYSTEM = "libopenblas.so.0"
_FORTRAN = "libgfortran.so.5"


class Library(NamedTuple):
    """An OpenBLAS that was loaded: its file, and the folder with the Fortran library it needs."""

    file: str
    fortran: Path | None


_library: Library | None = None
_problem: str | None = None


def load() -> None:
    """Load OpenBLAS, unless this process has it or needs none.

    Never raises: `missing` returns what went wrong.
    """
    global _library, _problem
    if not is_needed() or is_loaded():
        return
    is_late = "mlx.core" in sys.modules
    try:
        # MLX binds its symbols when it is imported. After that, OpenBLAS would only replace the
        # BLAS of other libraries, such as torch's MKL.
        library = _open(ctypes.RTLD_LOCAL if is_late else ctypes.RTLD_GLOBAL)
    except (OSError, RuntimeError) as error:
        _problem = one_line(error)
        return
    if not is_late:
        _library = library
        return
    _problem = "MLX was imported before mlx_simpo; import mlx_simpo first"
    # Where warnings are errors, importing must not fail; loading a model warns again.
    with contextlib.suppress(RuntimeWarning):
        warnings.warn(
            "MLX was imported before mlx_simpo and keeps its slow BLAS; import mlx_simpo first",
            RuntimeWarning,
            stacklevel=3,
        )


def library() -> Library | None:
    """Return the OpenBLAS that `load` has loaded, or None."""
    return _library


def missing() -> str | None:
    """Return why MLX computes without OpenBLAS here; None if it has it or needs none."""
    return _problem


def is_needed() -> bool:
    """Whether MLX computes on a Linux CPU; elsewhere it does not use a reference BLAS."""
    return sys.platform == "linux" and importlib.util.find_spec("mlx_cuda") is None


def is_loaded() -> bool:
    """Whether an OpenBLAS is in the global scope, where MLX's symbols are looked up first."""
    return hasattr(ctypes.CDLL(None), "openblas_get_config")


def _open(mode: int) -> Library:
    """Open OpenBLAS from its wheel or, without the wheel, the system's.

    Raises:
        OSError: there is none, or it cannot be loaded.
        RuntimeError: the user has no home folder to keep a Fortran library in.
    """
    wheel = _installed(_WHEEL)
    if wheel is None:
        try:
            ctypes.CDLL(_SYSTEM, mode=mode)
        except OSError:
            raise OSError("it is not installed; pip install cmeel-openblas") from None
        return Library(_SYSTEM, None)
    try:
        ctypes.CDLL(str(wheel), mode=mode)
        return Library(str(wheel), None)
    except OSError as error:
        if _FORTRAN not in str(error):
            raise
    folder = _fortran_folder()
    # The loader looks among the libraries that are already loaded first, by their SONAME.
    for file in sorted(folder.glob("lib*"), reverse=True):  # libquadmath before libgfortran
        ctypes.CDLL(str(file))
    ctypes.CDLL(str(wheel), mode=mode)
    return Library(str(wheel), folder)


def _installed(path: str) -> Path | None:
    """Return the first such path in the folders that Python imports from.

    importlib.metadata would know, but takes longer to import than everything else here.
    """
    paths = (Path(folder, path) for folder in sys.path)
    return next((path for path in paths if path.exists()), None)


def _fortran_folder() -> Path:
    """Return a folder with libgfortran.so.5, which cmeel-openblas needs and a bare system lacks.

    The MLX wheel brings that library under another name (libgfortran-f7379c93.so.5.0.0). The file
    holds that name as well (its SONAME), and the loader goes by it. So a copy that has the usual
    name in both is written to the user's cache, with a copy of the libquadmath that it needs.

    Raises:
        OSError: there is no such library, or the cache cannot be written.
        RuntimeError: the user has no home folder.
    """
    libraries = _installed("mlx_cpu.libs")
    original = next(libraries.glob("libgfortran*.so.5*"), None) if libraries else None
    if libraries is None or original is None:
        raise OSError(f"it needs {_FORTRAN}, which is not on this machine")
    # The wheel's name has a hash of the file in it: another version gets another folder.
    folder = cache_folder().absolute() / "openblas" / original.name
    folder.mkdir(parents=True, exist_ok=True)
    for quadmath in libraries.glob("libquadmath*"):
        _copy(quadmath, folder / quadmath.name)
    _copy(original, folder / _FORTRAN)
    return folder


def _copy(original: Path, target: Path) -> None:
    """Copy a shared library and rename it inside to ``target``'s name, unless that is done.

    Raises:
        OSError: the original cannot be read, or the target's folder cannot be written.
    """
    if target.exists() and target.stat().st_size == original.stat().st_size:
        return
    import tempfile  # only here, because it takes longer to import than OpenBLAS to load

    name = original.name.encode()
    content = original.read_bytes().replace(name, target.name.encode().ljust(len(name), b"\0"))
    # Another process may do the same now: each moves a whole file into place.
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, target)
        except OSError:
            os.unlink(file.name)
            raise
