"""Model folders: shards, config.json for old and new transformers, and the files beside them.
(What else a fused folder holds: test_fuse.py.)"""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import arrays

from mlx_simpo.convert import folder as folder_module
from mlx_simpo.convert.folder import (
    copy_companions,
    write_config,
    write_weights,
)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_large_models_are_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards = folder_module.make_shards
    monkeypatch.setattr(folder_module, "make_shards", lambda w: make_shards(w, 0))  # a file each
    tensors = {f"layers.{n}.weight": mx.full((64, 2), n) for n in range(11)}
    expected = {name: array.tolist() for name, array in tensors.items()}
    write_weights(tmp_path, tensors, "pt")
    assert tensors == {}
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) == 11
    assert files[0].name == "model-00001-of-00011.safetensors"
    index = read(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 11 * 64 * 2 * 4
    written = {}
    for file in files:
        content = arrays(file)
        assert {n for n, f in index["weight_map"].items() if f == file.name} == content.keys()
        written |= {name: array.tolist() for name, array in content.items()}
    assert written == expected


def test_small_models_are_one_file(tmp_path: Path) -> None:
    write_weights(tmp_path, {"a": mx.zeros(2)}, "mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("trusted", [False, True])
def test_config_json_is_that_of_an_unquantized_model(trusted: bool, tmp_path: Path) -> None:
    text = {"model_type": "x", "torch_dtype": "bfloat16", "rope_theta": 7.0, "quantization": {}}
    config = {
        "model_type": "llama",
        "dtype": "bfloat16",
        "rope_theta": 5.0,
        "quantization": {"bits": 4},
        "quantization_config": {"bits": 4},
        "auto_map": {"AutoModel": "code.Model"},
        "text_config": text,
    }
    write_config(tmp_path, config, "float32", trusted=trusted)
    written = read(tmp_path / "config.json")
    assert ("auto_map" in written) == trusted
    for part, theta in ((written, 5.0), (written["text_config"], 7.0)):
        assert not [name for name in part if name.startswith("quantiz")]
        assert part["rope_theta"] == part["rope_parameters"]["rope_theta"] == theta
    assert written["dtype"] == written["text_config"]["torch_dtype"] == "float32"


def test_links_out_of_the_folder_are_not_copied(tmp_path: Path) -> None:
    """huggingface_hub's cache links each file of a snapshot to a blob beside the snapshots."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "456").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/456")
    (snapshot / "LICENSE").symlink_to(tmp_path / "secret")
    output = tmp_path / "out"
    output.mkdir()
    copy_companions(snapshot, output, None, trusted=False)
    assert [path.name for path in output.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_copied_only_if_it_is_trusted(trusted: bool, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    for folder in (source, output):
        folder.mkdir()
    (source / "code.py").touch()
    (source / "training_args.bin").touch()
    copy_companions(source, output, None, trusted=trusted)
    assert [path.name for path in output.iterdir()] == ["code.py"] * trusted


def test_the_chat_template_replaces_both_copies(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    for folder in (source, output):
        folder.mkdir()
    (source / "tokenizer_config.json").write_text('{"chat_template": "old", "x": 1}')
    (source / "chat_template.jinja").write_text("old")
    copy_companions(source, output, "new", trusted=False)
    assert (output / "chat_template.jinja").read_text() == "new"
    assert read(output / "tokenizer_config.json") == {"chat_template": "new", "x": 1}
