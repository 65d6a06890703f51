"""What a disk does not allow is noticed and named before any work is done."""

import errno
import os
import re
import shutil
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import faults
from helpers.faults import Forks
from helpers.memory import memory_folder

from mlx_simpo.errors import SimPOError
from mlx_simpo.runs.disk import check_space, check_writable, free_bytes

NOBODY = 65534
CHECK = "from pathlib import Path\nfrom mlx_simpo.runs.disk import check_writable"
Usage = namedtuple("Usage", ["total", "used", "free"])


def everything(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@contextmanager
def not_root() -> Iterator[None]:
    """Give up the rights of root, which may write everywhere."""
    user = os.geteuid()
    if not user:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


# --- writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".", "new", "new/deeper/run", "existing", "existing/run"])
def test_a_folder_that_can_be_created_passes_and_nothing_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / "existing").mkdir()
    (tmp_path / "existing" / "mine").touch()
    before = everything(tmp_path)
    check_writable(tmp_path / name)
    assert everything(tmp_path) == before


def test_a_relative_folder_is_checked_where_the_process_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable(Path("runs/first"))
    (tmp_path / "runs").touch()
    with pytest.raises(
        SimPOError, match=f"runs/first cannot be a folder: {tmp_path}/runs is a fil"
    ):
        check_writable(Path("runs/first"))


@pytest.mark.parametrize("name", ["file", "file/run", "file/deeper/run"])
def test_a_file_on_the_way_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SimPOError) as error:
        check_writable(tmp_path / name)
    assert str(error.value) == (
        f"{tmp_path / name} cannot be a folder: {tmp_path / 'file'} is a file; name another folder"
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_link_to_nowhere_is_named(target: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(SimPOError, match=f"{tmp_path}/link is a link to nowhere; name another"):
        check_writable(tmp_path / "link" / "run")


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    check_writable(tmp_path / "link" / "run")
    assert everything(tmp_path / "folder") == []


@pytest.mark.parametrize(("name", "tried"), [("", ""), ("run/first", r" \(tried in {folder}\)")])
def test_a_folder_of_somebody_else_is_named(name: str, tried: str) -> None:
    with memory_folder() as folder:
        folder.chmod(0o555)
        with not_root(), pytest.raises(SimPOError) as error:
            check_writable(folder / name)
        folder.chmod(0o755)
    tried = tried.format(folder=folder)
    expected = (
        f"cannot write to {folder / name}{tried}: Permission denied; name a folder of your own, "
        "or change the permissions"
    )
    assert re.fullmatch(expected, str(error.value))


@pytest.mark.skipif(faults.missing() is not None, reason=faults.missing() or "")
@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EROFS, "the disk is mounted read-only: name a folder on another one"),
        (errno.ENOSPC, "delete what you no longer need, or name a folder on another disk"),
        (errno.EDQUOT, "delete what you no longer need, or name a folder on another disk"),
        (errno.EIO, "name a folder on another disk"),
        (errno.EPERM, "name a folder of your own, or change the permissions"),
    ],
)
def test_what_the_disk_says_is_named_with_a_remedy(code: int, remedy: str, tmp_path: Path) -> None:
    """The folder is created and a file written, and the disk rejects one of the two."""
    check = f"check_writable(Path({str(tmp_path)!r}))"
    with Forks(CHECK) as forks:
        operations = [operation.name for operation in forks.run(check, tmp_path).operations]
        assert operations[:3] == ["mkdir", "open", "write"]
        for number in (1, 2, 3):
            ended = forks.run(check, tmp_path, full_at=number, error=code)
            message = f"SimPOError: cannot write to {tmp_path}: {os.strerror(code)}; {remedy}"
            assert ended.err.splitlines()[-1].endswith(message), ended.err
            assert everything(tmp_path) == []


# --- space ------------------------------------------------------------------------------------


def test_the_free_space_is_that_of_the_nearest_parent(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert free_bytes(tmp_path / "new" / "run") == pytest.approx(free, rel=0.1)
    (tmp_path / "file").touch()
    assert free_bytes(tmp_path / "file") == pytest.approx(free, rel=0.1)


@pytest.mark.parametrize(
    ("needed", "free", "expected"),
    [
        (2_500_000_000, 1_234_567_890, "needs 2.50 GB, and the disk of {} has 1.23 GB left; "),
        (1_000_000_000, 12_340_000, "needs 1.00 GB, and the disk of {} has 12.3 MB left; "),
        (900_000, 0, "needs 0.9 MB, and the disk of {} has 0.0 MB left; "),
    ],
)
def test_too_little_space_is_named(
    needed: int, free: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))
    with pytest.raises(SimPOError) as error:
        check_space(tmp_path / "run", needed, "the checkpoint of step 3")
    assert str(error.value) == (
        f"the checkpoint of step 3 {expected.format(tmp_path / 'run')}"
        "delete what you no longer need, or name a folder on another disk"
    )
    check_space(tmp_path / "run", free, "it")


def test_a_file_system_without_a_size_has_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert free_bytes(tmp_path) == sys.maxsize
    check_space(tmp_path, 10**18, "anything")


def test_a_file_system_that_cannot_be_asked_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_usage(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(SimPOError, match=f"how much space is left for {tmp_path}: .*Input/output"):
        check_space(tmp_path, 1, "anything")
