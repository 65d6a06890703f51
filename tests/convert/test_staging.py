"""The folder that appears whole or not at all."""

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

REFUSED = "it cannot be written"


def write(folder: Path) -> None:
    """Something of everything that a conversion writes."""
    (folder / "file").write_text("x")
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_bytes(b"y")


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("output", ["out", "new/out", "a/b/c/out", "out.d", ".out", "x" * 200, "é"])
def test_it_appears_whole(tmp_path: Path, output: str) -> None:
    path = tmp_path / output
    with staged(path) as folder:
        assert folder.parent == path.parent
        assert not path.exists()
        write(folder)
        assert not path.exists()
    assert everything(path) == [path / "file", path / "inner", path / "inner" / "file"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_it_is_made_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged("out") as folder:
        write(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_home_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with staged("~/out") as folder:
        write(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as folder:
        write(folder)
        assert everything(tmp_path / "out") == []
    assert (tmp_path / "out" / "inner" / "file").read_bytes() == b"y"


FAILURES = (ValueError, SimPOError, OSError, MemoryError, KeyboardInterrupt, SystemExit)
OUTPUTS = ("out", "new/out", "a/b/c/out")


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_failure_leaves_nothing(tmp_path: Path, output: str, error: type[BaseException]) -> None:
    wanted = SimPOError if error is OSError else error
    with pytest.raises(wanted), staged(tmp_path / output) as folder:  # noqa: PT012
        write(folder)
        raise error("inside")
    assert everything(tmp_path) == []


def test_an_error_of_the_system_is_one_of_the_users(tmp_path: Path) -> None:
    with (
        pytest.raises(SimPOError, match=r"it cannot be written: .*No space left"),
        staged(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("error", FAILURES)
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    for name in ("out", "beside"):
        (tmp_path / name).mkdir()
    (tmp_path / "beside" / "file").write_text("x")
    before = everything(tmp_path)
    with pytest.raises((error, SimPOError)), staged(tmp_path / "out") as folder:  # noqa: PT012
        write(folder)
        raise error("inside")
    assert everything(tmp_path) == before


def test_parents_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="inside"), staged(tmp_path / "a" / "b" / "out"):
        raise ValueError("inside")
    assert everything(tmp_path) == [tmp_path / "a"]


def test_parents_that_others_use_by_now_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), staged(tmp_path / "a/b/out"):  # noqa: PT012
        (tmp_path / "a" / "other").touch()
        raise ValueError("inside")
    assert everything(tmp_path) == [tmp_path / "a", tmp_path / "a" / "other"]


@pytest.mark.parametrize(
    "output", ["full", "full/file", "full/file/x", "full/file/x/y/z", "link", "link/x", "full/.."]
)
def test_outputs_that_are_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "link").symlink_to("/no/such/place")
    before = everything(tmp_path)
    with pytest.raises(SimPOError, match="output is "), staged(tmp_path / output) as folder:
        write(folder)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "output",
    [
        "",
        "x" * 300,
        "~nosuchuser/x",
        "a\0b",
        "n/a\0b",
    ],
)
def test_outputs_that_are_no_names(
    tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(SimPOError), staged(output) as folder:
            write(folder)
    finally:
        assert everything(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o500)
    with pytest.raises(SimPOError, match=REFUSED), staged(tmp_path / "a" / "out"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(SimPOError, match=REFUSED), staged("/proc/out"):
        pass


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_no_parents_are_left_where_no_scratch_folder_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.tempfile, "mkdtemp", full)
    with pytest.raises(SimPOError, match=REFUSED), staged(tmp_path / "a/b/out"):
        pass
    assert everything(tmp_path) == []


@pytest.mark.parametrize("failing", ["replace", "chmod"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_failure_at_the_very_end(
    tmp_path: Path, output: str, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.os, failing, full)
    with (
        pytest.raises(SimPOError, match=REFUSED),
        staged(tmp_path / output) as folder,
    ):
        write(folder)
    assert everything(tmp_path) == []


def test_a_failure_at_the_very_end_leaves_the_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(staging.os, "replace", full)
    with pytest.raises(SimPOError), staged(tmp_path / "out") as folder:
        write(folder)
    assert everything(tmp_path) == [tmp_path / "out"]


def test_what_came_there_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(SimPOError, match=REFUSED), staged(tmp_path / "out") as made:  # noqa: PT012
        write(made)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").write_text("theirs")
    assert everything(tmp_path) == [tmp_path / "out", tmp_path / "out" / "other"]


def test_a_file_that_came_there_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(SimPOError, match=REFUSED), staged(tmp_path / "out") as made:  # noqa: PT012
        write(made)
        (tmp_path / "out").write_text("theirs")
    assert (tmp_path / "out").read_text() == "theirs"
    assert everything(tmp_path) == [tmp_path / "out"]


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027], indirect=True)
def test_permissions_are_those_of_any_new_folder(tmp_path: Path, umask: int) -> None:
    with staged(tmp_path / "new" / "out") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "not to be read before it is whole"
        write(folder)
    (tmp_path / "ordinary").mkdir()
    modes = [
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "new/out", "ordinary")
    ]
    assert modes == [0o777 & ~umask] * 3
    assert stat.S_IMODE((tmp_path / "new/out/file").stat().st_mode) == 0o666 & ~umask
    assert current_umask() == umask


def test_a_process_that_is_ended_leaves_no_output(tmp_path: Path) -> None:
    """Ended the hard way there is no time to tidy up, but what is there cannot be mistaken."""
    code = (
        "import os, signal; from mlx_simpo.convert.staging import staged\n"
        "with staged('out') as folder:\n"
        "    (folder / 'file').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60)
    assert ran.returncode == -9
    assert not (tmp_path / "out").exists()
    assert all(p.name.startswith(".out-") for p in tmp_path.iterdir())
