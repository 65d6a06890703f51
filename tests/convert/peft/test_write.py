"""PEFT adapters as they are written. (What PEFT computes with them: tests/parity.)"""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.architectures import OTHERWISE_BUILT
from helpers.commands import arrays, assert_same_arrays
from helpers.mlx_folders import MIXTRAL
from helpers.tiny import tiny_model

from mlx_simpo import SimPOError
from mlx_simpo.convert.architectures import TABLE
from mlx_simpo.convert.lora_delta import LoRADelta
from mlx_simpo.convert.names import Target
from mlx_simpo.convert.peft.write import (
    Written,
    integer,
    joined,
    scale_settings,
    short_names,
    write_peft,
)
from mlx_simpo.files import read_header


def delta(rank: int = 2, scale: float = 2.0) -> LoRADelta:
    return LoRADelta(mx.random.normal((rank, 5)), mx.random.normal((4, rank)), scale)


def product(d: LoRADelta) -> np.ndarray:
    """What the delta adds to a weight, in float64."""
    return d.scale * np.array(d.b, np.float64) @ np.array(d.a, np.float64)


def written(*deltas: LoRADelta) -> list[Written]:
    return [Written(Target(f"layers.{n}.q"), d) for n, d in enumerate(deltas)]


@pytest.mark.parametrize(
    ("scale", "rslora", "expected"),
    [
        (1.0, True, {"r": 4, "lora_alpha": 4, "use_rslora": False}),  # where both are possible
        (2.0, True, {"r": 2, "lora_alpha": 4, "use_rslora": False}),
        (8 / math.sqrt(2), True, {"r": 2, "lora_alpha": 8, "use_rslora": True}),
        (8 / math.sqrt(2), False, {"r": 2, "lora_alpha": 2, "use_rslora": False}),
        (1.23, True, {"r": 2, "lora_alpha": 2, "use_rslora": False}),
        (0.5, True, {"r": 2, "lora_alpha": 1, "use_rslora": False}),
        (-2.0, True, {"r": 2, "lora_alpha": 2, "use_rslora": False}),
    ],
)
def test_lora_alpha_is_an_integer_and_b_holds_the_rest(
    scale: float, rslora: bool, expected: dict
) -> None:
    source = delta(expected["r"], scale)
    settings, (module,) = scale_settings(written(source), rslora=rslora)
    assert settings == {**expected, "rank_pattern": {}, "alpha_pattern": {}}
    root = math.sqrt(expected["r"]) if settings["use_rslora"] else expected["r"]
    actual = settings["lora_alpha"] / root * np.array(module.delta.b)
    np.testing.assert_allclose(actual, scale * np.array(source.b), rtol=1e-6)
    is_exact = math.isclose(settings["lora_alpha"] / root, scale)
    assert (module.delta.b is source.b) == is_exact  # not a bit of it is rounded


def test_other_ranks_and_scales_are_patterns() -> None:
    deltas = [delta(), delta(), delta(rank=3), delta(scale=5.0), delta(rank=4, scale=1.0)]
    deltas += [delta(rank=3, scale=0.1), delta(scale=8 / math.sqrt(2)), delta(rank=1)]
    before = written(*deltas)
    before[-1] = Written(Target("experts", "down_proj"), deltas[-1])
    settings, modules = scale_settings(before, rslora=True)
    assert settings == {
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": False,  # which holds for all modules or none
        "rank_pattern": {
            r"layers\.2\.q": 3,
            r"layers\.4\.q": 4,
            r"layers\.5\.q": 3,
            r"experts\.down_proj": 1,
        },
        "alpha_pattern": {
            r"layers\.2\.q": 6,
            r"layers\.3\.q": 10,
            r"layers\.5\.q": 3,  # 0.3 is none: alpha is the rank, and B has the rest
            r"layers\.6\.q": 2,
            r"experts\.down_proj": 2,
        },
    }
    assert [module.delta.scale for module in modules] == [2.0, 2.0, 2.0, 5.0, 1.0, 1.0, 1.0, 2.0]
    for module, source in zip(modules, deltas, strict=True):
        actual, expected = (d.scale * np.array(d.b) for d in (module.delta, source))
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_one_module_of_another_rank_or_scale_excludes_rslora() -> None:
    root = 8 / math.sqrt(2)
    for other in (delta(rank=3, scale=root), delta(scale=2.0)):
        settings, _ = scale_settings(written(delta(scale=root), other), rslora=True)
        assert settings["use_rslora"] is False


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((4.0, 4), (4.0000000000000009, 4), (3.9999999999999996, 4), (4.001, None), (1.0, 1)),
        *((0.0, None), (-4.0, None), (0.4, None), (0.9, None), (4.0000000004, None)),
    ],
)
def test_integers_up_to_rounding(value: float, expected: int | None) -> None:
    assert integer(value) == expected


@pytest.mark.parametrize(
    ("same_a", "scales", "order", "rank"),
    [
        (True, (2.0, 2.0), (0, 1), 3),
        (True, (2.0, 2.0), (1, 0), 3),
        (True, (2.0, 4.0), (0, 1), 6),  # the scale is one for all
        (True, (4.0, 2.0), (0, 1), 6),
        (False, (2.0, 2.0), (0, 1), 6),
        (False, (2.0, 4.0), (1, 0), 6),
        (True, (2.0, 2.0), (0,), 3),  # only one of them is adapted
        (True, (2.0, 3.0), (1,), 3),
    ],
)
def test_projections_that_share_a_parameter_are_joined(
    same_a: bool, scales: tuple[float, float], order: tuple[int, ...], rank: int
) -> None:
    """The joined delta is the projections' own, one behind the other."""
    mx.random.seed(2)
    gate, up = (
        LoRADelta(mx.random.normal((2, 3, 5)), mx.random.normal((2, 4, 3)), scale)
        for scale in scales
    )
    both = (gate, LoRADelta(gate.a, up.b, up.scale) if same_a else up)
    parts = {n: both[n] for n in order}
    whole = joined(Target("experts", "gate_up_proj", (0, 2)), parts, 4)
    assert whole.rank == rank
    expected = np.concatenate(
        [product(parts[n]) if n in parts else np.zeros((2, 4, 5)) for n in (0, 1)], axis=1
    )
    np.testing.assert_allclose(product(whole), expected, rtol=1e-6, atol=1e-6)


def test_short_names_are_used_where_they_match_no_other_module() -> None:
    modules = ["layers.0.q", "layers.1.q"]
    assert short_names(modules, {*modules, "layers.0.k"}) == ["q"]
    assert short_names(modules[:1], {*modules}) == ["layers.0.q"]
    assert short_names([*modules, "o"], {*modules, "o", "layers.0.k"}) == ["o", "q"]
    assert short_names(modules, {*modules, "q"}) == modules
    assert short_names(modules, {*modules, "layers.0.xq"}) == ["q"]


LAYER = "model.layers.0."
FOLDER: dict[str, Any] = {"base": "some/base", "revision": "main"}


def written_folder(folder: Path, deltas: dict[str, LoRADelta], **model: Any) -> tuple[Any, Any]:
    """Write deltas for a tiny llama; return (adapter_config.json, its tensors)."""
    write_peft(folder, deltas, tiny_model(**model), TABLE["llama"], **FOLDER)
    tensors = arrays(folder / "adapter_model.safetensors")
    assert read_header(folder / "adapter_model.safetensors").format == "pt"
    text = (folder / "adapter_config.json").read_text("utf-8")
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    return config, tensors


def test_the_files_of_an_adapter(tmp_path: Path) -> None:
    q = LoRADelta(mx.random.normal((2, 32)), mx.random.normal((32, 2)), 1.5)
    down = LoRADelta(mx.random.normal((2, 48)), mx.random.normal((32, 2)), 1.5)
    deltas = {f"{LAYER}self_attn.q_proj": q, f"{LAYER}mlp.down_proj": down}
    config, tensors = written_folder(tmp_path, deltas, num_hidden_layers=1)
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": "some/base",
        "revision": "main",
        "r": 2,
        "lora_alpha": 3,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["down_proj", "q_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    expected = {
        f"base_model.model.{path}.lora_{kind}.weight": np.array(matrix)
        for path, d in deltas.items()
        for kind, matrix in (("A", d.a), ("B", d.b))
    }
    assert_same_arrays(tensors, expected)


def test_magnitudes_and_embeddings_have_their_own_names(tmp_path: Path) -> None:
    magnitude = mx.random.uniform(shape=(32,))
    dora = LoRADelta(mx.random.normal((2, 32)), mx.random.normal((32, 2)), 1.0, magnitude)
    embedding = LoRADelta(mx.random.normal((2, 512)), mx.random.normal((32, 2)), 1.0)
    deltas = {f"{LAYER}self_attn.o_proj": dora, "model.embed_tokens": embedding}
    config, tensors = written_folder(tmp_path, deltas, tie_word_embeddings=False)
    assert config["use_dora"] is True
    assert config["target_modules"] == sorted(deltas)  # layer 1 is not adapted
    start = "base_model.model.model"
    o_proj = f"{start}.layers.0.self_attn.o_proj"
    expected = {
        f"{o_proj}.lora_A.weight": dora.a,
        f"{o_proj}.lora_B.weight": dora.b,
        f"{o_proj}.lora_magnitude_vector": magnitude,
        f"{start}.embed_tokens.lora_embedding_A": embedding.a,
        f"{start}.embed_tokens.lora_embedding_B": embedding.b,
    }
    assert_same_arrays(tensors, {name: np.array(array) for name, array in expected.items()})


def test_whole_paths_in_a_vision_language_model(tmp_path: Path) -> None:
    """A short name would also match layers of the vision tower."""
    model = tiny_model("gemma3", **OTHERWISE_BUILT["gemma3"])
    paths = [f"language_model.model.layers.{n}.self_attn.q_proj" for n in range(4)]
    d = LoRADelta(mx.zeros((2, 32)), mx.zeros((32, 2)), 1.0)
    write_peft(tmp_path, dict.fromkeys(paths, d), model, TABLE["gemma3"], base="x", revision=None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = [f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(4)]
    assert config["target_modules"] == expected
    assert config["revision"] is None


def test_layers_that_are_not_converted_are_rejected(tmp_path: Path) -> None:
    d = LoRADelta(mx.zeros((2, 32)), mx.zeros((32, 2)), 1.0)
    path = f"{LAYER}self_attn.kv_b_proj"
    with pytest.raises(SimPOError, match=r"kv_b_proj cannot be converted for deepseek_v3"):
        write_peft(tmp_path, {path: d}, tiny_model(), TABLE["deepseek_v3"], **FOLDER)
    dora = LoRADelta(d.a, mx.zeros((4, 2)), 1.0, mx.zeros((4,)))
    gate = f"{LAYER}block_sparse_moe.gate"
    deltas = {f"{LAYER}self_attn.q_proj": d, gate: dora}
    with pytest.raises(
        SimPOError, match=r"DoRA on model\.layers\.0\.mlp\.gate\.weight, which PEFT"
    ):
        write_peft(tmp_path, deltas, tiny_model("mixtral", **MIXTRAL), TABLE["mixtral"], **FOLDER)
    assert list(tmp_path.iterdir()) == []


def test_experts_run_slowest_in_a_and_fastest_in_b(tmp_path: Path) -> None:
    model = tiny_model("mixtral", **MIXTRAL)
    path = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
    experts = LoRADelta(mx.random.normal((4, 2, 48)), mx.random.normal((4, 32, 2)), 2.0)
    write_peft(tmp_path, {path: experts}, model, TABLE["mixtral"], base="x", revision=None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["model.layers.0.mlp.experts.down_proj"]
    assert config["target_modules"] == []
    tensors = arrays(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    a, b = np.array(experts.a), np.array(experts.b)
    np.testing.assert_array_equal(tensors[name.format("A")], np.concatenate(list(a)))
    np.testing.assert_array_equal(
        tensors[name.format("B")], np.stack(list(b), axis=-1).reshape(32, 8)
    )


def stacked(rank: int, outputs: int, inputs: int) -> LoRADelta:
    shapes = ((4, rank, inputs), (4, outputs, rank))
    return LoRADelta(*(mx.random.normal(shape) for shape in shapes), scale=8 / math.sqrt(2))


def test_the_parameters_of_one_module_wrap_each_other(tmp_path: Path) -> None:
    """PEFT's order: the first, gate_up_proj, is inside where both are adapted, as in layer 0."""
    up, down = stacked(2, 48, 32), stacked(2, 32, 48)
    mlp = "model.layers.{}.block_sparse_moe.switch_mlp.{}_proj"
    deltas = {mlp.format(0, "gate"): up, mlp.format(0, "up"): up, mlp.format(0, "down"): down}
    deltas |= {mlp.format(1, "up"): up}
    model = tiny_model("mixtral", **MIXTRAL)
    write_peft(tmp_path, deltas, model, TABLE["mixtral"], **FOLDER)
    tensors = arrays(tmp_path / "adapter_model.safetensors")
    start = "base_model.model.model.layers.{}.mlp.experts"
    gate_up = (f"{start.format(0)}.base_layer", (8, 32), (96, 8))  # both have the same A
    only_up = (start.format(1), (8, 32), (96, 8))
    expected = {
        f"{name}.lora_{kind}.weight": shape
        for name, *shapes in (gate_up, (start.format(0), (8, 48), (32, 8)), only_up)
        for kind, shape in zip("AB", shapes, strict=True)
    }
    assert {name: array.shape for name, array in tensors.items()} == expected
    b = np.array(up.b).transpose(1, 2, 0).reshape(48, 8)
    inner, outer = (tensors[f"{name}.lora_B.weight"] for name in (gate_up[0], only_up[0]))
    np.testing.assert_array_equal(inner, np.concatenate([b, b]))
    np.testing.assert_array_equal(outer, np.concatenate([np.zeros_like(b), b]))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    paths = [f"model.layers.{n}.mlp.experts.{p}_proj" for n, p in ((0, "gate_up"), (0, "down"))]
    assert sorted(config["target_parameters"]) == sorted(
        [*paths, "model.layers.1.mlp.experts.gate_up_proj"]
    )
    assert (config["use_rslora"], config["lora_alpha"]) == (True, 8)


def test_a_pair_of_matrices_for_each_expert(tmp_path: Path) -> None:
    """Without rsLoRA, whose scale would be wrong where PEFT joins them."""
    down = stacked(2, 32, 48)
    path = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
    model = tiny_model("mixtral", **MIXTRAL)
    write_peft(tmp_path, {path: down}, model, TABLE["mixtral"], separate_experts=True, **FOLDER)
    tensors = arrays(tmp_path / "adapter_model.safetensors")
    names = [f"model.layers.0.block_sparse_moe.experts.{n}.w2" for n in range(4)]
    assert len(tensors) == 2 * len(names)
    for number, name in enumerate(names):
        a, b = (tensors[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
        np.testing.assert_array_equal(a, np.array(down.a)[number])
        np.testing.assert_allclose(b, np.array(down.b)[number] * down.scale, rtol=1e-6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"]) == (False, 2)
    assert "target_parameters" not in config


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("granitemoe", "granitemoe has never had single experts; omit it"),
        ("llama", "llama has never had single experts; omit it"),
        ("phimoe", "PEFT does not join single experts of phimoe; omit it"),
    ],
)
def test_single_experts_that_peft_does_not_support_are_rejected(
    model_type: str, message: str, tmp_path: Path
) -> None:
    model = tiny_model("mixtral", **MIXTRAL)
    path = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
    experts = LoRADelta(mx.zeros((4, 2, 48)), mx.zeros((4, 32, 2)), 2.0)
    options = {"base": "x", "revision": None, "separate_experts": True}
    with pytest.raises(SimPOError, match=f"--separate-experts: {message}"):
        write_peft(tmp_path, {path: experts}, model, TABLE[model_type], **options)
    assert list(tmp_path.iterdir()) == []
