"""Reading PEFT adapters: what is incomplete or does not fit is an error. (What PEFT makes of the
same files: tests/parity. More that is rejected: test_hostile_adapters.py.)"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import OTHERWISE_BUILT
from helpers.commands import load_arrays
from helpers.mlx_folders import MIXTRAL
from helpers.tiny import tiny_model

from mlx_simpo import SimPOError
from mlx_simpo.convert.architectures import TABLE
from mlx_simpo.convert.lora_delta import LoRADelta
from mlx_simpo.convert.names import TEXT_PREFIXES
from mlx_simpo.convert.peft.read import read_peft
from mlx_simpo.convert.peft.write import write_peft

Tensors = dict[str, mx.array]
MODULES = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
EXPERTS = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
LONG = "y" * 150
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


def only(tensors: Tensors) -> Callable[[Tensors], Any]:
    """Return what leaves these tensors in a file, and no other."""

    def change(file: Tensors) -> None:
        file.clear()
        file.update(tensors)

    return change


def read(folder: Path) -> dict[str, LoRADelta]:
    return read_peft(folder, tiny_model(**UNTIED), TABLE["llama"])


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 2.0), ({"use_rslora": True}, 4 / 2**0.5), ({"alpha_pattern": {"q_proj": 1}}, 0.5)],
)
def test_an_adapter_is_read_by_mlxs_paths(settings: dict, scale: float, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, **settings)
    deltas = read(folder)
    assert sorted(deltas) == MODULES
    tensors = load_arrays(folder / "adapter_model.safetensors")
    for module, delta in deltas.items():
        assert (delta.rank, delta.scale, delta.magnitude) == (2, scale, None)
        assert mx.array_equal(delta.a, tensors[key(module, "A")])
        assert mx.array_equal(delta.b, tensors[key(module, "B")])


def random_delta(rank: int, *shape: int, scale: float = 2.0, dora: bool = False) -> LoRADelta:
    """For a layer whose weight has this shape: (experts, out, in) or (out, in)."""
    *experts, outputs, inputs = shape
    a, b = mx.random.normal((*experts, rank, inputs)), mx.random.normal((*experts, outputs, rank))
    return LoRADelta(a, b, scale, mx.random.uniform(shape=(outputs,)) if dora else None)


def product(delta: LoRADelta) -> np.ndarray:
    """What the delta adds to a weight, in float64."""
    return delta.scale * np.array(delta.b, np.float64) @ np.array(delta.a, np.float64)


LAYER = "model.layers.1."
MLP = f"{LAYER}block_sparse_moe.switch_mlp."
Q_PROJ, GATE = f"{LAYER}self_attn.q_proj", f"{LAYER}block_sparse_moe.gate"
UP = (4, 48, 32)  # the shape of the experts' gate and up projections
DOWN = (4, 32, 48)


@pytest.mark.parametrize(
    ("model_type", "deltas", "options"),
    [
        ("llama", {Q_PROJ: (2, 32, 32), f"{LAYER}mlp.down_proj": (2, 32, 48)}, {}),
        ("llama", {Q_PROJ: (2, 32, 32), f"{LAYER}mlp.down_proj": (3, 32, 48)}, {"scale": 1.23}),
        ("llama", {Q_PROJ: (2, 32, 32), f"{LAYER}mlp.up_proj": (2, 48, 32)}, {"dora": True}),
        ("llama", {"model.embed_tokens": (2, 32, 512), "lm_head": (3, 512, 32)}, {}),
        ("mixtral", {Q_PROJ: (2, 32, 32), GATE: (2, 4, 32)}, {}),
        (
            "mixtral",
            {f"{MLP}gate_proj": (2, *UP), f"{MLP}up_proj": (3, *UP), f"{MLP}down_proj": (1, *DOWN)},
            {"scale": 0.7},
        ),
        ("mixtral", {f"{MLP}up_proj": (3, *UP), Q_PROJ: (3, 32, 32)}, {}),
        ("mixtral", {f"{MLP}gate_proj": (3, *UP), GATE: (1, 4, 32)}, {}),
        ("mixtral", {f"{MLP}down_proj": (3, *DOWN)}, {"scale": 8 / 3**0.5}),
        (
            "mixtral",
            {f"{MLP}gate_proj": (2, *UP), f"{MLP}up_proj": (3, *UP), f"{MLP}down_proj": (1, *DOWN)},
            {"separate_experts": True},
        ),
    ],
    ids=range(10),
)
def test_what_is_written_is_read(
    model_type: str, deltas: dict[str, tuple], options: dict[str, Any], tmp_path: Path
) -> None:
    """Every delta is that of its own layer, whatever else is in the file."""
    mx.random.seed(3)
    separate = options.pop("separate_experts", False)
    before = {path: random_delta(*shape, **options) for path, shape in deltas.items()}
    model = tiny_model(model_type, **(MIXTRAL if model_type == "mixtral" else UNTIED))
    rule = TABLE[model_type]
    names = {"base": "x", "revision": None, "separate_experts": separate}
    write_peft(tmp_path, before, model, rule, **names)
    after = read_peft(tmp_path, model, rule)
    for path in after.keys() - before.keys():  # what shares a parameter with one of them
        assert path.removesuffix("_proj")[-2:] in ("te", "up")
        assert not product(after[path]).any()
    for path, delta in before.items():
        np.testing.assert_allclose(product(after[path]), product(delta), rtol=1e-5, atol=1e-6)
        assert after[path].rank == delta.rank
        assert (after[path].magnitude is None) == (delta.magnitude is None)
        if delta.magnitude is not None:
            assert mx.array_equal(after[path].magnitude, delta.magnitude)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda t: t.clear(), {"target_modules": []}, "holds no tensors of an adapter"),
        (lambda t: t.pop(key(MODULES[0], "B")), {}, "q_proj has too many or too few tensors: B;?$"),
        (lambda t: None, {"use_dora": True}, "too many or too few tensors: magnitude_vector$"),
        (
            lambda t: t.update({f"base_model.model.{LONG}.lora_A": mx.zeros(1)}),
            {},
            f" {LONG[:120]} has too many or too few tensors: B$",
        ),
        (
            lambda t: t.update(
                {f"base_model.model.{m}.lora_magnitude_vector": mx.zeros(32) for m in MODULES}
            ),
            {},
            "too many or too few tensors: magnitude_vector$",
        ),
        (lambda t: t.update(x=mx.zeros(1)), {}, "'x' in .* is not a tensor of LoRA"),
        (
            lambda t: t.update({LONG: mx.zeros(1)}),
            {},
            f"'{LONG[:120]}' in .* is not a tensor of LoRA",
        ),
        (lambda t: t.update({"xlora_A.weight": mx.zeros(1)}), {}, "is not a tensor of LoRA"),
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
        (lambda t: None, {"r": 3}, "which do not belong to rank 3$"),
        (
            lambda t: t.update({key(LONG, kind): mx.zeros((2, 2)) for kind in "AB"}),
            {},
            f"1 of its modules are not in this model, e.g. {LONG[:120]};",
        ),
        *(
            (
                lambda t, kind=kind, shape=shape: t.update(
                    {key(MODULES[0], kind): mx.zeros(shape)}
                ),
                {},
                rf"A and B of {MODULES[0]} have shapes .*{re.escape(str(shape))}.* to rank 2$",
            )
            for kind, shape in (
                ("A", (3, 32)),
                ("B", (32, 3)),
                ("A", (2, 32, 1)),
                ("B", (32, 2, 1)),
            )
        ),
        (
            lambda t: None,
            {"target_modules": ["q_proj", "k_proj"]},
            f"it names 2 layers that have no tensors in .*, e.g. {MODULES[0].replace('q_', 'k_')};",
        ),
        (
            lambda t: None,
            {"target_parameters": ["mlp.experts.down_proj"]},
            "it names 1 layers that have no tensors in .*, e.g. mlp.experts.down_proj;",
        ),
        (lambda t: None, {"target_parameters": [LONG]}, f"e.g. {LONG[:120]}; the adapter is incom"),
        (lambda t: None, {"target_modules": "all-linear"}, "it names 12 layers .*0.mlp.down_proj;"),
        (
            lambda t: t.update({key(m, "A"): mx.zeros((2, 7)) for m in MODULES}),
            {},
            r"A has shape \(2, 7\); this model needs \(2, 32\)",
        ),
        *(
            (
                lambda t, name=name, shape=shape: t.update(
                    {f"base_model.model.{name}.base_layer.weight": mx.zeros(shape)}
                ),
                {},
                f"the weight of {name[:120]} in .* is the base model's and differs from the one",
            )
            for name, shape in (("lm_head", (512, 32)), ("lm_head", (9, 32)), (LONG, (2, 2)))
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_rejected(
    change: Callable[[Tensors], Any], settings: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SimPOError, match=message):
        read(peft_folder(tmp_path, change, **settings))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_the_base_models_own_weights_beside_an_adapter_are_ignored(
    dtype: mx.Dtype, is_quantized: bool, tmp_path: Path
) -> None:
    """A quantized model's differ in any case, but their shape must be right."""
    model = tiny_model(**UNTIED)
    weight = model.lm_head.weight.astype(dtype)
    if is_quantized:
        nn.quantize(model, 32, 4, class_predicate=lambda path, _: path == "lm_head")
    name = "base_model.model.lm_head.base_layer.weight"
    folder = peft_folder(tmp_path, lambda t: t.update({name: weight}))
    assert sorted(read_peft(folder, model, TABLE["llama"])) == MODULES
    peft_folder(tmp_path, lambda t: t.update({name: weight[:, :16]}))
    with pytest.raises(SimPOError, match="is the base model's and differs"):
        read_peft(folder, model, TABLE["llama"])


def test_every_weight_of_the_base_model_is_compared(tmp_path: Path) -> None:
    model = tiny_model(**UNTIED)
    name = "base_model.model.{}.base_layer.weight"
    weights = {
        "lm_head": model.lm_head.weight,
        "model.embed_tokens": model.model.embed_tokens.weight,
    }
    for wrong in weights:
        both = {name.format(n): -w if n == wrong else w for n, w in weights.items()}
        with pytest.raises(SimPOError, match=f"{wrong}.* is the base model's and differs"):
            read(peft_folder(tmp_path, lambda t, both=both: t.update(both)))


@pytest.mark.parametrize("rule", ["llama", "granitemoe", "phimoe"])
def test_models_whose_experts_are_never_single(rule: str, tmp_path: Path) -> None:
    model = tiny_model("mixtral", **MIXTRAL)
    assert sorted(read_peft(peft_folder(tmp_path), model, TABLE[rule])) == MODULES
    single_experts(tmp_path, lambda t: None)
    with pytest.raises(SimPOError, match=r"4 of its modules are not in this model"):
        read_peft(tmp_path, model, TABLE[rule])


def test_two_experts_are_called_experts(tmp_path: Path) -> None:
    tensors = {key("model.layers.0.mlp.experts", kind): mx.zeros((3, 3)) for kind in "AB"}

    folder = peft_folder(tmp_path, only(tensors), target_parameters=["experts.down_proj"])
    model = tiny_model("mixtral", **{**MIXTRAL, "num_local_experts": 2})
    with pytest.raises(SimPOError, match="belong to rank 2 of 2 experts"):
        read_peft(folder, model, TABLE["mixtral"])


def test_ranks_of_zeros_stay_where_nothing_shares_them(tmp_path: Path) -> None:
    down = random_delta(2, *DOWN)
    down = replace(down, b=down.b * mx.array([1.0, 0.0]))
    model, path = tiny_model("mixtral", **MIXTRAL), f"{MLP}down_proj"
    write_peft(tmp_path, {path: down}, model, TABLE["mixtral"], base="x", revision=None)
    assert read_peft(tmp_path, model, TABLE["mixtral"])[path].rank == 2


def test_a_parameter_that_is_named_and_has_no_tensors(tmp_path: Path) -> None:
    """Though the other parameter of its module has some."""
    mlp = "model.layers.0.block_sparse_moe.switch_mlp."
    deltas = {f"{mlp}up_proj": random_delta(2, *UP), f"{mlp}down_proj": random_delta(2, *DOWN)}
    model = tiny_model("mixtral", **MIXTRAL)
    write_peft(tmp_path, deltas, model, TABLE["mixtral"], base="x", revision=None)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_arrays(file)
    mx.eval(tensors)
    outer = {name: array for name, array in tensors.items() if ".base_layer" not in name}
    mx.save_safetensors(str(file), outer, {"format": "pt"})
    message = r"it names 1 layers that have no tensors in .*, e.g. model\.layers\.0.*gate_up_proj;"
    with pytest.raises(SimPOError, match=message):
        read_peft(tmp_path, model, TABLE["mixtral"])


def test_why_a_module_is_not_in_this_model(tmp_path: Path) -> None:
    vision = {key(f"v.{n}.q_proj", kind): mx.zeros((2, 2)) for n in (2, 1, 3) for kind in "AB"}
    folder = peft_folder(tmp_path, lambda t: t.update(vision))
    for rule, why in (
        ("phimoe", "if they are single experts: PEFT does not join single experts of phimoe$"),
        ("mixtral", r"is it an adapter of another model\?$"),
        ("gemma3", "MLX runs only the text part, so an adapter on the vision tower cannot be conv"),
    ):
        with pytest.raises(
            SimPOError, match=f"3 of its modules are not in this model, e.g. v.1.q_proj; {why}"
        ):
            read_peft(folder, tiny_model(**UNTIED), TABLE[rule])


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


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp.gate", {"target_modules": ["gate"], "rank_pattern": {"gate": 2}}),
        ("block_sparse_moe.gate", {"target_modules": ["gate"], "rank_pattern": {"gate": 2}}),
        (
            "mlp.gate",
            {
                "target_modules": [],
                "target_parameters": ["1.mlp.gate.weight"],
                "rank_pattern": {"gate.weight": 2},
            },
        ),
    ],
    ids=["module", "older name", "parameter"],
)
def test_a_module_that_transformers_has_renamed(
    name: str, settings: dict, prefix: str, tmp_path: Path
) -> None:
    """It may have the checkpoint's name, or be named by its parameter; patterns match that."""
    module = f"model.layers.1.{name}".removeprefix(prefix)
    a, b = mx.random.normal((2, 32)), mx.random.normal((4, 2))
    tensors = {key(module, "A"): a, key(module, "B"): b}

    folder = peft_folder(tmp_path, only(tensors), **{"r": 9, **settings})
    rule = replace(TABLE["mixtral"], prefix=prefix)
    deltas = read_peft(folder, tiny_model("mixtral", **MIXTRAL), rule)
    (path,) = deltas
    assert path == "model.layers.1.block_sparse_moe.gate"
    assert mx.array_equal(deltas[path].a, a)


@pytest.mark.parametrize("prefix", TEXT_PREFIXES)
def test_the_text_part_has_three_names(prefix: str, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            own = name.removeprefix("base_model.model.model.")
            tensors[f"base_model.model.{prefix}{own}"] = tensors.pop(name)

    model = tiny_model("gemma3", **OTHERWISE_BUILT["gemma3"])
    paths = [f"language_model.model.layers.{n}.self_attn.q_proj" for n in range(2)]
    folder = peft_folder(tmp_path, rename, layers_to_transform=[0, 1])
    assert sorted(read_peft(folder, model, TABLE["gemma3"])) == paths


def test_layers_that_are_not_converted_are_rejected(tmp_path: Path) -> None:
    rule = replace(TABLE["llama"], unadaptable={"q_proj": "it is split"})
    with pytest.raises(SimPOError, match="q_proj cannot be converted for llama: it is split"):
        read_peft(peft_folder(tmp_path), tiny_model(**UNTIED), rule)


def test_experts_may_have_the_names_of_transformers_5(tmp_path: Path) -> None:
    single_experts(tmp_path, lambda t: None)
    model = tiny_model("mixtral", **MIXTRAL)
    (before,) = read_peft(tmp_path, model, TABLE["mixtral"]).values()

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace("block_sparse_moe.", "mlp.")] = tensors.pop(name)

    single_experts(tmp_path, rename, target_modules=["w2"])
    (after,) = read_peft(tmp_path, model, TABLE["mixtral"]).values()
    assert after.a.shape == before.a.shape == (4, 2, 48)


def test_experts_as_a_parameter_of_another_shape_are_rejected(tmp_path: Path) -> None:
    parameter = "model.layers.0.mlp.experts"
    model = tiny_model("mixtral", **MIXTRAL)
    for shapes, message in (
        (
            ((8, 40), (32, 8)),
            "have shapes (8, 40) and (32, 8); this model has 48 inputs and 32 out",
        ),
        (
            ((8, 48), (40, 8)),
            "have shapes (8, 48) and (40, 8); this model has 48 inputs and 32 out",
        ),
        (
            ((8, 56), (32, 8)),
            "have shapes (8, 56) and (32, 8); this model has 48 inputs and 32 out",
        ),
        (
            ((8, 48), (24, 8)),
            "have shapes (8, 48) and (24, 8); this model has 48 inputs and 32 out",
        ),
        (((6, 48), (32, 6)), "which do not belong to rank 2 of 4 experts"),
    ):
        tensors = {key(parameter, kind): mx.zeros(s) for kind, s in zip("AB", shapes, strict=True)}
        peft_folder(
            tmp_path,
            only(tensors),
            target_modules=[],
            target_parameters=["experts.down_proj"],
        )
        with pytest.raises(SimPOError, match=re.escape(message)):
            read_peft(tmp_path, model, TABLE["mixtral"])
    with pytest.raises(
        SimPOError, match=r"1 of its modules are not in this model, e.g. .*experts;"
    ):
        read_peft(peft_folder(tmp_path, only(tensors)), model, TABLE["mixtral"])


LAST = "model.layers.0.block_sparse_moe.experts.3.w2"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            lambda t: [t.pop(key(LAST, kind)) for kind in "AB"],
            {},
            rf"1 experts have no tensors, e.g. {LAST}$",
        ),
        (
            lambda t: None,
            {"alpha_pattern": {r"experts\.3\.w2": 7}},
            f"the experts of {EXPERTS} have different ranks or scales",
        ),
        (
            lambda t: t.update(
                {key(LAST, "A"): mx.zeros((3, 48)), key(LAST, "B"): mx.zeros((32, 3))}
            ),
            {"rank_pattern": {r"experts\.3\.w2": 3}, "alpha_pattern": {r"experts\.3\.w2": 6}},
            f"the experts of {EXPERTS} have different ranks or scales",
        ),
    ],
)
def test_experts_that_cannot_be_stacked_are_rejected(
    change: Callable[[Tensors], Any], settings: dict, message: str, tmp_path: Path
) -> None:
    single_experts(tmp_path, change, **settings)
    with pytest.raises(SimPOError, match=message):
        read_peft(tmp_path, tiny_model("mixtral", **MIXTRAL), TABLE["mixtral"])
