"""Which kind a folder is of, what its record says, and which names others may read."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers.shared_folders import (
    BASE,
    every_kind,
    peft_folder,
    training_record,
    whole_folder,
    write_json,
    write_weights,
)

from mlx_simpo import SimPOError
from mlx_simpo.hub.folders import as_text, lookup, open_folder, public_name


def open_error(folder: Path) -> str:
    """The message with which a folder is rejected."""
    with pytest.raises(SimPOError) as error:
        open_folder(folder)
    return str(error.value)


def test_every_kind_is_recognized_with_its_record(adapter: Path, tmp_path: Path) -> None:
    folders = every_kind(adapter, tmp_path)
    assert {name: folder.kind.name for name, folder in folders.items()} == {
        name: name for name in folders
    }
    for name, folder in folders.items():
        assert lookup(folder.settings, "objective.beta") == 2.0
        assert lookup(folder.summary, "train.epoch") > 0
        if name != "run":
            assert (folder.base, folder.revision) == (BASE, "v1.0")


def test_the_revision_is_of_the_model_that_was_trained_on(tmp_path: Path) -> None:
    folder = open_folder(peft_folder(tmp_path / "peft", training_record(), base="org/original"))
    assert (folder.base, folder.trained_on, folder.revision) == ("org/original", BASE, None)


def test_a_folder_without_a_record(tmp_path: Path) -> None:
    folder = open_folder(whole_folder(tmp_path / "model", "pt"))
    assert (folder.record, folder.settings, folder.summary) == ({}, None, None)
    assert (folder.base, folder.trained_on, folder.revision) == (None, None, None)


def test_no_such_folder(tmp_path: Path) -> None:
    assert "does not exist; name the folder" in open_error(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "is a file; name the folder" in open_error(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "holds neither an adapter" in open_error(tmp_path / "empty")


def test_an_adapter_and_a_model(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "pt")
    write_json(folder / "adapter_config.json", {})
    assert "holds a model and an adapter; it must hold one of them" in open_error(folder)


def test_pickled_weights(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in open_error(folder)
    model = whole_folder(tmp_path / "model", "pt")
    (model / "model.safetensors").write_bytes(pickle.dumps({"weight": [0.0] * 100}))
    assert "is not a valid safetensors file" in open_error(model)


@pytest.mark.parametrize("format", ["np", "tf", ""])
def test_weights_of_an_unknown_format(format: str, tmp_path: Path) -> None:
    message = open_error(whole_folder(tmp_path / "model", format))
    assert f"the format {format or 'nothing'}; it must be pt (transformers) or mlx" in message


def test_weights_of_two_formats(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "pt")
    write_weights(folder / "model-2.safetensors", "mlx")
    assert "the format mlx, pt" in open_error(folder)


@pytest.mark.parametrize("content", ["{", "[1]", "\udc80", "[" * 100_000])
@pytest.mark.parametrize("name", ["adapter_config.json", "mlx_simpo.json"])
def test_files_that_are_not_json(name: str, content: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", training_record())
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert str(folder / name) in open_error(folder)


# --- values and names in a record ------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value"), [("a.b", 1), ("a", {"b": 1}), ("a.c", None), ("a.b.c", None), ("x", None)]
)
def test_lookup(path: str, value: Any) -> None:
    assert lookup({"a": {"b": 1}}, path) == value


@pytest.mark.parametrize("values", [None, [], "a", 5])
def test_lookup_in_what_is_not_a_mapping(values: Any) -> None:
    assert lookup(values, "a") is None


def test_blank_text_and_other_types_are_no_text() -> None:
    assert [as_text(v) for v in ("a", "", " \n", None, 5, ["a"])] == ["a", *[None] * 5]


def test_a_path_relative_to_where_the_training_was_started(tmp_path: Path) -> None:
    """models/tiny could be a Hub id; it is not one if that folder exists."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    run = tmp_path / "runs" / "mine"
    assert public_name("models/tiny", run) == ("tiny", False)
    assert public_name("models/other", run) == ("models/other", True)


@pytest.mark.parametrize("name", ["/", "..", "~", ".", "C:\\", "./ "])
def test_a_path_may_have_no_last_part(name: str, tmp_path: Path) -> None:
    assert public_name(name, tmp_path).on_hub is False
    assert "/" not in public_name(name, tmp_path).text


@pytest.mark.parametrize("name", ["pairs.jsonl", "data/pairs.jsonl.gz", "owner/pairs.parquet"])
def test_a_data_file_is_not_a_hub_id(name: str, tmp_path: Path) -> None:
    assert public_name(name, tmp_path) == (name.rpartition("/")[2], False)
