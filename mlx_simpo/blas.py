"""OpenBLAS for MLX on a Linux CPU.

The MLX wheel for Linux links a reference BLAS: its float32 matrix products run at a thirtieth to an
eightieth of what the same cores give with OpenBLAS. A library that is loaded before MLX replaces
those routines, so OpenBLAS goes into LD_PRELOAD, which the dynamic loader reads when a process
starts: the command line starts itself a second time, scripts are started through

    env $(python -m mlx_simpo.blas) python script.py

The PyPI wheel ``cmeel-openblas`` (the extra ``openblas``) brings the library. It needs
libgfortran.so.5, which a bare system lacks but the MLX wheel has, under another name: a folder with
links to it goes into LD_LIBRARY_PATH.
"""

import ctypes.util
import importlib.util
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

_RESTARTED = "MLX_SIMPO_OPENBLAS"


def environment() -> tuple[dict[str, str], str]:
    """(variables to set before Python starts, what they do or why there are none)."""
    if platform.system() != "Linux":
        return {}, f"{platform.system()} needs none: MLX uses the system's own BLAS"
    if importlib.util.find_spec("mlx_cuda") is not None:
        return {}, "MLX has its CUDA back end here"
    if is_loaded():
        return {}, "OpenBLAS is loaded already"
    library = installed("cmeel-openblas", "cmeel.prefix/lib/libopenblas.so.0")
    if library is not None and re.search(r"[\s:]", str(library)):
        return {}, f"{library} has a space or colon in its path, which LD_PRELOAD cannot hold"
    if library is not None:
        variables = {"LD_PRELOAD": joined(str(library), "LD_PRELOAD")}
        if ctypes.util.find_library("gfortran") is None:
            links = fortran_links(library.parent)
            if links is None:
                return {}, f"{library} needs libgfortran.so.5, which is not on this machine"
            variables["LD_LIBRARY_PATH"] = joined(str(links), "LD_LIBRARY_PATH")
        return variables, f"OpenBLAS from {library}"
    system = ctypes.util.find_library("openblas")
    if system is not None:
        return {"LD_PRELOAD": joined(system, "LD_PRELOAD")}, f"OpenBLAS from the system ({system})"
    return {}, (
        "OpenBLAS is not installed, and MLX's own BLAS is up to 80 times slower; "
        "pip install cmeel-openblas"
    )


def is_loaded() -> bool:
    """Whether an OpenBLAS that MLX would use is in this process."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "/libopenblas.so" in maps.read_text(encoding="utf-8", errors="replace")


def installed(distribution: str, file: str) -> Path | None:
    """Where ``file`` of an installed distribution lies, if it is there."""
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(file)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.exists() else None


def joined(path: str, variable: str) -> str:
    """A search path with ``path`` in front of what ``variable`` holds already."""
    return ":".join(filter(None, [path, os.environ.get(variable)]))


def fortran_links(beside: Path) -> Path | None:
    """A folder with libgfortran.so.5 and its own needs, as links to the MLX wheel's copies."""
    libraries = installed("mlx-cpu", "mlx_cpu.libs")
    fortran = next(libraries.glob("libgfortran*.so.5*"), None) if libraries else None
    if libraries is None or fortran is None:
        return None
    folder = beside / "mlx-simpo-gfortran"
    try:
        folder.mkdir(exist_ok=True)
        names = {"libgfortran.so.5": fortran}
        names |= {path.name: path for path in libraries.glob("libquadmath*")}
        for name, target in names.items():
            link = folder / name
            if not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(target)
    except OSError:
        return None
    return folder


def missing() -> str | None:
    """Why this process has no OpenBLAS; None where it has, or needs none."""
    variables, reason = environment()
    if platform.system() != "Linux" or is_loaded() or importlib.util.find_spec("mlx_cuda"):
        return None
    if variables:
        return "start Python as: env $(python -m mlx_simpo.blas) python …"
    return reason


def restart_with_openblas() -> None:
    """Start this Python process anew with OpenBLAS, if that is possible and not done yet.

    Does not return when it restarts.
    """
    if os.environ.get(_RESTARTED):
        return
    variables, _ = environment()
    if variables:
        os.environ.update(variables, **{_RESTARTED: "1"})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    found, why = environment()
    sys.stderr.write(f"mlx-simpo: {why}\n")
    sys.stdout.write(" ".join(f"{name}={value}" for name, value in found.items()) + "\n")
