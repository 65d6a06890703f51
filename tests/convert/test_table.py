"""The table, and models that are not in it: the probe's proof, or a refusal; never a guess."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import command, complaint
from helpers.tiny import tiny_config, tiny_model, tiny_tokenizer
from mlx.utils import tree_flatten

from mlx_simpo import SimPOError, fuse, load_model
from mlx_simpo.convert.architectures import TABLE, table_entry
from mlx_simpo.convert.base import architecture_of, checkpoint_layout
from mlx_simpo.convert.names import adaptable_layers, peft_target, single_expert_target

GLM = {"attention_bias": True, "tie_word_embeddings": False}


def saved(folder: Path, model_type: str, form: str, **changes: object) -> Path:
    """A tiny model under MLX's names, whatever ``form`` the file says it has."""
    folder.mkdir()
    weights = dict(tree_flatten(tiny_model(model_type, **changes).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": form})
    (folder / "config.json").write_text(json.dumps(tiny_config(model_type, **changes)))
    tiny_tokenizer()._tokenizer.save_pretrained(folder)
    return folder


def test_a_type_that_is_not_in_the_table_goes_by_the_probe(tmp_path: Path) -> None:
    """glm has the same names on both sides, and sanitize is what says so."""
    loaded = load_model(str(saved(tmp_path / "m", "glm", "pt", **GLM)))
    assert "glm" not in TABLE
    rule = architecture_of(loaded)
    assert (
        checkpoint_layout(loaded, rule).shapes.keys()
        == dict(tree_flatten(loaded.model.parameters())).keys()
    )


def test_mlx_names_of_an_unknown_type_prove_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "glm", "mlx", **GLM)
    with pytest.raises(SimPOError, match=r"glm are not in the table .* original model as --model"):
        fuse(tmp_path / "out", model=str(folder), verify=False)


def test_stacks_that_no_rule_covers_are_refused(tmp_path: Path) -> None:
    """sanitize leaves MLX's own names alone: the probe alone would take them for the right ones."""
    changes = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    folder = saved(tmp_path / "m", "qwen3_moe", "pt", **changes)
    config = json.loads((folder / "config.json").read_text())
    known = TABLE["qwen3_moe"]
    with pytest.raises(
        SimPOError, match="does not have"
    ):  # a rule, and a file that has other names
        checkpoint_layout(load_model(str(folder)), known)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(TABLE, "qwen3_moe")
        assert table_entry(config) is None
        with pytest.raises(SimPOError, match="stacked experts, which no rule"):
            architecture_of(load_model(str(folder)))


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.unsupported])
def test_refused_types_say_why(name: str) -> None:
    with pytest.raises(SimPOError, match=TABLE[name].unsupported):
        table_entry({"model_type": name})


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_no_two_layers_have_the_same_name(model_type: str) -> None:
    more = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    more |= {"moe_intermediate_size": 16, "decoder_sparse_step": 1, "norm_topk_prob": True}
    layers = adaptable_layers(tiny_model(model_type, mlp_only_layers=[], **more))
    rule = TABLE[model_type]
    targets = [peft_target(path, rule) for path in layers]
    assert len(set(targets)) == len(layers)
    stacked = [path for path in layers if "switch" in path]
    names = {single_expert_target(path, n, rule).module for path in stacked for n in range(4)}
    assert len(names) == 4 * len(stacked)


def test_the_table_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, "convert", "architectures")
    assert ran.status == 0
    assert all(name in ran.out for name in TABLE)
    listed = command(capsys, "convert", "architectures", "--json").json
    assert {name for name, entry in listed.items() if entry["refused"]} == {
        name for name, entry in TABLE.items() if entry.unsupported
    }


def test_settings_have_no_place_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no settings" in complaint(command(capsys, "convert", "architectures", "lora.rank=3"))
