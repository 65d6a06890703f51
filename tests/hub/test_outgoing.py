"""Which files of a folder are sent, and what is cut out of them."""

import json
from pathlib import Path

import pytest
from helpers.shared_folders import peft_folder, whole_folder, write_json

from mlx_simpo import SimPOError
from mlx_simpo.hub.folders import open_folder
from mlx_simpo.hub.outgoing import MAX_UNLISTED_BYTES, sort_files, without_paths


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "X.PKL", "old.ckpt"])
def test_a_pickle_beside_the_weights(name: str, tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "pt")
    (folder / name).write_bytes(b"x")
    with pytest.raises(SimPOError, match=f"{name} may be a pickle.*; move it out of the folder"):
        sort_files(open_folder(folder))


def test_a_large_file_that_is_not_listed(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "pt")
    with (folder / "consolidated.safetensors").open("wb") as file:
        file.truncate(MAX_UNLISTED_BYTES + 1)
    message = r"consolidated\.safetensors \(10,000,001 bytes\) is not one of the files of a model"
    with pytest.raises(SimPOError, match=message):
        sort_files(open_folder(folder))


@pytest.mark.parametrize("weight_map", [{}, None, [1]])
def test_an_index_that_names_no_files(weight_map: object, tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "pt")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(SimPOError, match=r"index\.json names no files; save the model again"):
        sort_files(open_folder(folder))


def test_a_link_that_leads_nowhere_stays(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft")
    (folder / "tokenizer.json").symlink_to(tmp_path / "none")
    files = sort_files(open_folder(folder))
    assert files.stays == [("tokenizer.json", "not one of the files of a LoRA adapter for PEFT")]
    assert [path.name for path in files.sent] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_tokens_that_look_like_paths_are_not_cut(tmp_path: Path) -> None:
    path = whole_folder(tmp_path / "model", "pt")
    content = {"added_tokens_decoder": {"0": {"content": "/no_think"}}, "eos_token": "/home/x"}
    write_json(path / "tokenizer_config.json", {**content, "tokenizer_file": "/home/x/t.json"})
    folder = open_folder(path)
    settings, config, tokens = (
        without_paths(path / name, folder)
        for name in ("tokenizer_config.json", "config.json", "tokenizer.json")
    )
    assert json.loads(settings or b"") == {**content, "tokenizer_file": "t.json"}
    assert json.loads(config or b"")["_name_or_path"] == "llama"
    assert tokens is None  # sent as it is


def test_a_chat_template_is_not_a_path(tmp_path: Path) -> None:
    path = peft_folder(tmp_path / "peft")
    write_json(path / "adapter_config.json", {"peft_type": "LORA", "template": "/home/x\n/y"})
    assert without_paths(path / "adapter_config.json", open_folder(path)) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "model.safetensors"])
def test_a_link_out_of_the_folder_is_not_sent(name: str, tmp_path: Path) -> None:
    """A folder from elsewhere could have a private file published."""
    folder = whole_folder(tmp_path / "model", "pt")
    private = tmp_path / "private"
    private.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"# x")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(private)
    message = f"{name} is a link to {private}, which is not in this folder; copy the file here"
    with pytest.raises(SimPOError, match=message):
        sort_files(open_folder(folder))


def test_an_index_that_names_a_file_elsewhere(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "pt")
    (tmp_path / "x.safetensors").touch()
    index = {"weight_map": {"a": "model.safetensors", "b": "../x.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(
        SimPOError, match=r"names \.\./x\.safetensors, which is not there; save the"
    ):
        sort_files(open_folder(folder))


def test_tokens_and_passwords_are_cut(tmp_path: Path) -> None:
    token = "hf_plantedSecretToken0123456789"
    path = peft_folder(tmp_path / "peft", {"base": {"model": "a/b"}, "note": f"with {token}"})
    address = "https://ann:pass1234@example.org/x"
    write_json(path / "adapter_config.json", {"peft_type": "LORA", "source": f"see {address}"})
    folder = open_folder(path)
    config = without_paths(path / "adapter_config.json", folder)
    record = without_paths(path / "mlx_simpo.json", folder)
    assert json.loads(config or b"")["source"] == "see https://…@example.org/x"
    assert json.loads(record or b"")["note"] == "with …"
