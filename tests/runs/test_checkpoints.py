"""Checkpoints: whole or not there, whenever the process is killed or the disk is full."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import faults
from helpers.faults import KILLED, Ended, Forks, Operation, cut_power
from helpers.memory import memory_folder

from mlx_simpo.errors import SimPOError
from mlx_simpo.runs import checkpoints
from mlx_simpo.runs.checkpoints import (
    delete_old,
    list_checkpoints,
    newest_valid,
    save_checkpoint,
)

needs_faults = pytest.mark.skipif(faults.missing() is not None, reason=faults.missing() or "")


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process lives on and needs no syncs; those of `Forks` are counted and not executed."""
    monkeypatch.setattr(checkpoints, "sync", lambda path: None)


# A checkpoint as the trainer writes it: arrays by MLX, text, a folder, and a link to a file of the
# run. Its content says of which save it is.
SETUP = """
import os
from pathlib import Path
import mlx_simpo
import mlx.core as mx
from mlx_simpo.files import save_safetensors
from mlx_simpo.runs.checkpoints import delete_old, save_checkpoint

def writer(root, mark):
    def write(folder):
        save_safetensors(folder / "state.safetensors", {"a": mx.full((40,), mark)}, "mlx")
        (folder / "progress.json").write_text(f'{{"mark": {mark}}}')
        (folder / "best").mkdir()
        os.link(root.parent / "best.txt", folder / "best" / "best.txt")
    return write

def save(root, step, mark=None):
    return save_checkpoint(root, step, writer(root, step if mark is None else mark))
"""


def new_root(folder: Path) -> Path:
    """Return the folder for the checkpoints of a run that has what SETUP links to."""
    folder.mkdir(exist_ok=True)
    (folder / "best.txt").write_text("best")
    return folder / "checkpoints"


def save(root: Path, step: int, mark: int | None = None) -> Path:
    """Save a checkpoint as SETUP does, in this process."""
    names: dict[str, object] = {}
    exec(SETUP, names)
    function = names["save"]
    assert callable(function)
    path = function(root, step, mark)
    assert isinstance(path, Path)
    return path


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def mark_of(checkpoint: Path | None) -> str:
    """Return what a whole checkpoint's content says of which save it is."""
    assert checkpoint is not None
    return (checkpoint / "progress.json").read_text("utf-8")


# --- saving, listing, deleting ----------------------------------------------------------------


def test_a_checkpoint_has_what_was_written_and_a_manifest(tmp_path: Path) -> None:
    root = new_root(tmp_path / "run")
    path = save(root, 120)
    assert path == root / "step-000120"
    files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    assert files == ["best/best.txt", "manifest.json", "progress.json", "state.safetensors"]
    assert names(root) == ["step-000120"]
    assert newest_valid(root) == (path, [])


def test_checkpoints_are_listed_newest_first_by_number(tmp_path: Path) -> None:
    root = new_root(tmp_path)
    for step in (999_999, 5, 1_000_000, 40):
        save(root, step)
    for other in ("step-12", "step-0000012.bak", ".saving-00", "notes"):
        (root / other).mkdir()
    expected = ["step-1000000", "step-999999", "step-000040", "step-000005"]
    assert [path.name for path in list_checkpoints(root)] == expected


def test_without_a_folder_there_are_no_checkpoints(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []
    assert newest_valid(tmp_path / "none") == (None, [])
    delete_old(tmp_path / "none", 1)


def test_a_file_instead_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SimPOError, match=f"cannot read the checkpoints in {tmp_path}/file: "):
        newest_valid(tmp_path / "file")
    with pytest.raises(OSError, match="File exists"):
        save_checkpoint(tmp_path / "file", 1, lambda folder: None)


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("bug"), KeyboardInterrupt()])
def test_an_exception_while_writing_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    root = new_root(tmp_path)
    save(root, 1)

    def write(folder: Path) -> None:
        (folder / "half").touch()
        raise error

    for step in (1, 2):
        with pytest.raises(type(error)):
            save_checkpoint(root, step, write)
    assert names(root) == ["step-000001"]
    assert newest_valid(root) == (root / "step-000001", [])


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    root = new_root(tmp_path)
    save(root, 1)
    (root / "step-000001" / "old").touch()
    save(root, 1, mark=2)
    assert names(root) == ["step-000001"]
    assert "2" in mark_of(newest_valid(root)[0])


def test_what_is_in_the_way_of_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    root = new_root(tmp_path)
    save(root, 1)
    (root / "step-000002").write_text("a file")
    (root / "step-000003").symlink_to(root / "step-000001")
    (root / "step-000003-replaced").symlink_to("nowhere")
    for step in (2, 3):
        save(root, step)
        assert newest_valid(root)[0] == root / f"step-{step:06d}"
    assert names(root) == ["step-000001", "step-000002", "step-000003"]


def test_links_that_a_checkpoint_is_made_of_are_an_error(tmp_path: Path) -> None:
    root = new_root(tmp_path)
    with pytest.raises(SimPOError, match="'link' is not a regular file"):
        save_checkpoint(root, 1, lambda folder: (folder / "link").symlink_to(tmp_path))
    assert names(root) == []


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_newest_ones_stay(keep: int, tmp_path: Path) -> None:
    root = new_root(tmp_path)
    for step in range(1, 6):
        save(root, step)
    delete_old(root, keep)
    assert names(root) == [f"step-{step:06d}" for step in range(1, 6)][-keep:]


def test_remains_of_dead_runs_are_deleted(tmp_path: Path) -> None:
    root = new_root(tmp_path)
    save(root, 1)
    (root / ".saving-1234" / "best").mkdir(parents=True)
    (root / ".deleting-5678").mkdir()
    (root / ".deleting-5678" / "x").touch()
    (root / ".deleting-file").touch()
    (root / "mine").mkdir()
    delete_old(root, 1)
    assert names(root) == ["mine", "step-000001"]


def test_damaged_ones_do_not_count_among_those_that_stay(tmp_path: Path) -> None:
    root = new_root(tmp_path)
    for step in range(1, 6):
        save(root, step)
    for step in (4, 5):
        (root / f"step-{step:06d}" / "progress.json").unlink()
    delete_old(root, 2)
    assert names(root) == ["step-000002", "step-000003"]


def test_if_none_is_whole_all_stay(tmp_path: Path) -> None:
    root = new_root(tmp_path)
    for step in (1, 2, 3):
        (save(root, step) / "progress.json").unlink()
    delete_old(root, 1)
    assert len(names(root)) == 3


def test_what_cannot_be_deleted_is_no_checkpoint_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_root(tmp_path)
    for step in (1, 2):
        save(root, step)

    def rmtree(path: Path, ignore_errors: bool) -> None:
        assert ignore_errors
        (path / "progress.json").unlink()  # and then, no more

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", rmtree)
        delete_old(root, 1)
    assert [path.name for path in list_checkpoints(root)] == ["step-000002"]
    assert len(names(root)) == 2
    delete_old(root, 1)
    assert names(root) == ["step-000002"]


# --- damaged ones are passed over -------------------------------------------------------------


def test_the_newest_whole_one_is_used_and_the_others_are_named(tmp_path: Path) -> None:
    root = new_root(tmp_path)
    for step in (1, 2, 3, 4):
        save(root, step)
    (root / "step-000004" / "best" / "best.txt").unlink()
    with (root / "step-000003" / "state.safetensors").open("ab") as file:
        file.write(b"x")
    path, messages = newest_valid(root)
    assert path == root / "step-000002"
    assert [message.partition(": ")[0] for message in messages] == [
        f"the checkpoint {root}/step-000004 is damaged",
        f"the checkpoint {root}/step-000003 is damaged",
    ]
    assert "'best/best.txt' is missing; go on from another one" in messages[0]


def test_one_that_was_being_replaced_counts_after_its_successor(tmp_path: Path) -> None:
    root = new_root(tmp_path)
    for step in (1, 2):
        save(root, step)
    (root / "step-000002").rename(root / "step-000002-replaced")
    assert newest_valid(root)[0] == root / "step-000002-replaced"
    shutil.copytree(root / "step-000002-replaced", root / "step-000002")
    assert newest_valid(root)[0] == root / "step-000002"
    (root / "step-000002" / "progress.json").write_text("")
    path, messages = newest_valid(root)
    assert path == root / "step-000002-replaced"
    assert len(messages) == 1
    save(root, 2)
    assert names(root) == ["step-000001", "step-000002"]


def test_a_replaced_one_does_not_take_the_room_of_an_older_one(tmp_path: Path) -> None:
    root = new_root(tmp_path)
    for step in (1, 2):
        save(root, step)
    shutil.copytree(root / "step-000002", root / "step-000002-replaced")
    delete_old(root, 2)
    assert names(root) == ["step-000001", "step-000002"]


# --- killed, or without space, at every operation ---------------------------------------------

SCENES = {
    # What is there before, and what the process does.
    "new steps": ([1], "save(root, 2); save(root, 3)"),
    "first one": ([], "save(root, 1)"),
    "the same step": ([1], "save(root, 1, mark=2)"),
    "deleting": ([1, 2, 3], "save(root, 4); delete_old(root, 1)"),
}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks(SETUP) as value:
        yield value


@pytest.fixture
def run() -> Iterator[Path]:
    """The path of a run's folder, which does not exist."""
    with memory_folder() as folder:
        yield folder / "run"


def prepare(scene: str, run: Path) -> str:
    """Make a new run folder with the checkpoints of a scene; return the code of the process."""
    shutil.rmtree(run, ignore_errors=True)
    root = new_root(run)
    steps, code = SCENES[scene]
    for step in steps:
        save(root, step)
    return f"root = Path({str(root)!r}); {code}"


def check_and_go_on(scene: str, run: Path, ended: Ended) -> None:
    """Check that the newest checkpoint is whole and not older than before, and save another."""
    root = run / "checkpoints"
    before = SCENES[scene][0]
    path, messages = newest_valid(root)
    assert messages == [], ended
    assert path is not None or not before, ended
    if path is not None:
        assert max(before, default=0) <= int(path.name.split("-")[1]) <= 4
        assert sorted(p.name for p in path.iterdir()) == [
            *("best", "manifest.json", "progress.json", "state.safetensors"),
        ]
    assert newest_valid(save(root, 9).parent) == (root / "step-000009", [])
    delete_old(root, 1)
    assert names(root) == ["step-000009"]
    assert names(run) == ["best.txt", "checkpoints"]


def count(forks: Forks, scene: str, run: Path) -> list[Operation]:
    ended = forks.run(prepare(scene, run), run)
    assert ended.status == 0, ended.err
    assert {operation.name for operation in ended.operations} >= {"open", "write", "sync", "rename"}
    return ended.operations


@needs_faults
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("scene", SCENES)
def test_a_kill_at_any_operation_leaves_the_newest_checkpoint_whole(
    scene: str, torn: bool, forks: Forks, run: Path
) -> None:
    for number, operation in enumerate(count(forks, scene, run), 1):
        if torn and operation.name != "write":
            continue
        ended = forks.run(prepare(scene, run), run, kill_at=number, torn=torn)
        assert (ended.status, len(ended.operations)) == (KILLED, number), ended.err
        check_and_go_on(scene, run, ended)


@needs_faults
@pytest.mark.parametrize("scene", SCENES)
def test_a_power_cut_at_any_operation_leaves_the_newest_checkpoint_whole(
    scene: str, forks: Forks, run: Path
) -> None:
    for number in range(1, len(count(forks, scene, run)) + 1):
        ended = forks.run(prepare(scene, run), run, kill_at=number)
        cut_power(run, ended.operations[:-1])
        check_and_go_on(scene, run, ended)


@needs_faults
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("scene", SCENES)
def test_a_full_disk_at_any_operation_is_an_os_error(
    scene: str, torn: bool, forks: Forks, run: Path
) -> None:
    never_fails = {"unlink", "rmdir"}
    for number, operation in enumerate(count(forks, scene, run), 1):
        if operation.name in never_fails or (torn and operation.name != "write"):
            continue
        ended = forks.run(prepare(scene, run), run, full_at=number, torn=torn)
        assert ended.status == 1, (number, operation, ended)
        assert ended.err.splitlines()[-1].startswith("OSError: "), ended.err
        root = run / "checkpoints"
        assert not root.exists() or not any(n.startswith(".saving") for n in names(root))
        check_and_go_on(scene, run, ended)


@needs_faults
def test_what_is_saved_is_on_the_disk_when_the_call_returns(forks: Forks, run: Path) -> None:
    """Every file and folder is synced before the rename, and the folder of the name after it."""
    operations = count(forks, "first one", run)
    at = {(operation.name, operation.path): n for n, operation in enumerate(operations)}
    rename = at["rename", "checkpoints/step-000001"]
    (saving,) = {o.path.split("/")[1] for o in operations if "/.saving" in o.path}
    for name in ("", "/state.safetensors", "/progress.json", "/manifest.json", "/best"):
        assert at["sync", f"checkpoints/{saving}{name}"] < rename, name
    assert at["sync", "checkpoints"] > rename
    assert at["sync", "."] > at["mkdir", "checkpoints"]


def test_a_limit_on_the_size_of_files_is_an_os_error(tmp_path: Path) -> None:
    """The system's own refusal, in the middle of MLX's write."""
    root = new_root(tmp_path)
    save(root, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match=r"write"):
            save(root, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(root) == ["step-000001"]
    assert newest_valid(root) == (root / "step-000001", [])
    assert os.path.getsize(root / "step-000001" / "state.safetensors") > 200


FULL_DISK = """
from pathlib import Path
from mlx_simpo.runs.checkpoints import newest_valid
from mlx_simpo.runs.disk import free_bytes
disk = Path(os.environ["DISK"])
root = disk / "run" / "checkpoints"
root.parent.mkdir()
(disk / "run" / "best.txt").write_text("best")
save(root, 1)
results = []
for blocks in range(12):
    (disk / "filling").write_bytes(bytes(free_bytes(disk) - 4096 * blocks))
    for step in (1, 2):
        try:
            save(root, step)
        except OSError:
            path, damaged = newest_valid(root)
            assert (path, damaged) == (root / "step-000001", []), blocks
            assert [p.name for p in root.iterdir()] == ["step-000001"], blocks
            results.append("full")
        else:
            results.append("saved")
    (disk / "filling").unlink()
    if newest_valid(root)[0].name == "step-000002":
        break
print(*results)
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, of Linux")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a file system of 256 KB, with 0, 1, 2, … of its blocks of 4 KB free."""
    mount = 'mount -t tmpfs -o size=256k tmpfs "$DISK" && echo mounted && exec "$@"'
    process = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", SETUP + FULL_DISK],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "DISK": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if not process.stdout.startswith("mounted"):
        pytest.skip(f"this user cannot mount a file system: {process.stderr.strip()}")
    assert process.returncode == 0, process.stderr
    results = process.stdout.split()[1:]
    assert results[:4] == ["full"] * 4
    assert results[-1] == "saved"
    assert results.count("full") >= 6
