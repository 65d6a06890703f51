"""OpenBLAS on a Linux CPU: MLX computes with it, and what happens where it cannot be loaded."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_simpo import blas
from mlx_simpo.blas.__main__ import main

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
# Without what `env $(python -m mlx_simpo.blas)` sets, if the tests were started that way.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("LD_")}
WHEEL = blas._installed(blas._WHEEL)
PRODUCT = "mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))"
MISSING = "from mlx_simpo import blas; print(blas.missing())"


def python(*arguments: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with environment variables of its own."""
    environment = ENVIRONMENT | {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def bound_library(code: str, folder: Path, **variables: object) -> str:
    """Return the file name of the library whose cblas_sgemm MLX calls, after running this code."""
    log = folder / "bindings"
    ended = python("-c", code, **variables, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=log)
    assert ended.returncode == 0, ended.stderr
    text = "".join(path.read_text() for path in folder.glob("bindings.*"))
    pattern = r"/libmlx\.so \[0\] to (\S+) \[0\]: normal symbol `cblas_sgemm'"
    (library,) = set(re.findall(pattern, text))
    return Path(library).name


def has_fortran() -> bool:
    """Whether this machine has a libgfortran.so.5 of its own."""
    return python("-c", "import ctypes; ctypes.CDLL('libgfortran.so.5')").returncode == 0


needs_wheel = pytest.mark.skipif(
    sys.platform != "linux" or WHEEL is None, reason="needs cmeel-openblas on Linux"
)
needs_copy = pytest.mark.skipif(
    sys.platform != "linux" or WHEEL is None or has_fortran(),
    reason="needs cmeel-openblas on a Linux without libgfortran.so.5",
)


# --- MLX computes with it --------------------------------------------------------------------


@needs_wheel
def test_mlx_calls_openblas_after_import_mlx_simpo(tmp_path: Path) -> None:
    code = f"import mlx_simpo, mlx.core as mx; {PRODUCT}"
    assert bound_library(code, tmp_path) == "libopenblas.so.0"


@needs_wheel
def test_the_tests_themselves_run_with_openblas() -> None:
    """tests/conftest.py imports mlx_simpo before anything imports MLX."""
    assert blas.is_loaded()
    assert blas.missing() is None


@needs_wheel
def test_mlx_that_was_imported_first_keeps_its_own_blas(tmp_path: Path) -> None:
    code = f"import mlx.core as mx, mlx_simpo; {PRODUCT}"
    assert bound_library(code, tmp_path).startswith("libblas")
    ended = python("-c", f"import mlx.core, mlx_simpo; {MISSING}")
    assert ended.stdout == "MLX was imported before mlx_simpo; import mlx_simpo first\n"
    warning = "RuntimeWarning: MLX was imported before mlx_simpo and keeps its slow BLAS; import"
    assert ended.stderr.count(warning) == 1
    assert ended.stderr.startswith("<string>:1: ")  # the line of the user's own import


@needs_wheel
def test_the_import_does_not_fail_where_warnings_are_errors() -> None:
    ended = python("-W", "error", "-c", f"import mlx.core, mlx_simpo; {MISSING}")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "import mlx_simpo first" in ended.stdout


# --- the copy of libgfortran -----------------------------------------------------------------


def cached_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


@needs_copy
def test_the_fortran_library_is_copied_once(tmp_path: Path) -> None:
    assert python("-c", MISSING, MLX_SIMPO_CACHE=tmp_path).stdout == "None\n"
    names = [path.name for path in cached_files(tmp_path)]
    assert names[0] == "libgfortran.so.5"
    assert all(name.startswith("libquadmath") for name in names[1:])
    first = [path.stat() for path in cached_files(tmp_path)]
    assert python("-c", MISSING, MLX_SIMPO_CACHE=tmp_path).stdout == "None\n"
    second = [path.stat() for path in cached_files(tmp_path)]
    assert [(s.st_ino, s.st_mtime_ns) for s in first] == [(s.st_ino, s.st_mtime_ns) for s in second]


@needs_copy
def test_a_truncated_copy_is_replaced(tmp_path: Path) -> None:
    python("-c", MISSING, MLX_SIMPO_CACHE=tmp_path)
    copy = next(path for path in cached_files(tmp_path) if path.name == "libgfortran.so.5")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:1000])
    assert python("-c", MISSING, MLX_SIMPO_CACHE=tmp_path).stdout == "None\n"
    assert copy.read_bytes() == whole


@needs_copy
def test_processes_that_start_at_once_all_load_it(tmp_path: Path) -> None:
    variables = ENVIRONMENT | {"MLX_SIMPO_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MISSING], env=variables, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    assert [process.communicate()[0] for process in processes] == ["None\n"] * 8
    assert all(path.name.startswith("lib") for path in cached_files(tmp_path))


@needs_copy
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"MLX_SIMPO_CACHE": "/proc/version/cache"}, "Not a directory: '/proc/version/cache"),
        ({"MLX_SIMPO_CACHE": "", "XDG_CACHE_HOME": "/dev/null"}, "Not a directory: '/dev/null/"),
    ],
)
def test_a_cache_that_cannot_be_written(variables: dict[str, str], reason: str) -> None:
    ended = python("-c", MISSING, **variables)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert reason in ended.stdout


# --- where it cannot be loaded, or need not be ------------------------------------------------


@pytest.fixture
def linux(monkeypatch: Patch) -> None:
    """A Linux CPU on which nothing is installed, nothing is loaded, and MLX not yet imported."""
    monkeypatch.setattr(blas.sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.setattr(blas.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(blas, "is_loaded", lambda: False)
    monkeypatch.setattr(blas, "_installed", lambda path: None)
    monkeypatch.setattr(blas, "_library", None)
    monkeypatch.setattr(blas, "_problem", None)
    monkeypatch.setattr(ctypes, "CDLL", no_library)


def no_library(name: str, mode: int = 0) -> None:
    raise OSError(f"{name}: cannot open shared object file:\nNo such file or directory")


@pytest.mark.usefixtures("linux")
def test_where_it_is_not_installed_the_reason_has_the_remedy() -> None:
    blas.load()
    assert blas.library() is None
    assert blas.missing() == "it is not installed; pip install cmeel-openblas"


@pytest.mark.usefixtures("linux")
def test_the_systems_openblas_is_used_where_the_wheel_is_not_installed(
    monkeypatch: Patch, capsys: Capture
) -> None:
    opened: list[tuple[str, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: opened.append((name, mode)))
    blas.load()
    assert opened == [("libopenblas.so.0", ctypes.RTLD_GLOBAL)]
    assert (blas.library(), blas.missing()) == (("libopenblas.so.0", None), None)
    main()
    assert capsys.readouterr().out == "LD_PRELOAD=libopenblas.so.0\n"


@pytest.mark.usefixtures("linux")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("libm.so.6: version `GLIBC_9'\nnot found", "libm.so.6: version `GLIBC_9' not found"),
        (
            "libgfortran.so.5: cannot open",
            "it needs libgfortran.so.5, which is not on this machine",
        ),
    ],
)
def test_a_wheel_that_cannot_be_loaded(error: str, reason: str, monkeypatch: Patch) -> None:
    def failing(name: str, mode: int = 0) -> None:
        raise OSError(error)

    wheel = {blas._WHEEL: Path("/w/libopenblas.so.0")}
    monkeypatch.setattr(blas, "_installed", wheel.get)
    monkeypatch.setattr(ctypes, "CDLL", failing)
    blas.load()
    assert (blas.library(), blas.missing()) == (None, reason)


@pytest.mark.usefixtures("linux")
def test_a_user_without_a_home_folder(monkeypatch: Patch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(blas, "_open", lambda mode: homeless())
    blas.load()
    assert blas.missing() == "Could not determine home directory."


@pytest.mark.usefixtures("linux")
@pytest.mark.parametrize("reason", ["a Mac", "CUDA", "it is loaded already"])
def test_where_it_is_not_needed_nothing_is_opened(reason: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: pytest.fail(f"{name} was opened"))
    if reason == "a Mac":
        monkeypatch.setattr(blas.sys, "platform", "darwin")
    elif reason == "CUDA":
        find_spec = {"mlx_cuda": "installed"}.get
        monkeypatch.setattr(blas.importlib.util, "find_spec", find_spec)
    else:
        monkeypatch.setattr(blas, "is_loaded", lambda: True)
    blas.load()
    assert (blas.library(), blas.missing()) == (None, None)


# --- for other programs ----------------------------------------------------------------------


@needs_wheel
def test_the_printed_variables_load_it_into_another_program(tmp_path: Path) -> None:
    printed = python("-m", "mlx_simpo.blas")
    assert (printed.returncode, printed.stderr) == (0, f"mlx-simpo: OpenBLAS from {WHEEL}\n")
    variables = dict(word.split("=", 1) for word in printed.stdout.split())
    code = f"import mlx.core as mx; {PRODUCT}"
    assert bound_library(code, tmp_path, **variables) == "libopenblas.so.0"
    again = python("-m", "mlx_simpo.blas", **variables)
    assert (again.stdout, again.stderr) == ("\n", "mlx-simpo: OpenBLAS is loaded already\n")


@pytest.mark.usefixtures("linux")
@pytest.mark.parametrize(
    ("platform", "problem", "reason"),
    [
        ("linux", "it is not installed", "no OpenBLAS, MLX will be up to 80 times slower: it is"),
        ("linux", None, "OpenBLAS is loaded already"),
        ("darwin", None, "needs none: MLX uses the system's own BLAS"),
    ],
)
def test_without_variables_the_reason_is_told(
    platform: str, problem: str | None, reason: str, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(blas, "_problem", problem)
    main()
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert reason in captured.err


@pytest.mark.usefixtures("linux")
def test_what_the_variables_hold_already_stays(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(blas, "_library", blas.Library("/w/libopenblas.so.0", Path("/cache")))
    monkeypatch.setenv("LD_PRELOAD", "libmine.so")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    main()
    variables = "LD_PRELOAD=/w/libopenblas.so.0:libmine.so LD_LIBRARY_PATH=/cache:/mine\n"
    assert capsys.readouterr() == (variables, "mlx-simpo: OpenBLAS from /w/libopenblas.so.0\n")


@pytest.mark.usefixtures("linux")
@pytest.mark.parametrize(
    "library", [("/my venv/libopenblas.so.0", None), ("/w/libopenblas.so.0", Path("/a:b"))]
)
def test_a_path_that_ld_preload_cannot_hold(
    library: tuple, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(blas, "_library", blas.Library(*library))
    main()
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert "has a space or colon in it, which LD_PRELOAD cannot hold" in captured.err
