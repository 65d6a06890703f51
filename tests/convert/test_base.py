"""A base model's rule and its checkpoint's layout: from the table or the probe, or an error."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.mlx_folders import mlx_model
from helpers.tiny import tiny_config, tiny_folder, tiny_model, tiny_tokenizer
from mlx.utils import tree_flatten

from mlx_simpo import SimPOError, fuse, load_model
from mlx_simpo.convert.architectures import TABLE, table_entry
from mlx_simpo.convert.base import (
    architecture_of,
    checkpoint_layout,
    has_mlx_names,
    is_transformers_checkpoint,
    spelled_as_on_disk,
)

GLM = {"attention_bias": True, "tie_word_embeddings": False}
QWEN3_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


def saved(folder: Path, model_type: str, form: str, **changes: Any) -> Path:
    """Write a tiny model under MLX's names, whatever ``form`` the file claims to have."""
    folder.mkdir()
    weights = dict(tree_flatten(tiny_model(model_type, **changes).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": form})
    (folder / "config.json").write_text(json.dumps(tiny_config(model_type, **changes)))
    tiny_tokenizer()._tokenizer.save_pretrained(folder)
    return folder


def test_a_type_that_is_not_in_the_table_is_converted_if_the_probe_allows_it(
    tmp_path: Path,
) -> None:
    """glm has the same names on both sides, and its sanitize proves it."""
    loaded = load_model(str(saved(tmp_path / "m", "glm", "pt", **GLM)))
    assert "glm" not in TABLE
    names = checkpoint_layout(loaded, architecture_of(loaded)).shapes.keys()
    assert names == dict(tree_flatten(loaded.model.parameters())).keys()


def test_mlx_names_of_an_unknown_type_prove_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "glm", "mlx", **GLM)
    with pytest.raises(SimPOError, match=r"glm are not in the table .* original model as --model"):
        fuse(tmp_path / "out", model=str(folder), verify=False)


def test_stacked_experts_that_no_rule_covers_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sanitize leaves MLX's own names alone: the probe alone would take them for the right ones."""
    loaded = load_model(str(saved(tmp_path / "m", "qwen3_moe", "pt", **QWEN3_MOE)))
    monkeypatch.delitem(TABLE, "qwen3_moe")
    assert table_entry(loaded.config) is None
    with pytest.raises(SimPOError, match="stacked experts, which no rule for qwen3_moe covers"):
        architecture_of(loaded)


def test_a_checkpoint_that_lacks_what_the_rule_expects_is_rejected(tmp_path: Path) -> None:
    loaded = load_model(str(saved(tmp_path / "m", "qwen3_moe", "pt", **QWEN3_MOE)))
    with pytest.raises(SimPOError, match=r"does not have .*experts.* the rule for qwen3_moe exp"):
        checkpoint_layout(loaded, TABLE["qwen3_moe"])


def test_a_rule_that_sanitize_contradicts_is_rejected(tmp_path: Path) -> None:
    """A prefix that mlx-lm does not add, in a model whose checkpoint is not at hand."""
    loaded = load_model(str(mlx_model(tmp_path / "m")))
    rule = TABLE["llama"]
    assert "model.norm.weight" in checkpoint_layout(loaded, rule).shapes
    with pytest.raises(SimPOError, match="the rule for llama and mlx-lm's sanitize disagree about"):
        checkpoint_layout(loaded, replace(rule, prefix="model."))


@pytest.mark.parametrize("bits", [None, 4])
def test_folders_in_mlx_format_are_recognized(bits: int | None, tmp_path: Path) -> None:
    loaded = load_model(str(mlx_model(tmp_path / "m", bits=bits)))
    assert has_mlx_names(loaded)
    assert not is_transformers_checkpoint(loaded)


def test_a_checkpoint_of_transformers_is_recognized(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    assert is_transformers_checkpoint(load_model(str(folder)))
    config = json.loads((folder / "config.json").read_text())
    loaded = load_model(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"x": 1}}))
    assert not has_mlx_names(loaded)
    assert not is_transformers_checkpoint(loaded)


def test_both_spellings_of_a_vision_language_checkpoint() -> None:
    shapes = {"language_model.model.norm.weight": (4,)}
    current = {"model.language_model.norm.weight": (4,)}
    rule = TABLE["gemma3"]
    assert spelled_as_on_disk(shapes, shapes | {"vision.weight": (2,)}, rule) == shapes
    assert spelled_as_on_disk(shapes, current | {"vision.weight": (2,)}, rule) == current
    assert spelled_as_on_disk(shapes, current, TABLE["llama"]) == shapes
