"""The faults are injected where they are said to be: every operation is seen, nobody else's is."""

import errno
import os
import sys
from pathlib import Path

import pytest
from helpers import faults
from helpers.faults import KILLED, Forks, Operation, cut_power, run_with_fault

pytestmark = pytest.mark.skipif(faults.missing() is not None, reason=faults.missing() or "")

# Each line is one or more operations, in the ways that Python and MLX write files.
PROGRAM = """
import mlx_simpo, os, shutil, subprocess, sys
import mlx.core as mx
from pathlib import Path
folder = Path(sys.argv[1])
mx.save_safetensors(str(folder / "a.safetensors"), {"x": mx.ones((10,))})
(folder / "b").write_text("text")
with open(folder / "b", "a") as file: file.write("more"); file.flush(); os.fsync(file.fileno())
with open(folder / "b", "r+b") as file: file.truncate(2)
shutil.copyfile(folder / "b", folder / "c")
os.link(folder / "b", folder / "d"); os.symlink("b", folder / "e")
os.rename(folder / "d", folder / "f"); os.replace(folder / "e", folder / "f")
os.mkdir(folder / "g"); os.makedirs(folder / "g" / "h")
shutil.rmtree(folder / "g")
os.unlink(folder / "f")
descriptor = os.open(folder / "i", os.O_WRONLY | os.O_CREAT)
os.pwrite(descriptor, b"12", 5); os.writev(descriptor, [b"3", b"4"]); os.fdatasync(descriptor)
(folder / "b").read_text(); os.listdir(folder)
subprocess.run([sys.executable, "-c", "open(__import__('sys').argv[1], 'w')", folder / "child"])
if not os.fork(): open(folder / "fork", "w"); os._exit(0)
os.wait()
open(folder.parent / "outside", "w")
os.chdir(folder); open("j", "w")
"""
OPERATIONS = """open a.safetensors, write a.safetensors, write a.safetensors, write a.safetensors
open b, write b
open b, write b, sync b
open b, truncate b
open c, write c, write c
link d, link e
rename f, rename f
mkdir g, mkdir g/h
rmdir g/h, rmdir g
unlink f
open i, write i, write i, sync i
open j"""


def listed(operations: list[Operation]) -> list[str]:
    return [f"{operation.name} {operation.path}" for operation in operations]


def test_every_operation_of_the_process_in_the_folder_is_seen(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for folder in (tmp_path / "folder", tmp_path / "link"):
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder)]
        ended = run_with_fault(command, tmp_path / "folder")
        assert (ended.status, ended.err) == (0, "")
        # rmtree removes folders with unlinkat.
        seen = [line.replace("unlink g", "rmdir g") for line in listed(ended.operations)]
        assert seen == OPERATIONS.replace("\n", ", ").split(", ")
        assert all(
            bool(operation.inode) == (operation.name in ("write", "truncate", "sync"))
            for operation in ended.operations
        )


def test_a_process_is_killed_before_the_operation_or_in_the_middle_of_a_write(
    tmp_path: Path,
) -> None:
    code = f"open({str(tmp_path / 'x')!r}, 'w').write('0123456789')"
    for number, torn, content in [(1, 0, None), (2, 0, ""), (1, 1, None), (2, 1, "01234")]:
        (tmp_path / "x").unlink(missing_ok=True)
        ended = run_with_fault(code, tmp_path, kill_at=number, torn=torn)
        assert (ended.status, len(ended.operations)) == (KILLED, number)
        written = (tmp_path / "x").read_text() if (tmp_path / "x").exists() else None
        assert written == content


ATTEMPTS = """
import errno, os
def attempt(function, *arguments):
    try:
        print(function(*arguments) or "ok", end=" ")
    except OSError as error:
        print(errno.errorcode[error.errno], end=" ")
os.chdir(folder)
file = os.open("file", os.O_RDWR | os.O_CREAT)
for _ in range(2):
    attempt(os.write, file, b"1234")
attempt(os.mkdir, "a")
attempt(lambda: open("new", "w").close())
attempt(lambda: open("file", "r+").close())
attempt(os.fsync, file)
attempt(os.rename, "file", "b")
attempt(os.write, file, b"12")
attempt(os.unlink, "b")
"""


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({}, "4 4 ok ok ok ok ok 2 ok"),
        # What needs no space works, but for the operation itself, which fails anyway.
        ({"full_at": 2}, "ENOSPC ENOSPC ENOSPC ENOSPC ok ok ok ENOSPC ok"),
        ({"full_at": 3, "torn": 1}, "4 2 ENOSPC ENOSPC ok ok ok ENOSPC ok"),
        ({"full_at": 3, "full_until": 5}, "4 ENOSPC ENOSPC ok ok ok ok 2 ok"),
        ({"full_at": 4, "error": errno.EDQUOT}, "4 4 EDQUOT EDQUOT ok ok ok EDQUOT ok"),
        ({"full_at": 6, "error": errno.EIO}, "4 4 ok ok ok ok ok EIO ok"),
        ({"full_at": 7, "error": errno.EIO}, "4 4 ok ok ok EIO ok EIO ok"),
        ({"full_at": 8, "error": errno.EIO}, "4 4 ok ok ok ok EIO EIO ENOENT"),
        ({"full_at": 10}, "4 4 ok ok ok ok ok 2 ok"),
    ],
    ids=str,
)
def test_the_disk_is_full_from_an_operation_on(
    fault: dict[str, int], expected: str, tmp_path: Path
) -> None:
    ended = run_with_fault(f"folder = {str(tmp_path)!r}\n{ATTEMPTS}", tmp_path, env=None, **fault)
    assert (ended.out.strip(), ended.err) == (expected, "")


def test_a_power_cut_empties_what_was_not_synced(tmp_path: Path) -> None:
    code = f"""
import os
os.chdir({str(tmp_path)!r})
for name in ("synced", "unsynced", "synced and changed"):
    with open(name, "w") as file:
        file.write("text"); file.flush()
        if name != "unsynced":
            os.fsync(file.fileno())
        if name == "synced and changed":
            file.write("more")
os.rename("unsynced", "renamed")
"""
    (tmp_path / "other").write_text("text")
    cut_power(tmp_path, run_with_fault(code, tmp_path).operations)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {"other": 4, "synced": 4, "synced and changed": 0, "renamed": 0}


def test_forks_share_the_setup_and_nothing_else(tmp_path: Path) -> None:
    with Forks("import mlx_simpo\nimport mlx.core as mx\nvalues = [1]") as forks:
        for _ in range(2):
            ended = forks.run("values.append(2); print(values, mx.ones(2).sum().item())", tmp_path)
            assert (ended.status, ended.out, ended.err) == (0, "[1, 2] 2.0\n", "")
        ended = forks.run("raise ValueError('wrong')", tmp_path)
        assert ended.status == 1
        assert ended.err.endswith("ValueError: wrong\n")
        assert forks.run("import os; os.abort()", tmp_path).status == -6


def test_arguments_and_environment_reach_a_command(tmp_path: Path) -> None:
    command = ["sh", "-c", 'echo "$VALUE"; exit 3']
    ended = run_with_fault(command, tmp_path, env={"VALUE": "x"})
    assert ended == (3, "x\n", "", [])
    assert "FAULTS_FOLDER" not in os.environ
