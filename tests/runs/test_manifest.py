"""Any damage to a checkpoint is noticed before its content is read, and only damage is."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.memory import memory_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.errors import SimPOError
from mlx_simpo.runs.checkpoints import newest_valid
from mlx_simpo.runs.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    contents,
    verify_checkpoint,
    write_manifest,
)

FILES = {
    "state.safetensors": bytes(range(64)),
    "progress.json": b'{"step": 7}\n',
    "best/adapters.safetensors": b"\0" * 40,
    "best/deeper/empty": b"",
}


def new_checkpoint(folder: Path) -> Path:
    """Return a checkpoint of step 7 with FILES."""
    checkpoint = folder / "step-000007"
    for name, content in FILES.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content)
    write_manifest(checkpoint, 7)
    return checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return new_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A checkpoint for tests that change it and change it back."""
    with memory_folder() as folder:
        checkpoint = new_checkpoint(folder)
        yield checkpoint
        verify_checkpoint(checkpoint)


every_file = pytest.mark.parametrize("name", [*FILES, MANIFEST])


def is_damaged(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except DamagedCheckpointError:
        return True
    return False


def signed(**fields: Any) -> bytes:
    """Return a manifest whose own hash is right; what it says may not be."""
    content: dict[str, Any] = {"format": 1, "step": 7, "files": {}, **fields}
    content = {name: value for name, value in content.items() if value is not None}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps(content | {"sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


# --- what is whole ----------------------------------------------------------------------------


def test_a_checkpoint_is_valid_and_its_manifest_says_what_is_in_it(checkpoint: Path) -> None:
    verify_checkpoint(checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    assert manifest.keys() == {"format", "step", "files", "sha256"}
    assert (manifest["format"], manifest["step"]) == (1, 7)
    assert manifest["files"] == {
        name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in FILES.items()
    }
    assert signed(files=manifest["files"]) == (checkpoint / MANIFEST).read_bytes()


def test_contents_are_files_and_folders_from_the_inside_out(checkpoint: Path) -> None:
    files, folders = contents(checkpoint)
    assert {path.relative_to(checkpoint).as_posix() for path in files} == {*FILES, MANIFEST}
    assert folders == [checkpoint / "best" / "deeper", checkpoint / "best", checkpoint]


@pytest.mark.parametrize("name", [".DS_Store", "._state.safetensors", "best/.DS_Store"])
def test_a_look_at_it_in_the_finder_does_not_damage_a_checkpoint(
    name: str, checkpoint: Path
) -> None:
    (checkpoint / name).write_bytes(b"x")
    verify_checkpoint(checkpoint)
    write_manifest_again = json.loads((checkpoint / MANIFEST).read_bytes())
    assert name not in write_manifest_again["files"]


def test_other_times_and_permissions_do_not_damage_a_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "progress.json").chmod(0o600)
    os.utime(checkpoint / "progress.json", (1, 1))
    (checkpoint / "an empty folder").mkdir()
    verify_checkpoint(checkpoint)


# --- damage -----------------------------------------------------------------------------------


@every_file
def test_every_bit_counts(name: str, shared: Path) -> None:
    path = shared / name
    content = path.read_bytes()
    for position in range(8 * len(content)):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        assert is_damaged(shared), f"bit {position}"
    path.write_bytes(content)


@every_file
def test_every_length_counts(name: str, shared: Path) -> None:
    path = shared / name
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert is_damaged(shared), f"length {length}"
    for more in (b"\0", b"\n", b" ", content):
        path.write_bytes(content + (more or b"x"))
        assert is_damaged(shared), f"with {more!r}"
    path.write_bytes(content)


@every_file
def test_a_missing_file_is_named(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(
        DamagedCheckpointError, match=f"^the checkpoint {checkpoint} .*{name}.* is "
    ):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "name", ["extra", "best/extra", ".hidden", "manifest.json2", "best/\udcff"]
)
def test_an_extra_file_is_named(name: str, checkpoint: Path) -> None:
    (checkpoint / name).touch()
    with pytest.raises(DamagedCheckpointError, match=r"extra|hidden|json2|dcff") as error:
        verify_checkpoint(checkpoint)
    assert "does not belong to it; go on from another one" in str(error.value)
    str(error.value).encode()  # can be shown


def test_two_files_that_changed_places_are_noticed(checkpoint: Path) -> None:
    first, second = checkpoint / "state.safetensors", checkpoint / "progress.json"
    first_content, second_content = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_content)
    second.write_bytes(first_content)
    assert is_damaged(checkpoint)


def test_the_messages_name_the_file_and_the_problem(checkpoint: Path) -> None:
    path = checkpoint / "progress.json"
    path.write_bytes(b'{"step": 8}\n')
    with pytest.raises(
        SimPOError, match=r"damaged: the content of 'progress.json' has changed; go"
    ):
        verify_checkpoint(checkpoint)
    path.write_bytes(b"")
    with pytest.raises(SimPOError, match=r"'progress.json' has 0 bytes and must have 12; go on"):
        verify_checkpoint(checkpoint)
    (checkpoint / MANIFEST).write_bytes(b"")
    with pytest.raises(SimPOError, match=r"the content of manifest.json has changed; go on"):
        verify_checkpoint(checkpoint)


LINKS_AND_DEVICES: dict[str, Callable[[Path], Any]] = {
    "link to a file": lambda path: path.symlink_to("progress.json"),
    "link to a folder": lambda path: path.symlink_to("/"),
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", LINKS_AND_DEVICES)
@pytest.mark.parametrize("name", ["state.safetensors", "best/extra", MANIFEST, "best/deeper"])
def test_only_regular_files_are_read(name: str, kind: str, checkpoint: Path) -> None:
    path = checkpoint / name
    if path.is_dir():
        (path / "empty").unlink()
        path.rmdir()
    path.unlink(missing_ok=True)
    LINKS_AND_DEVICES[kind](path)
    with pytest.raises(DamagedCheckpointError, match=f"'{name}' is not a regular file"):
        verify_checkpoint(checkpoint)


def test_a_folder_instead_of_a_file_is_noticed(checkpoint: Path) -> None:
    for name in ("state.safetensors", MANIFEST):
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()
        with pytest.raises(DamagedCheckpointError, match=f"{name}'? is missing"):
            verify_checkpoint(checkpoint)


@pytest.mark.parametrize("kind", ["missing", "file", "link"])
def test_a_checkpoint_must_be_a_folder(kind: str, checkpoint: Path) -> None:
    path = checkpoint.with_name("step-000008")
    if kind == "file":
        path.touch()
    elif kind == "link":
        path.symlink_to(checkpoint)
    with pytest.raises(DamagedCheckpointError, match="step-000008 is damaged: it is not a folder"):
        verify_checkpoint(path)


def test_a_file_that_cannot_be_read_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def file_digest(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    with pytest.raises(DamagedCheckpointError, match=r"Input/output error"):
        verify_checkpoint(checkpoint)


# --- manifests that are intact and wrong ------------------------------------------------------


def test_the_checkpoint_of_another_step_is_rejected(checkpoint: Path) -> None:
    renamed = checkpoint.rename(checkpoint.with_name("step-000008"))
    with pytest.raises(DamagedCheckpointError, match="it is that of step-000007"):
        verify_checkpoint(renamed)


@pytest.mark.parametrize("name", ["../x", "best/../../x", "/etc/passwd", "..", "a/.."])
def test_a_name_that_leaves_the_folder_is_rejected(name: str, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_bytes(signed(files={name: [0, ""]}))
    with pytest.raises(DamagedCheckpointError, match=f"names '{name}', which is outside"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "fields",
    [
        {"format": None},
        {"format": 0},
        {"format": -1},
        {"format": "new"},
        {"format": []},
        {"format": float("nan")},
        {"format": float("-inf")},
        {"step": None},
        {"step": "seven"},
        {"step": 8},
        {"files": None},
        {"files": []},
        {"files": 5},
        {"files": {"progress.json": 12}},
        {"files": {"progress.json": [12]}},
        {"files": {"progress.json": ["x", "y"]}},
        {"files": {"progress.json": [float("inf"), "y"]}},
        {"files": {"progress.json": [12, "0" * 64]}},
        {"files": {"": [0, ""]}},
        {"files": {"\ud800": [0, ""]}},
        {"files": {"\0": [0, ""]}},
    ],
    ids=str,
)
def test_a_manifest_with_other_values_is_damage(fields: dict[str, Any], checkpoint: Path) -> None:
    files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
    (checkpoint / MANIFEST).write_bytes(signed(**{"files": files, **fields}))
    with pytest.raises(DamagedCheckpointError) as error:
        verify_checkpoint(checkpoint)
    str(error.value).encode()


@pytest.mark.parametrize("raw", [b"[]", b"null", b"{}", b"[" * 100_000, b"1" * 5000, b"\xff\xfe"])
def test_a_manifest_of_another_kind_is_damage(raw: bytes, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_bytes(raw)
    with pytest.raises(DamagedCheckpointError, match=r"the content of manifest\.json has changed"):
        verify_checkpoint(checkpoint)


def test_a_newer_format_is_not_damage_and_is_not_passed_over(checkpoint: Path) -> None:
    files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
    (checkpoint / MANIFEST).write_bytes(signed(format=2, files=files))
    message = "has format 2, and this version of mlx_simpo reads 1; install the version that saved"
    for check in (lambda: verify_checkpoint(checkpoint), lambda: newest_valid(checkpoint.parent)):
        with pytest.raises(SimPOError, match=message) as error:
            check()
        assert not isinstance(error.value, DamagedCheckpointError)


@given(
    cut=st.tuples(st.integers(0, 700), st.integers(0, 700)).map(sorted),
    insertion=st.binary(max_size=20) | st.text(max_size=10).map(str.encode),
)
@settings(max_examples=300, deadline=None)
def test_no_other_manifest_is_accepted(cut: list[int], insertion: bytes, shared: Path) -> None:
    path = shared / MANIFEST
    content = path.read_bytes()
    changed = content[: cut[0]] + insertion + content[cut[1] :]
    path.write_bytes(changed)
    try:
        assert is_damaged(shared) == (changed != content)
    finally:
        path.write_bytes(content)
