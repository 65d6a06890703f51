"""OpenBLAS on a Linux CPU: which variables are printed, and that they do load it into MLX."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_simpo import blas

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def linux(monkeypatch: Patch) -> dict[str, str]:
    """A Linux CPU with nothing installed and nothing loaded; its environment variables."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(blas, "os", SimpleNamespace(environ=variables, execv=no_restart))
    monkeypatch.setattr(blas.platform, "system", lambda: "Linux")
    monkeypatch.setattr(blas.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(blas.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(blas, "is_loaded", lambda: False)
    monkeypatch.setattr(blas, "installed", lambda distribution, file: None)
    return variables


def no_restart(*arguments: object) -> None:
    pytest.fail("Python was started anew")


def wheels(monkeypatch: Patch, folder: Path, *, fortran: bool = True) -> Path:
    """Both wheels' libraries in ``folder``: OpenBLAS, and what is in MLX's; the former's path."""
    library = folder / "lib" / "libopenblas.so.0"
    libraries = folder / "mlx_cpu.libs"
    files = [library, libraries / "libquadmath-9f.so.0"]
    files += [libraries / "libgfortran-8a.so.5.0.0"] if fortran else []
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    known = {"cmeel-openblas": library, "mlx-cpu": libraries}
    monkeypatch.setattr(blas, "installed", lambda distribution, file: known.get(distribution))
    return library


# --- which variables -------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_another_system_needs_none(system: str, monkeypatch: Patch, tmp_path: Path) -> None:
    wheels(monkeypatch, tmp_path)
    monkeypatch.setattr(blas.platform, "system", lambda: system)
    variables, why = blas.environment()
    assert variables == {}
    assert f"{system} needs none" in why


def test_a_gpu_needs_none(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    wheels(monkeypatch, tmp_path)
    monkeypatch.setattr(blas.importlib.util, "find_spec", lambda name: name == "mlx_cuda" or None)
    assert blas.environment() == ({}, "MLX has its CUDA back end here")
    blas.restart_with_openblas()
    assert capsys.readouterr() == ("", "")
    assert blas.missing() is None


def test_once_is_enough(monkeypatch: Patch, tmp_path: Path) -> None:
    wheels(monkeypatch, tmp_path)
    monkeypatch.setattr(blas, "is_loaded", lambda: True)
    assert blas.environment() == ({}, "OpenBLAS is loaded already")


def test_the_wheel_goes_before_mlx_with_mlxs_fortran(monkeypatch: Patch, tmp_path: Path) -> None:
    library = wheels(monkeypatch, tmp_path)
    variables, why = blas.environment()
    assert variables.keys() == {"LD_PRELOAD", "LD_LIBRARY_PATH"}
    assert variables["LD_PRELOAD"] == str(library)
    assert why == f"OpenBLAS from {library}"
    links = Path(variables["LD_LIBRARY_PATH"])
    assert {link.name: link.resolve().name for link in links.iterdir()} == {
        "libgfortran.so.5": "libgfortran-8a.so.5.0.0",
        "libquadmath-9f.so.0": "libquadmath-9f.so.0",
    }
    links.joinpath("libgfortran.so.5").unlink()
    links.joinpath("libgfortran.so.5").symlink_to("a wheel that is gone")
    assert blas.environment()[0] == variables
    assert (links / "libgfortran.so.5").exists()


def test_the_systems_fortran_is_preferred(monkeypatch: Patch, tmp_path: Path) -> None:
    library = wheels(monkeypatch, tmp_path)
    monkeypatch.setattr(blas.ctypes.util, "find_library", lambda name: f"lib{name}.so.5")
    assert blas.environment()[0] == {"LD_PRELOAD": str(library)}


def test_without_fortran_the_wheel_is_of_no_use(monkeypatch: Patch, tmp_path: Path) -> None:
    wheels(monkeypatch, tmp_path, fortran=False)
    variables, why = blas.environment()
    assert variables == {}
    assert "libgfortran.so.5, which is not on this machine" in why


def test_the_systems_openblas_will_do(monkeypatch: Patch) -> None:
    monkeypatch.setattr(blas.ctypes.util, "find_library", lambda name: f"lib{name}.so.0")
    assert blas.environment()[0] == {"LD_PRELOAD": "libopenblas.so.0"}


def test_what_was_loaded_before_stays(
    linux: dict[str, str], monkeypatch: Patch, tmp_path: Path
) -> None:
    library = wheels(monkeypatch, tmp_path)
    linux.update(LD_PRELOAD="libmine.so", LD_LIBRARY_PATH="/mine")
    variables, _ = blas.environment()
    assert variables["LD_PRELOAD"] == f"{library}:libmine.so"
    assert variables["LD_LIBRARY_PATH"].split(":")[1:] == ["/mine"]


def test_a_path_that_ld_preload_cannot_hold_is_not_promised(
    monkeypatch: Patch, tmp_path: Path
) -> None:
    wheels(monkeypatch, tmp_path / "my project")
    assert blas.environment()[0] == {}


# --- starting Python anew --------------------------------------------------------------------


def test_the_command_line_starts_anew_once(
    linux: dict[str, str], monkeypatch: Patch, tmp_path: Path
) -> None:
    library = wheels(monkeypatch, tmp_path)
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(blas.os, "execv", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(blas.sys, "orig_argv", ["python", "-m", "mlx_simpo", "train"])
    blas.restart_with_openblas()
    assert started == [(sys.executable, [sys.executable, "-m", "mlx_simpo", "train"])]
    assert linux["LD_PRELOAD"] == str(library)
    blas.restart_with_openblas()
    assert len(started) == 1


def test_without_openblas_the_reason_is_told() -> None:
    blas.restart_with_openblas()
    assert "pip install cmeel-openblas" in (blas.missing() or "")


def test_openblas_that_was_not_loaded_in_time(
    linux: dict[str, str], monkeypatch: Patch, tmp_path: Path
) -> None:
    wheels(monkeypatch, tmp_path)
    assert "env $(python -m mlx_simpo.blas)" in (blas.missing() or "")


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_where_nothing_is_needed_nothing_is_said(
    system: str, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(blas.platform, "system", lambda: system)
    monkeypatch.setattr(blas, "is_loaded", lambda: system == "Linux")
    blas.restart_with_openblas()
    assert capsys.readouterr() == ("", "")
    assert blas.missing() is None


# --- for real --------------------------------------------------------------------------------

WHEEL = blas.installed("cmeel-openblas", "cmeel.prefix/lib/libopenblas.so.0")
BARE = {name: value for name, value in os.environ.items() if not name.startswith("LD_")}
PROGRAM = """
import mlx.core as mx
mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
print("/libopenblas.so" in open("/proc/self/maps").read())
"""
UNINSTALLED = """
import ctypes.util, runpy
from importlib import metadata
found = metadata.distribution
metadata.distribution = lambda name: found("no-such" if name == "cmeel-openblas" else name)
ctypes.util.find_library = lambda name: None
runpy.run_module("mlx_simpo.blas", run_name="__main__")
"""


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    started = [sys.executable, *arguments]
    return subprocess.run(started, env=BARE | variables, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux" or WHEEL is None, reason="needs cmeel-openblas")
def test_what_is_printed_loads_openblas_into_mlx() -> None:
    printed = python("-m", "mlx_simpo.blas")
    assert printed.returncode == 0
    assert printed.stderr == f"mlx-simpo: OpenBLAS from {WHEEL}\n"
    variables = dict(word.split("=", 1) for word in printed.stdout.split())
    assert python("-c", PROGRAM, **variables).stdout == "True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_where_there_is_none_nothing_is_printed_and_nothing_fails() -> None:
    printed = python("-c", UNINSTALLED)
    assert (printed.returncode, printed.stdout) == (0, "\n")
    assert "pip install cmeel-openblas" in printed.stderr
