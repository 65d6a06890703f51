"""Output folders that appear complete or not at all."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_simpo.convert import staging
from mlx_simpo.convert.staging import current_umask, staged
from mlx_simpo.errors import SimPOError

NOT_WRITTEN = "it cannot be written"
FAILURES = (ValueError, SimPOError, OSError, MemoryError, KeyboardInterrupt, SystemExit)
OUTPUTS = ("out", "new/out", "a/b/c/out")


def write(folder: Path) -> None:
    """Write a file, and a folder with a file."""
    (folder / "file").write_text("x")
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_bytes(b"y")


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("output", ["out", "new/out", "a/b/c/out", "out.d", ".out", "x" * 200, "é"])
def test_the_output_appears_complete(tmp_path: Path, output: str) -> None:
    path = tmp_path / output
    with staged(path) as folder:
        assert folder.parent == path.parent
        assert not path.exists()
        write(folder)
        assert not path.exists()
    assert everything(path) == [path / "file", path / "inner", path / "inner" / "file"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_relative_output_is_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with staged("out") as folder:
        write(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with staged("~/out") as folder:
        write(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as folder:
        write(folder)
        assert everything(tmp_path / "out") == []
    assert (tmp_path / "out" / "inner" / "file").read_bytes() == b"y"


@pytest.mark.parametrize("error", FAILURES)
def test_a_failure_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    expected = SimPOError if error is OSError else error
    for output in OUTPUTS:
        with pytest.raises(expected), staged(tmp_path / output) as folder:  # noqa: PT012
            write(folder)
            raise error("inside")
        assert everything(tmp_path) == [], output


def test_an_error_of_the_system_is_one_for_the_user(tmp_path: Path) -> None:
    with (
        pytest.raises(SimPOError, match=r"it cannot be written: .*No space left"),
        staged(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("error", FAILURES)
def test_a_failure_leaves_existing_folders_unchanged(
    tmp_path: Path, error: type[BaseException]
) -> None:
    for name in ("out", "beside"):
        (tmp_path / name).mkdir()
    (tmp_path / "beside" / "file").write_text("x")
    before = everything(tmp_path)
    with pytest.raises((error, SimPOError)), staged(tmp_path / "out") as folder:  # noqa: PT012
        write(folder)
        raise error("inside")
    assert everything(tmp_path) == before


def test_a_failure_leaves_existing_parents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="inside"), staged(tmp_path / "a" / "b" / "out"):
        raise ValueError("inside")
    assert everything(tmp_path) == [tmp_path / "a"]


def test_a_failure_leaves_new_parents_that_are_used_by_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), staged(tmp_path / "a/b/out"):  # noqa: PT012
        (tmp_path / "a" / "other").touch()
        raise ValueError("inside")
    assert everything(tmp_path) == [tmp_path / "a", tmp_path / "a" / "other"]


@pytest.mark.parametrize(
    "output", ["full", "full/file", "full/file/x", "full/file/x/y/z", "link", "link/x", "full/.."]
)
def test_an_output_that_exists_or_cannot_be_created_is_rejected(
    tmp_path: Path, output: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "link").symlink_to("/no/such/folder")
    before = everything(tmp_path)
    with pytest.raises(SimPOError, match="output is "), staged(tmp_path / output) as folder:
        write(folder)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("output", ["", "x" * 300, "~nosuchuser/x", "a\0b", "n/a\0b"])
def test_an_output_that_is_not_a_valid_path_is_rejected(
    tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(SimPOError), staged(output) as folder:
            write(folder)
    finally:
        assert everything(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_to_write_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o500)
    with pytest.raises(SimPOError, match=NOT_WRITTEN), staged(tmp_path / "a" / "out"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_a_file_system_that_cannot_be_written_is_rejected() -> None:
    with pytest.raises(SimPOError, match=NOT_WRITTEN), staged("/proc/out"):
        pass


def disk_full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_new_parents_are_removed_if_no_scratch_folder_can_be_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.tempfile, "mkdtemp", disk_full)
    with pytest.raises(SimPOError, match=NOT_WRITTEN), staged(tmp_path / "a/b/out"):
        pass
    assert everything(tmp_path) == []


@pytest.mark.parametrize("function", ["replace", "chmod"])
def test_a_failure_in_the_last_step_leaves_nothing_behind(
    tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.os, function, disk_full)
    for output in OUTPUTS:
        with (
            pytest.raises(SimPOError, match=NOT_WRITTEN),
            staged(tmp_path / output) as folder,
        ):
            write(folder)
        assert everything(tmp_path) == [], output


def test_a_failure_in_the_last_step_leaves_the_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(staging.os, "replace", disk_full)
    with pytest.raises(SimPOError), staged(tmp_path / "out") as folder:
        write(folder)
    assert everything(tmp_path) == [tmp_path / "out"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SimPOError, match=NOT_WRITTEN), staged(out) as folder:  # noqa: PT012
        write(folder)
        out.mkdir()
        (out / "other").write_text("theirs")
    assert everything(tmp_path) == [out, out / "other"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SimPOError, match=NOT_WRITTEN), staged(out) as folder:  # noqa: PT012
        write(folder)
        out.write_text("theirs")
    assert out.read_text() == "theirs"
    assert everything(tmp_path) == [out]


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set the process's umask to the test's parameter."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027], indirect=True)
def test_permissions_are_those_of_any_new_folder(tmp_path: Path, umask: int) -> None:
    with staged(tmp_path / "new" / "out") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "not readable before it is complete"
        write(folder)
    (tmp_path / "ordinary").mkdir()
    modes = [
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "new/out", "ordinary")
    ]
    assert modes == [0o777 & ~umask] * 3
    assert stat.S_IMODE((tmp_path / "new/out/file").stat().st_mode) == 0o666 & ~umask
    assert current_umask() == umask


def test_a_process_that_is_killed_leaves_no_output(tmp_path: Path) -> None:
    """Only the scratch folder stays, whose name cannot be mistaken for the output's."""
    code = (
        "import os, signal; from mlx_simpo.convert.staging import staged\n"
        "with staged('out') as folder:\n"
        "    (folder / 'file').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60)
    assert ran.returncode == -9
    assert not (tmp_path / "out").exists()
    assert all(path.name.startswith(".out-") for path in tmp_path.iterdir())
