"""Reading PEFT adapters: what is incomplete or does not fit is an error. (What PEFT makes of the
same files: tests/parity. More that is rejected: test_hostile_adapters.py.)"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.commands import load_arrays
from helpers.mlx_folders import MIXTRAL
from helpers.tiny import tiny_model

from mlx_simpo import SimPOError
from mlx_simpo.convert.architectures import TABLE
from mlx_simpo.convert.lora_delta import LoRADelta
from mlx_simpo.convert.peft.read import read_peft
from mlx_simpo.convert.peft.write import write_peft

Tensors = dict[str, mx.array]
MODULES = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
EXPERTS = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}


def key(module: str, kind: str) -> str:
    return f"base_model.model.{module}.lora_{kind}.weight"


def peft_folder(
    folder: Path, change: Callable[[Tensors], Any] = lambda tensors: None, **settings: Any
) -> Path:
    """A PEFT adapter on the q_proj of both layers, with changed tensors and settings."""
    tensors = {}
    for module in MODULES:
        tensors[key(module, "A")] = mx.random.normal((2, 32))
        tensors[key(module, "B")] = mx.random.normal((32, 2))
    change(tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, {"format": "pt"})
    return folder


def read(folder: Path) -> dict[str, LoRADelta]:
    return read_peft(folder, tiny_model(**UNTIED), TABLE["llama"])


def test_an_adapter_is_read_by_mlxs_paths(tmp_path: Path) -> None:
    deltas = read(peft_folder(tmp_path))
    assert sorted(deltas) == MODULES
    assert {(delta.rank, delta.scale) for delta in deltas.values()} == {(2, 2.0)}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda t: t.clear(), {"target_modules": []}, "holds no tensors of an adapter"),
        (lambda t: t.pop(key(MODULES[0], "B")), {}, "too many or too few tensors: B"),
        (lambda t: t.update(x=mx.zeros(1)), {}, "'x' in .* is not a tensor of LoRA"),
        (
            lambda t: [t.pop(key(MODULES[1], kind)) for kind in "AB"],
            {},
            f"it names 1 layers that have no tensors in .*{MODULES[1]}; the adapter is incomplete",
        ),
        (
            lambda t: None,
            {"target_modules": [MODULES[0]]},
            f"has 1 modules that this file does not name, e.g. {MODULES[1]}; PEFT would ignore",
        ),
        (
            lambda t: t.update({key("vision.q_proj", kind): mx.zeros((2, 2)) for kind in "AB"}),
            {},
            r"1 of its modules are not in this model, e.g. vision.q_proj; is it .* another model\?",
        ),
        (lambda t: None, {"r": 3}, "which do not belong to rank 3"),
        (
            lambda t: t.update({key(m, "A"): mx.zeros((2, 7)) for m in MODULES}),
            {},
            r"A has shape \(2, 7\); this model needs \(2, 32\)",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.base_layer.weight": mx.zeros((512, 32))}),
            {},
            "is a weight of the base model and differs from the one in this model",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_rejected(
    change: Callable[[Tensors], Any], settings: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SimPOError, match=message):
        read(peft_folder(tmp_path, change, **settings))


def test_the_base_models_own_weights_beside_an_adapter_are_ignored(tmp_path: Path) -> None:
    weight = tiny_model(**UNTIED).lm_head.weight
    name = "base_model.model.lm_head.base_layer.weight"
    assert sorted(read(peft_folder(tmp_path, lambda t: t.update({name: weight})))) == MODULES


def single_experts(folder: Path, change: Callable[[Tensors], Any], **settings: Any) -> None:
    """A PEFT adapter with a pair of matrices for each expert of a mixtral."""
    experts = LoRADelta(mx.random.normal((4, 2, 48)), mx.random.normal((4, 32, 2)), 2.0)
    model, rule = tiny_model("mixtral", **MIXTRAL), TABLE["mixtral"]
    options = {"base": "x", "revision": None, "separate_experts": True}
    write_peft(folder, {EXPERTS: experts}, model, rule, **options)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_arrays(file)
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(file), tensors, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


LAST = "model.layers.0.block_sparse_moe.experts.3.w2"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            lambda t: [t.pop(key(LAST, kind)) for kind in "AB"],
            {},
            rf"1 experts have no tensors, e.g. {LAST}",
        ),
        (
            lambda t: None,
            {"alpha_pattern": {r"experts\.3\.w2": 7}},
            "have different ranks or scales",
        ),
    ],
)
def test_experts_that_cannot_be_stacked_are_rejected(
    change: Callable[[Tensors], Any], settings: dict, message: str, tmp_path: Path
) -> None:
    single_experts(tmp_path, change, **settings)
    with pytest.raises(SimPOError, match=message):
        read_peft(tmp_path, tiny_model("mixtral", **MIXTRAL), TABLE["mixtral"])
