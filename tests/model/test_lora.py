"""LoRA on every kind of base model: which modules, which scale, which weights train."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import ATTENTION
from helpers.commands import load_arrays
from helpers.tiny import tiny_model
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_simpo import LoRAConfig, SimPOError
from mlx_simpo.model.adapters import save_adapter
from mlx_simpo.model.lora import adapter_config, attach_lora

TOKENS = mx.random.randint(0, 500, (1, 16), key=mx.random.key(3))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Q_AND_UP = ("self_attn.q_proj", "mlp.up_proj")


def trained(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


def phi3() -> nn.Module:
    return tiny_model("phi3")


def quantized(bits: int = 4) -> nn.Module:
    model = tiny_model(hidden_size=64, head_dim=16, intermediate_size=64)
    nn.quantize(model, group_size=32, bits=bits)
    return model


def mixtral() -> nn.Module:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
    return tiny_model("mixtral", **sizes)


def mixed_model() -> nn.Module:
    """A model whose first layer is dense and whose last one has experts."""
    return tiny_model("qwen3_moe", **{**ATTENTION["qwen3_moe"], "mlp_only_layers": [0]})


def no_linear_layer() -> nn.Module:
    """A model with something else in the place of a linear layer."""
    model = tiny_model()
    model.layers[0].self_attn.q_proj = nn.Identity()
    return model


def mixed_bits() -> nn.Module:
    """A model with one layer of 3 bits among layers of 4."""
    model = tiny_model(hidden_size=64, head_dim=16, intermediate_size=64)
    nn.quantize(model.layers[0].mlp, group_size=32, bits=3)
    nn.quantize(model, group_size=32, bits=4)
    return model


def test_all_linear_adapts_every_linear_module_of_every_layer() -> None:
    model = tiny_model()
    model.layers[0].table = nn.Embedding(4, 32)  # which is none
    adapter = attach_lora(model, LoRAConfig(rank=4), seed=0)
    names = {n.rpartition(".")[0].rpartition(".")[2] for n in trained(model)}
    assert names == set(LINEAR)
    assert len(trained(model)) == 2 * 2 * len(LINEAR)  # a and b, two layers
    assert adapter == {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": 4,
            "scale": 2.0,
            "dropout": 0.0,
            "keys": sorted(
                f"{'mlp' if n.endswith(('up_proj', 'gate_proj', 'down_proj')) else 'self_attn'}.{n}"
                for n in LINEAR
            ),
        },
    }


@pytest.mark.parametrize(
    ("targets", "num_layers", "expected"),
    [
        (("q_proj",), 1, ["1.self_attn.q_proj"]),
        (("self_attn.q_proj",), 1, ["1.self_attn.q_proj"]),
        (("q_proj", "mlp.up_proj"), 2, [f"{n}.{p}" for n in (1, 0) for p in Q_AND_UP]),
        (("q_proj",), -1, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
    ],
)
def test_targets_by_name_or_path_in_the_last_layers(
    targets: tuple[str, ...], num_layers: int, expected: list[str]
) -> None:
    model = tiny_model()
    config = LoRAConfig(rank=4, target_modules=targets, num_layers=num_layers)
    adapter = attach_lora(model, config, seed=0)
    assert set(trained(model)) == {
        f"model.layers.{p}.lora_{side}" for p in expected for side in "ab"
    }
    assert adapter["num_layers"] == num_layers


@pytest.mark.parametrize("num_layers", [1, 2, -1])
def test_targets_are_those_of_the_layers_that_are_adapted(num_layers: int) -> None:
    """The first layer is dense here, the last one a mixture of experts."""
    dense = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    experts = {"mlp.gate", *(path.replace("mlp.", "mlp.switch_mlp.") for path in dense)}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    model = mixed_model()
    keys = adapter_config(model, LoRAConfig(num_layers=num_layers))["lora_parameters"]["keys"]
    assert keys == sorted(attention | experts | (set() if num_layers == 1 else dense))
    only_dense = LoRAConfig(num_layers=num_layers, target_modules=("mlp.up_proj",))
    if num_layers == 1:
        with pytest.raises(SimPOError, match=r"names 'mlp.up_proj', which no adapted layer has"):
            attach_lora(model, only_dense, seed=0)
    else:
        attach_lora(model, only_dense, seed=0)
        assert set(trained(model)) == {f"model.layers.0.mlp.up_proj.lora_{side}" for side in "ab"}


@pytest.mark.parametrize(("dora", "kind"), [(False, LoRALinear), (True, DoRALinear)])
def test_layers_have_the_settings(dora: bool, kind: type) -> None:
    model = tiny_model()
    config = LoRAConfig(rank=3, scale=5.0, dropout=0.25, dora=dora, target_modules=("q_proj",))
    adapter = attach_lora(model, config, seed=0)
    layer = model.layers[0].self_attn.q_proj
    assert type(layer) is kind
    assert (layer.lora_a.shape, layer.lora_b.shape, layer.scale) == ((32, 3), (3, 32), 5.0)
    assert layer.dropout._p_1 == 0.75  # MLX stores the share that is kept
    assert adapter["fine_tune_type"] == ("dora" if dora else "lora")
    assert adapter["lora_parameters"]["dropout"] == 0.25


def test_dora_beside_layers_that_have_none() -> None:
    for model in (mixed_model(), mixed_bits()):
        attach_lora(model, LoRAConfig(rank=4, dora=True, target_modules=("k_proj",)), seed=0)
        assert {name.rpartition(".")[2] for name in trained(model)} == {"lora_a", "lora_b", "m"}


@pytest.mark.parametrize("is_quantized", [False, True])
def test_experts_are_adapted_too_but_not_with_dora(is_quantized: bool) -> None:
    model = mixtral()
    if is_quantized:
        nn.quantize(model, group_size=32, bits=4)
    with pytest.raises(SimPOError, match=r"switch_mlp.* is a mixture-of-experts"):
        attach_lora(model, LoRAConfig(rank=4, dora=True, target_modules=("up_proj",)), seed=0)
    attach_lora(model, LoRAConfig(rank=4), seed=0)
    shapes = {n: p.shape for n, p in trained(model).items() if "switch_mlp.up_proj" in n}
    assert set(shapes.values()) == {(4, 4, 32), (4, 64, 4)}


@pytest.mark.parametrize(
    "base", [tiny_model, quantized, lambda: quantized(2), lambda: quantized(8)]
)
@pytest.mark.parametrize("dora", [False, True])
def test_fresh_lora_changes_nothing_and_trains(base, dora: bool) -> None:  # type: ignore[no-untyped-def]
    model = base()
    expected = np.array(model(TOKENS))
    attach_lora(model, LoRAConfig(rank=4, dora=dora), seed=0)
    np.testing.assert_allclose(np.array(model(TOKENS)), expected, atol=2e-4)
    _, gradients = nn.value_and_grad(model, lambda: model(TOKENS).square().mean())()
    by_name = dict(tree_flatten(gradients))
    assert set(by_name) == set(trained(model))
    assert all(mx.abs(g).max() > 0 for n, g in by_name.items() if n.endswith(("lora_b", ".m")))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_weights_are_float32_on_a_half_precision_base(dtype: mx.Dtype) -> None:
    model = tiny_model()
    model.set_dtype(dtype)
    attach_lora(model, LoRAConfig(rank=4, dora=True), seed=0)
    assert {p.dtype for p in trained(model).values()} == {mx.float32}
    assert model(TOKENS).dtype == dtype


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"rank": 8}, 2.0),
        ({"rank": 8, "lora_alpha": 4.0}, 0.5),
        ({"rank": 16, "lora_alpha": 16.0, "rslora": True}, 4.0),
        ({"rank": 8, "scale": 20.0}, 20.0),
    ],
)
def test_scale_multiplies_the_lora_delta(settings: dict, scale: float) -> None:
    model = tiny_model()
    attach_lora(model, LoRAConfig(target_modules=("q_proj",), **settings), seed=0)
    layer = model.layers[0].self_attn.q_proj
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(5))
    x = mx.random.normal((3, 32), key=mx.random.key(6))
    delta = np.array(layer(x) - layer.linear(x), np.float64)
    a, b = (np.array(p, np.float64) for p in (layer.lora_a, layer.lora_b))
    np.testing.assert_allclose(delta, scale * np.array(x, np.float64) @ a @ b, rtol=1e-3, atol=1e-4)


def test_initial_weights_follow_the_seed_and_the_published_range() -> None:
    models = [tiny_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        attach_lora(model, LoRAConfig(rank=8), seed=seed)
    first, same, other = map(trained, models)
    for name, value in first.items():
        assert (value == same[name]).all()
        if name.endswith("lora_a"):
            assert (value != other[name]).any()
            bound = value.shape[0] ** -0.5
            assert 0.8 * bound < mx.abs(value).max().item() <= bound
        else:
            assert (value == 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {},
        *({"num_layers": n} for n in (2, 0, -2)),  # all, in other ways of saying it
        {"fine_tune_type": None},
        {"keys": ["self_attn.v_proj", "self_attn.q_proj"]},  # the order means nothing
        {"keys": None},  # where it has all that mlx-lm can adapt
        {"dropout": 0.5},  # what this run sets itself
    ],
    ids=str,
)
def test_starts_from_an_existing_adapter(change: dict[str, Any], tmp_path: Path) -> None:
    config = LoRAConfig(rank=4, target_modules=("q_proj", "v_proj"))
    model = tiny_model()
    adapter = attach_lora(model, config, seed=0)
    model.update(tree_map(lambda p: (p + 0.1).astype(mx.bfloat16), model.trainable_parameters()))
    for name, value in change.items():
        section = adapter if name in adapter else adapter["lora_parameters"]
        section[name] = value
        if value is None:
            del section[name]
    save_adapter(tmp_path, model, adapter)
    again = tiny_model()
    attached = attach_lora(again, replace(config, init_from=str(tmp_path)), seed=9)
    assert attached["num_layers"] == -1
    assert attached["lora_parameters"]["dropout"] == 0.0
    for name, value in trained(model).items():
        assert (trained(again)[name] == value).all()
        assert trained(again)[name].dtype == mx.float32


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 8}, "rank is 4 there and 8 here"),
        ({"rank": 4, "scale": 1.0}, "scale is 2.0 there and 1.0 here"),
        (
            {"rank": 8, "dora": True},
            "fine_tune_type is lora there and dora here; rank is 4 there and 8 here",
        ),
        ({"rank": 4, "num_layers": 1}, "num_layers is 2 there and 1 here"),
        (
            {"rank": 4, "target_modules": ("q_proj",)},
            r"keys is \['mlp.*'\] there and \['self_.*'\] here",
        ),
    ],
)
def test_an_adapter_with_other_settings_is_rejected(
    settings: dict, named: str, tmp_path: Path
) -> None:
    model = tiny_model()
    save_adapter(tmp_path, model, attach_lora(model, LoRAConfig(rank=4), seed=0))
    with pytest.raises(SimPOError, match=rf"has other settings than this run: {named}. Set"):
        attach_lora(tiny_model(), LoRAConfig(init_from=str(tmp_path), **settings), seed=0)


def test_an_incomplete_adapter_is_rejected(tmp_path: Path) -> None:
    model = tiny_model()
    save_adapter(tmp_path, model, attach_lora(model, LoRAConfig(rank=4), seed=0))
    weights = load_arrays(tmp_path / "adapters.safetensors")
    weights.pop(sorted(weights)[0])
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    with pytest.raises(SimPOError, match="1 missing"):
        attach_lora(tiny_model(), LoRAConfig(rank=4, init_from=str(tmp_path)), seed=0)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            tiny_model,
            {"target_modules": ("wq",)},
            f"'wq'.*; they have {', '.join(sorted(LINEAR))}$",
        ),
        # A name is a whole part of a path: qkv_proj is not a v_proj, and o_proj only itself.
        (
            phi3,
            {"target_modules": ("v_proj",)},
            "'v_proj'.* have down_proj, gate_up_proj, o_proj, q",
        ),
        (phi3, {"target_modules": ("attn.o_proj",)}, "'attn.o_proj', which no adapted layer has"),
        (mixtral, {"target_modules": ("switch_mlp.up_proj",)}, "which no adapted layer has; they"),
        (phi3, {"target_modules": ("self_attn",)}, "'self_attn', which no adapted layer has"),
        (tiny_model, {"target_modules": ("q_proj", "wq")}, "names 'wq', which"),
        (tiny_model, {"num_layers": 3}, "num_layers is 3; the model has 2 layers"),
        (
            no_linear_layer,
            {"target_modules": ("q_proj",)},
            "attached: Can't convert layer of type Id",
        ),
        (lambda: quantized(3), {"dora": True}, "3 bits"),
        (lambda: quantized(5), {"dora": True}, "5 bits"),
        (lambda: quantized(6), {"dora": True}, "6 bits"),
        (mixed_bits, {"dora": True, "target_modules": ("up_proj",)}, "mlp.up_proj is .* to 3 bits"),
    ],
)
def test_targets_that_cannot_be_adapted_are_rejected(model, settings: dict, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SimPOError, match=message):
        attach_lora(model(), LoRAConfig(rank=4, **settings), seed=0)
