"""Adapter folders: mlx-lm loads what is written; adapters of other models are rejected."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from helpers.commands import arrays, assert_same_arrays, changed_copy
from helpers.tiny import tiny_config, tiny_folder, tiny_model
from mlx.utils import tree_flatten, tree_map

from mlx_simpo import LoRAConfig, SimPOError
from mlx_simpo.files import load_safetensors, read_header, save_safetensors
from mlx_simpo.model import adapters as adapters_module
from mlx_simpo.model.adapters import (
    CONFIG,
    WEIGHTS,
    check_adapter,
    check_fits,
    check_parameters,
    flat_arrays,
    load_adapter,
    load_weights,
    save_adapter,
    write_adapter,
)
from mlx_simpo.model.loading import load_model
from mlx_simpo.model.lora import attach_lora

TOKENS = mx.random.randint(0, 500, (2, 16), key=mx.random.key(3))
VARIANTS: list[dict[str, Any]] = [
    {"rank": 4},
    {"rank": 4, "dora": True},
    {"rank": 4, "rslora": True, "lora_alpha": 3.0},
    {"rank": 4, "scale": 7.0},
    {"rank": 4, "num_layers": 1},
    {"rank": 4, "target_modules": ("q_proj", "mlp.up_proj")},
    {"rank": 4, "dropout": 0.5},  # off in evaluation
]


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "quantized")
    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    model = tiny_model(**sizes)
    nn.quantize(model, group_size=32, bits=4)
    config = {**tiny_config(**sizes), "quantization": {"group_size": 32, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(TOKENS))


def moved(model: nn.Module, **settings: Any) -> dict[str, Any]:
    """Attach LoRA and move its weights, as training would; its configuration."""
    adapter = attach_lora(model, LoRAConfig(**settings), seed=0)
    mx.random.seed(11)
    change = tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.trainable_parameters())
    model.update(change)
    model.eval()
    return adapter


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("base", ["model_folder", "quantized_folder"])
def test_mlx_lm_and_we_load_the_model_that_was_saved(
    base: str, settings: dict, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = str(request.getfixturevalue(base))
    model = load_model(folder).model
    untrained = logits(model)
    save_adapter(tmp_path, model, moved(model, **settings))
    expected = logits(model)
    assert np.abs(expected - untrained).max() > 0.1
    theirs = mlx_lm.load(folder, adapter_path=str(tmp_path))[0]
    np.testing.assert_allclose(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    load_adapter(ours := load_model(folder).model, tmp_path)
    np.testing.assert_allclose(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert not ours.training
    assert flat_arrays(ours.trainable_parameters()).keys() == arrays(tmp_path / WEIGHTS).keys()
    check_fits(load_model(folder).model, tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 4 for every linear layer of `tiny_model`."""
    model = tiny_model()
    return save_adapter(tmp_path_factory.mktemp("adapters") / "a", model, moved(model, rank=4))


def test_the_files_are_the_two_of_mlx_lm(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names == {"adapters.safetensors", "adapter_config.json"}
    assert read_header(saved / WEIGHTS).format == "mlx"


def test_the_configuration_is_what_was_attached(saved: Path) -> None:
    """As mlx-lm writes it, for people to read."""
    expected = attach_lora(tiny_model(), LoRAConfig(rank=4), seed=0)
    text = json.dumps(expected, indent=4, sort_keys=True) + "\n"
    assert (saved / CONFIG).read_text("utf-8") == text
    assert load_adapter(tiny_model(), saved) == expected


def test_all_files_are_on_the_disk_before_one_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written in a folder beside the place that they are moved to, on the same disk."""
    folder, names, synced = tmp_path / "new" / "a", {WEIGHTS, CONFIG, "notes.txt"}, []

    def sync(path: Path) -> None:
        synced.append(path)
        if path != folder:
            assert path.is_file()
            assert path.parent.parent == folder
            assert path.parent.name.startswith(".saving-")
            assert not names & {file.name for file in folder.iterdir()}

    monkeypatch.setattr(adapters_module, "sync", sync)
    assert write_adapter(str(folder), {"a": mx.zeros(1)}, {}, {"notes.txt": "new"}) == folder
    assert {path.name for path in synced[:-1]} == names == {path.name for path in folder.iterdir()}
    assert synced[-1] == folder  # with their names


def test_only_adapter_weights_are_written_in_float32(saved: Path) -> None:
    weights = arrays(saved / WEIGHTS)
    assert len(weights) == 2 * 2 * 7  # a and b, two layers, seven modules
    assert {name.rpartition(".")[2] for name in weights} == {"lora_a", "lora_b"}
    assert {value.dtype.name for value in weights.values()} == {"float32"}


def test_a_half_precision_base_has_a_float32_adapter(tmp_path: Path) -> None:
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    save_adapter(tmp_path, model, attach_lora(model, LoRAConfig(rank=4, dora=True), seed=0))
    assert {value.dtype.name for value in arrays(tmp_path / WEIGHTS).values()} == {"float32"}


def test_saving_again_replaces_both_files(saved: Path, tmp_path: Path) -> None:
    folder, model = changed_copy(saved, tmp_path / "again"), tiny_model()
    save_adapter(folder, model, moved(model, rank=2))
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG}
    load_adapter(loaded := tiny_model(), folder)
    np.testing.assert_allclose(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_failing_save_leaves_the_old_adapter(saved: Path, tmp_path: Path) -> None:
    folder, model = changed_copy(saved, tmp_path / "kept"), tiny_model()
    with pytest.raises(TypeError):
        save_adapter(folder, model, {**moved(model, rank=2), "no JSON": object()})
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG}
    assert_same_arrays(arrays(folder / WEIGHTS), arrays(saved / WEIGHTS))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "notes.txt"])
def test_a_disk_that_fills_up_at_any_file_leaves_the_old_adapter(
    name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = changed_copy(saved, tmp_path / "full"), tiny_model()
    adapter = moved(model, rank=2)
    save_adapter(folder, model, adapter, {"notes.txt": "old"})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path: Path) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters_module, "sync", full)
    moved_again = moved(tiny_model(), rank=4)
    message = f"^the adapter cannot be written to {folder}: .*No space left on device"
    with pytest.raises(SimPOError, match=message):
        save_adapter(folder, model, moved_again, {"notes.txt": "new"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_are_replaced_and_never_written_into(saved: Path, tmp_path: Path) -> None:
    """A hard link to one, in a backup for example, keeps the old content."""
    folder, model = changed_copy(saved, tmp_path / "again"), tiny_model()
    adapter = moved(model, rank=4)
    save_adapter(folder, model, adapter, {"notes.txt": "old, of half an emoji: \ud83d"})
    (tmp_path / "link").hardlink_to(folder / "notes.txt")
    save_adapter(folder, model, adapter, {"notes.txt": "new"})
    assert (tmp_path / "link").read_text("utf-8") == "old, of half an emoji: \\ud83d"
    assert (folder / "notes.txt").read_text("utf-8") == "new"


def test_a_run_starts_from_an_existing_adapter(saved: Path) -> None:
    trained, started = tiny_model(), tiny_model()
    load_adapter(trained, saved)
    attach_lora(started, LoRAConfig(rank=4, init_from=str(saved)), seed=9)
    np.testing.assert_allclose(logits(started.eval()), logits(trained), rtol=1e-5, atol=1e-5)


# --- adapters that do not fit ---------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0}},
        {"lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}},
        {"fine_tune_type": "dora"},
        {"num_layers": 1},
    ],
    ids=str,
)
def test_settings_that_differ_from_the_weights(changes: dict, saved: Path, tmp_path: Path) -> None:
    text = json.dumps({**json.loads((saved / CONFIG).read_text("utf-8")), **changes})
    folder = changed_copy(saved, tmp_path / "wrong", adapter_config__json=text)
    with pytest.raises(SimPOError, match=f"{folder}.*this model") as error:
        load_adapter(tiny_model(), folder)
    assert len(str(error.value).partition("does not fit this model: ")[2]) <= 300


@pytest.mark.parametrize(
    "model",
    [
        {"hidden_size": 64},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1},
    ],
    ids=str,
)
def test_the_adapter_of_another_model(model: dict, saved: Path) -> None:
    with pytest.raises(SimPOError, match="this model"):
        load_adapter(tiny_model(**model), saved)
    with pytest.raises(SimPOError, match=r"not a complete adapter of this model|other settings"):
        attach_lora(tiny_model(**model), LoRAConfig(rank=4, init_from=str(saved)), seed=0)


A = "model.layers.0.mlp.down_proj.lora_a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({A: None}, f"1 missing, e.g. {A};"),
        ({A: None, A.replace("0", "1"): None}, f"2 missing, e.g. {A};"),
        ({"x.lora_a": mx.zeros(2)}, "1 unknown, e.g. x.lora_a;"),
        ({A: mx.zeros((4, 48))}, f"1 of another shape, e.g. {A};"),
        ({A: mx.zeros((48, 4), mx.int32)}, f"1 not floating-point, e.g. {A};"),
        (
            {A: None, "x": mx.zeros(2), "y": mx.zeros(2, mx.uint8)},
            f"1 missing, e.g. {A}; 2 unknown, e.g. x; 1 not floating-point, e.g. y;",
        ),
    ],
    ids=range(6),
)
def test_weights_that_are_not_exactly_the_models(
    changes: dict[str, mx.array | None], message: str, saved: Path, tmp_path: Path
) -> None:
    folder = changed_copy(saved, tmp_path / "a")
    weights = load_safetensors([folder / WEIGHTS])
    mx.eval(weights)
    weights = {name: w for name, w in (weights | changes).items() if w is not None}
    save_safetensors(folder / WEIGHTS, weights, "mlx")
    attach_lora(model := tiny_model(), LoRAConfig(rank=4), seed=0)
    before = logits(model)
    with pytest.raises(SimPOError, match=re.escape(f"adapter of this model: {message} use the")):
        load_weights(model, folder)
    np.testing.assert_array_equal(logits(model), before)


LONG = "x" * 99
VALID = {"rank": 1, "scale": -0.5, "keys": ["q_proj"]}


@pytest.mark.parametrize(
    ("parameters", "num_layers", "message"),
    [
        ({}, -1, None),
        ({"rank": 65_536, "scale": 1e6, "keys": None}, 2, None),
        ({"rank": 65_536, "scale": -1_000_000, "keys": []}, 2, None),
        ({"rank": 0}, 2, "rank is 0; it must be 1 to 65536"),
        ({"rank": 65_537}, 2, "rank is 65537; it must"),
        ({"rank": True}, 2, "rank is True; it must"),
        ({"rank": 4.0}, 2, "rank is 4.0; it must"),
        ({"rank": LONG}, 2, f"rank is {LONG[:40]}; it must"),
        (
            {"scale": 1.000001e6},
            2,
            "scale is 1000001.0; it must be a finite number of at most 1e+06",
        ),
        ({"scale": -1_000_001}, 2, "scale is -1000001; it must"),
        ({"scale": float("nan")}, 2, "scale is nan; it must"),
        ({"scale": True}, 2, "scale is True; it must"),
        ({"scale": None}, 2, "scale is None; it must"),
        ({"scale": LONG}, 2, f"scale is {LONG[:40]}; it must"),
        ({}, True, "num_layers is True; it must be a whole number"),
        ({}, None, "num_layers is None; it must"),
        ({}, LONG, f"num_layers is {LONG[:40]}; it must"),
        ({"keys": LONG}, 2, f"keys must be a list of names, not {LONG[:40]}"),
        ({"keys": ["a", 1]}, 2, "keys must be a list of names, not ['a', 1]"),
    ],
    ids=str,
)
def test_the_settings_that_layers_are_built_from(
    parameters: dict, num_layers: Any, message: str | None
) -> None:
    config = {"lora_parameters": VALID | parameters, "num_layers": num_layers}
    if message is None:
        check_parameters(config, "here")
        return
    with pytest.raises(SimPOError, match=f"^{re.escape(f'here: {message}')}(?!x)"):
        check_parameters(config, "here")


NO_PARAMETERS = '{"lora_parameters": null, "num_layers": -1}'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config__json": None}, r"cannot read .*adapter_config"),
        ({"adapter_config__json": '{"rank": '}, r"cannot read .*adapter_config"),
        ({"adapter_config__json": b"\xff\xfe"}, r"cannot read .*adapter_config"),
        ({"adapter_config__json": "{}"}, "no lora_parameters"),
        ({"adapter_config__json": '{"peft_type": "LORA"}'}, "a PEFT adapter"),
        ({"adapters__safetensors": None}, WEIGHTS),
        ({"adapters__safetensors": b""}, "not a valid safetensors file"),
        ({"adapter_config__json": "null"}, "must hold a JSON object"),
        ({"adapter_config__json": NO_PARAMETERS}, "adapter_config.json has no lora_parameters"),
        ({"adapter_config__json": '{"fine_tune_type": "full"}'}, "fine_tune_type 'full'; it must"),
        (
            {"adapter_config__json": json.dumps({"fine_tune_type": "y" * 99})},
            f"fine_tune_type '{'y' * 40}'; it must be lora or dora",
        ),
    ],
)
def test_a_broken_folder_is_named(files: dict, message: str, saved: Path, tmp_path: Path) -> None:
    folder = changed_copy(saved, tmp_path / "broken", **files)
    with pytest.raises(SimPOError, match=message) as error:
        load_adapter(tiny_model(), folder)
    assert str(folder) in str(error.value)


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SimPOError, match=r"the adapter cannot be written to .*file"):
        save_adapter(tmp_path / "file", tiny_model(), {})


# --- before a model is loaded or computes ----------------------------------------------------


def test_a_valid_adapter_passes_and_fits(saved: Path) -> None:
    model = tiny_model()
    assert check_adapter(saved) == json.loads((saved / CONFIG).read_text("utf-8"))
    before = logits(model)
    check_fits(model, saved)
    np.testing.assert_array_equal(logits(model), before)
    assert not any("lora" in name for name, _ in tree_flatten(model.parameters()))


def test_an_adapter_of_experts_fits_its_model(tmp_path: Path) -> None:
    experts: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = tiny_model("mixtral", **experts)
    save_adapter(tmp_path, model, moved(model, rank=4))
    check_fits(tiny_model("mixtral", **experts), tmp_path)
    with pytest.raises(SimPOError, match=r"it has no model\.layers\.0\.block_sparse_moe\.gate;"):
        check_fits(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config__json": None}, "is not the folder of an adapter: cannot read .*_config"),
        ({"adapter_config__json": "{"}, "cannot read .*adapter_config.json: Expecting property"),
        ({"adapters__safetensors": None}, "cannot read .*adapters.safetensors: there is no such"),
        ({"adapters__safetensors": b"x"}, "adapters.safetensors is not a valid safetensors file"),
    ],
)
def test_a_folder_without_a_valid_adapter(
    files: dict, message: str, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(SimPOError, match=message):
        check_adapter(changed_copy(saved, tmp_path / "a", **files))
    with pytest.raises(SimPOError, match="is not the folder of an adapter: cannot read"):
        check_adapter(tmp_path)


def test_an_adapter_without_weights(saved: Path, tmp_path: Path) -> None:
    folder = changed_copy(saved, tmp_path / "a")
    mx.save_safetensors(str(folder / WEIGHTS), {"x": mx.zeros(1)}, {"format": "mlx"})
    with pytest.raises(SimPOError, match=r"adapters.safetensors holds no LoRA weights; use a comp"):
        check_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "bits", "problem"),
    [
        ({"num_hidden_layers": 1}, 0, r"it has no model\.layers\.1\.mlp\.down_proj"),
        (
            {"hidden_size": 64, "intermediate_size": 64},
            4,
            r"its model\.layers\.0\.mlp\.down_proj has 64 outputs, and \S+down_proj\.lora_b the "
            r"shape \(4, 32\)",
        ),
        (
            {"intermediate_size": 64},
            0,
            r"its model\.layers\.0\.mlp\.gate_proj has 64 outputs, and \S+gate_proj\.lora_b the "
            r"shape \(4, 48\)",
        ),
    ],
)
def test_an_adapter_of_another_model_does_not_fit(
    changes: dict, bits: int, problem: str, saved: Path
) -> None:
    model = tiny_model(**changes)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    message = f"the adapter in {saved} does not fit this model: {problem}; use the model that it"
    with pytest.raises(SimPOError, match=message):
        check_fits(model, saved)
