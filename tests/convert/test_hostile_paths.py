"""Names and paths in configurations, and outputs that cannot be."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.hostile import ADAPTER, SOURCE, changed, content, conversions, convert

NAMES = ["../../x", "/etc/passwd", "~root/x", "~nosuchuser/x", "a\0b", "x" * 5000, "", "a/b/c", "."]


@pytest.mark.parametrize("base", [*NAMES, "a b", "\ud800", None, [1]])
@pytest.mark.parametrize("name", ["to-peft", "fuse", "from-peft"])
def test_bases_that_are_none(name: str, base: Any, refused: Callable[..., str]) -> None:
    key = "base_model_name_or_path" if name == "from-peft" else "model"
    refused(name, changed(ADAPTER, **{key: base}), model=None)


@pytest.mark.parametrize("name", ["to-peft", "fuse"])
@pytest.mark.parametrize("base", [*NAMES, 3, [1], {"a": 1}])
def test_recorded_bases_that_are_none(name: str, base: Any, refused: Callable[..., str]) -> None:
    record = {"base": {"model": base}}
    refused(name, changed(ADAPTER, mlx_simpo=record, model=None), model=None)


@pytest.mark.parametrize("name", ["to-peft", "fuse"])
@pytest.mark.parametrize("revision", [3, [1], {"a": 1}])
def test_recorded_revisions_that_are_none(
    name: str, revision: Any, refused: Callable[..., str]
) -> None:
    record = {"base": {"model": "a/b", "revision": revision}}
    refused(name, changed(ADAPTER, mlx_simpo=record), model=None)


@conversions
@pytest.mark.parametrize("output", ["in", "in/config", "../in", "file", "file/x/y"])
def test_outputs_that_cannot_be(
    name: str, output: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("x")

    def spoil(folder: Path) -> None:
        (folder / "config").mkdir()
        (folder / "config" / "x").touch()

    place = tmp_path / "in" / output if output == "../in" else tmp_path / output
    assert "output is" in refused(name, spoil, output=place)


@conversions
@pytest.mark.parametrize(
    "output",
    ["", "x" * 300, "~nosuchuser/x", "a\0b"],
)
def test_outputs_that_are_no_names(name: str, output: str, refused: Callable[..., str]) -> None:
    refused(name, lambda folder: None, output=output)


@conversions
def test_an_output_inside_the_input_leaves_the_rest(name: str, good: Path, tmp_path: Path) -> None:
    source = shutil.copytree(good / SOURCE[name], tmp_path / "in")
    before = content(tmp_path)
    convert(name, source, source / "out", str(good / "model"), verify=True)
    assert any((source / "out").glob("*.safetensors"))
    shutil.rmtree(source / "out")
    assert content(tmp_path) == before


FULL = "[write] Unable to write 307 bytes to file."  # what MLX says when the disk is full


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError(FULL)])
@conversions
def test_a_full_disk_leaves_nothing(
    name: str,
    error: Exception,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(file: str, *_: object) -> None:
        Path(file).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(mx, "save_safetensors", full)
    output = tmp_path / "in" / "new" / "out"
    assert "cannot be written" in refused(name, lambda folder: None, output=output)


@conversions
def test_ctrl_c_leaves_nothing(
    name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "save_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(name, good / SOURCE[name], tmp_path / "new" / "out", str(good / "model"))
    assert list(tmp_path.iterdir()) == []
