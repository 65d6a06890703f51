"""Names and paths in configurations that lead nowhere, and outputs that cannot be written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.hostile import (
    ADAPTER_CONFIG,
    SOURCE,
    Reject,
    assert_mentions,
    convert,
    every_conversion,
    folder_content,
    set_json,
)

from mlx_simpo.model import loading

# Names of base models → parts of the message.
BASES: list[tuple[Any, tuple[str, ...]]] = [
    ("../../x", ("'../../x'", "folder")),
    ("/etc/passwd", ("/etc/passwd", "config.json")),
    ("~root/x", ("'~root/x'", "folder")),
    ("~nosuchuser/x", ("'~nosuchuser/x'", "home")),
    ("a\0b", (r"'a\x00b'", "NUL")),
    ("x" * 5000, ("xxxx", "too long")),
    ("a/b/c", ("'a/b/c'", "folder")),
    (".", ("config.json", "folder of a model")),
    ("a b", ("'a b'", "Hub", "Repo id")),
    ("\ud800", (r"'\ud800'", "Hub", "Repo id")),
    *((value, ("adapter", "--model")) for value in ("", None, [1])),
]


@pytest.mark.parametrize(("base", "parts"), BASES)
def test_base_models_that_do_not_exist(base: Any, parts: tuple[str, ...], reject: Reject) -> None:
    assert_mentions(reject("to-peft", set_json(ADAPTER_CONFIG, model=base), model=None), *parts)


@pytest.mark.parametrize(
    ("conversion", "setting"), [("fuse", "model"), ("from-peft", "base_model_name_or_path")]
)
def test_every_conversion_looks_for_the_base_model(
    conversion: str, setting: str, reject: Reject
) -> None:
    for base, parts in (
        ("../../x", ("'../../x'", "folder")),
        ("~nosuchuser/x", ("'~nosuchuser/x'", "home")),
        ("", ("adapter", "--model")),
        (None, ("adapter", "--model")),
    ):
        corrupt = set_json(ADAPTER_CONFIG, **{setting: base})
        assert_mentions(reject(conversion, corrupt, model=None), *parts)


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        ("../../x", ("'../../x'", "folder")),
        ("a\0b", (r"'a\x00b'", "NUL")),
        *((value, ("adapter", "--model")) for value in ("", 3, [1], {"a": 1})),
    ],
)
def test_recorded_base_models_that_do_not_exist(
    base: Any, parts: tuple[str, ...], reject: Reject
) -> None:
    """The record of a run names the base model as well, and comes first."""
    corrupt = set_json(ADAPTER_CONFIG, mlx_simpo={"base": {"model": base}}, model=None)
    for conversion in ("to-peft", "fuse"):
        assert_mentions(reject(conversion, corrupt, model=None), *parts)


@pytest.mark.parametrize("revision", [3, [1], {"a": 1}])
def test_recorded_revisions_that_are_not_text_are_ignored(
    revision: Any, reject: Reject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, *, revision: Any, **_: Any) -> None:
        raise OSError(f"asked for {name} at revision {revision}")

    monkeypatch.setattr(loading, "snapshot_download", download)
    record = {"base": {"model": "a/b", "revision": revision}}
    for conversion in ("to-peft", "fuse"):
        message = reject(conversion, set_json(ADAPTER_CONFIG, mlx_simpo=record), model=None)
        assert_mentions(message, "'a/b'", "asked for a/b at revision None")


def add_subfolder(folder: Path) -> None:
    """Add a folder that is not empty."""
    (folder / "config").mkdir()
    (folder / "config" / "x").touch()


# Outputs, relative to the test's folder → parts of the message.
OUTPUTS: list[tuple[str, tuple[str, ...]]] = [
    ("source", ("source'", "not empty")),
    ("source/config", ("source/config'", "not empty")),
    ("source/../source", ("source/../source'", "not empty")),
    ("file", ("file'", "a file")),
    ("file/x/y", ("file/x/y'", "Not a directory")),
]
# Names that no folder can have → parts of the message.
OUTPUT_NAMES: list[tuple[str, tuple[str, ...]]] = [
    ("", ("''", "empty")),
    ("x" * 300, ("xxxx", "too long")),
    ("~nosuchuser/x", ("'~nosuchuser/x'", "home")),
    ("a\0b", (r"'a\x00b'", "NUL")),
]


@pytest.mark.parametrize(("output", "parts"), OUTPUTS)
def test_outputs_that_are_taken(
    output: str, parts: tuple[str, ...], tmp_path: Path, reject: Reject
) -> None:
    (tmp_path / "file").write_text("x")
    assert_mentions(reject("from-peft", add_subfolder, output=tmp_path / output), "output", *parts)


@pytest.mark.parametrize(("output", "parts"), OUTPUT_NAMES)
def test_outputs_without_a_valid_name(output: str, parts: tuple[str, ...], reject: Reject) -> None:
    assert_mentions(reject("from-peft", add_subfolder, output=output), *parts)


@every_conversion
def test_every_conversion_looks_at_its_output_first(
    conversion: str, tmp_path: Path, reject: Reject
) -> None:
    """Before it reads anything: the input has nothing that could be converted."""

    def remove_everything(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        (folder / "x").touch()

    message = reject(conversion, remove_everything, output=tmp_path / "source")
    assert_mentions(message, "output", "source'", "not empty")
    for output, parts in OUTPUT_NAMES:
        assert_mentions(reject(conversion, remove_everything, output=output), *parts)


@every_conversion
def test_an_output_inside_the_input_leaves_the_rest_as_it_is(
    conversion: str, valid_inputs: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(valid_inputs / SOURCE[conversion], tmp_path / "source")
    before = folder_content(tmp_path)
    convert(conversion, source, source / "out", str(valid_inputs / "model"), verify=True)
    assert any((source / "out").glob("*.safetensors"))
    shutil.rmtree(source / "out")
    assert folder_content(tmp_path) == before


# What MLX raises when the disk is full, and what Python does.
FULL = (
    RuntimeError("[write] Unable to write 307 bytes to file."),
    OSError(28, "No space left on device"),
)


def fail_to_write(error: BaseException) -> Callable[..., None]:
    """Return a function in the place of mx.save_safetensors that stops half way."""

    def save(file: str, *_: object) -> None:
        Path(file).write_bytes(b"half of it")
        raise error

    return save


@every_conversion
def test_a_full_disk_leaves_nothing(
    conversion: str, tmp_path: Path, reject: Reject, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in FULL:
        monkeypatch.setattr(mx, "save_safetensors", fail_to_write(error))
        output = tmp_path / "source" / "new" / "out"
        message = reject(conversion, lambda folder: None, output=output)
        assert_mentions(message, "cannot be written", "source/new/", error.args[-1])


@every_conversion
def test_ctrl_c_leaves_nothing(
    conversion: str, valid_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "save_safetensors", fail_to_write(KeyboardInterrupt()))
    source, model = valid_inputs / SOURCE[conversion], str(valid_inputs / "model")
    with pytest.raises(KeyboardInterrupt):
        convert(conversion, source, tmp_path / "new" / "out", model)
    assert list(tmp_path.iterdir()) == []
