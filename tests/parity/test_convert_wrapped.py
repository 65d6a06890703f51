"""Models that see: the conversions of their text parts, judged by logits, with the vision tower
going along bit for bit."""

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config, quantize_model, save
from parity.wrapped import CASES, COMPANIONS, MODELS, rewritten, saved, torch_logits, torch_model
from parity.zoo import EXACT, agree, mlx_adapter, mlx_logits
from peft import LoraConfig, get_peft_model

from mlx_simpo import SimPOError, load_model
from mlx_simpo.convert import from_hf, from_peft, fuse, to_peft

CLOSE = EXACT + 1e-3  # the floor and what is beyond it


def experts_of(name: str) -> list[str]:
    """PEFT's names for the parameters that hold a model's routed experts."""
    parameters = ("gate_up_proj", "down_proj") if MODELS[name].experts else ()
    return [f"{MODELS[name].experts}.{parameter}" for parameter in parameters]


LINEAR = r".*language_model\..*(self_attn\.[qkvo]_proj|{})"
every_case = pytest.mark.parametrize(("name", "spelling"), CASES)
TWICE = [name for name in MODELS if MODELS[name].text_class]


def tensors(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))  # type: ignore[return-value]


def peft_adapter(base: Path, folder: Path, *, alone: bool = False, **changes: Any) -> Path:
    """An adapter that PEFT made and saved, with random weights."""
    torch.manual_seed(5)
    config = LoraConfig(**({"r": 4, "lora_alpha": 6} | changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(torch_model(base, alone=alone), config)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_magnitude" in key:
                    value.mul_(1 + 0.2 * torch.randn_like(value))
                elif "lora_" in key:
                    value.normal_(0, 0.1)
        model.save_pretrained(folder)
    return folder


@every_case
def test_floor(name: str, spelling: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base", spelling)
    theirs = torch_logits(base)
    assert theirs.std() > 0.5
    assert np.abs(theirs - mlx_logits(base)).max() <= EXACT


@every_case
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_to_peft(name: str, spelling: str, dora: bool, tmp_path: Path) -> None:
    """On all linear layers, the router and the experts too."""
    base = saved(name, tmp_path / "base", spelling)
    keys = {"keys": ["self_attn.q_proj", "self_attn.o_proj"]} if dora else {}
    adapter = mlx_adapter(base, tmp_path / "mlx", dora=dora, **keys)
    to_peft(adapter, tmp_path / "peft", model=str(base), verify=False)
    ours = mlx_logits(base, adapter=adapter)
    assert np.abs(ours - mlx_logits(base)).max() > 0.1
    agree(torch_logits(base, tmp_path / "peft"), ours, CLOSE)


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("key", ["mlp", "self_attn.q_proj"])
def test_no_adapter_without_effect(name: str, key: str, tmp_path: Path) -> None:
    """AutoModelForCausalLM makes another model of these, with other paths. PEFT fails there: with
    short names it would only warn, and the adapter would do nothing."""
    base = saved(name, tmp_path / "base")
    if key == "mlp":
        key = "mlp.switch_mlp.up_proj" if "moe" in name else "mlp.up_proj"
    to_peft(
        mlx_adapter(base, tmp_path / "mlx", keys=[key]),
        tmp_path / "peft",
        model=str(base),
        verify=False,
    )
    with pytest.raises(ValueError, match=r"(?i)target[_ ]modules"):
        torch_logits(base, tmp_path / "peft", alone=True)


SETTINGS: dict[str, dict[str, Any]] = {
    "one-layer": {"num_layers": 1, "rank": 3, "scale": 1.7},
    "attention": {"keys": ["self_attn.q_proj"]},
    "up": {"keys": ["mlp.up_proj"]},
}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen3_5_moe"])
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_to_peft(name: str, case: str, tmp_path: Path) -> None:
    """Short names would mean the vision tower's layers as well; PEFT would miss their tensors."""
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx", **SETTINGS[case])
    to_peft(adapter, tmp_path / "peft", model=str(base), verify=False)
    ours = mlx_logits(base, adapter=adapter)
    assert np.abs(ours - mlx_logits(base)).max() > 0.1
    agree(torch_logits(base, tmp_path / "peft"), ours, CLOSE)


MIXTURES = {
    "qwen3_5_moe": [
        "mlp.gate",
        "mlp.switch_mlp.up_proj",
        "mlp.shared_expert.down_proj",
        "mlp.shared_expert_gate",
    ],
    "gemma4-moe": ["router.proj", "experts.switch_glu.gate_proj", "experts.switch_glu.down_proj"],
}


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in MIXTURES for key in MIXTURES[name]]
)
def test_one_of_the_mixture_to_peft(name: str, key: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx", keys=[key], scale=5.0)
    to_peft(adapter, tmp_path / "peft", model=str(base), verify=False)
    ours = mlx_logits(base, adapter=adapter)
    assert np.abs(ours - mlx_logits(base)).max() > 0.1
    agree(torch_logits(base, tmp_path / "peft"), ours, CLOSE)


@every_case
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_from_peft(name: str, spelling: str, dora: bool, tmp_path: Path) -> None:
    """By PEFT on the whole model, its text part's layers by a pattern."""
    base = saved(name, tmp_path / "base", spelling)
    mlp = r"mlp\.(gate|up|down)_proj"
    changes: dict[str, Any] = {"use_dora": dora}
    if name == "qwen3_5_moe":
        mlp = r"mlp\.shared_expert\.\w+_proj"
    if experts := experts_of(name):
        changes |= {} if dora else {"target_parameters": experts}
    adapter = peft_adapter(base, tmp_path / "peft", target_modules=LINEAR.format(mlp), **changes)
    from_peft(adapter, tmp_path / "mlx", model=str(base), verify=False)
    theirs = torch_logits(base, adapter)
    assert np.abs(theirs - torch_logits(base)).max() > 0.1
    agree(theirs, mlx_logits(base, adapter=tmp_path / "mlx"), CLOSE)


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "out_proj", "up_proj"]], ids=str)
def test_from_peft_on_the_text_part(name: str, targets: Any, tmp_path: Path) -> None:
    """By PEFT on what AutoModelForCausalLM makes of the checkpoint: other paths in its files."""
    base = saved(name, tmp_path / "base")
    experts = experts_of(name)
    if experts and targets != "all-linear":
        targets = ["q_proj", "out_proj"]
    patterns = {"rank_pattern": {r"model\.layers\.3\.self_attn\.q_proj": 2}}
    adapter = peft_adapter(
        base,
        tmp_path / "peft",
        alone=True,
        target_modules=targets,
        target_parameters=experts,
        **patterns,
    )
    from_peft(adapter, tmp_path / "mlx", model=str(base), verify=False)
    theirs = torch_logits(base, adapter, alone=True)
    assert np.abs(theirs - torch_logits(base)).max() > 0.1
    agree(theirs, mlx_logits(base, adapter=tmp_path / "mlx"), CLOSE)


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_from_peft_of_transformers_4(name: str, tmp_path: Path) -> None:
    """Before 4.52 the text part lay elsewhere; PEFT renames such an adapter while it loads."""
    base = saved(name, tmp_path / "base")
    adapter = peft_adapter(
        base, tmp_path / "peft", target_modules=r".*language_model\..*(q|down)_proj"
    )
    rewritten(
        adapter,
        lambda weights: {
            key.replace("model.language_model.", "language_model.model."): value
            for key, value in weights.items()
        },
        file="adapter_model.safetensors",
    )
    from_peft(adapter, tmp_path / "mlx", model=str(base), verify=False)
    theirs = torch_logits(base, adapter)
    assert np.abs(theirs - torch_logits(base)).max() > 0.1
    agree(theirs, mlx_logits(base, adapter=tmp_path / "mlx"), CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_on_the_vision_tower_is_refused(name: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    adapter = peft_adapter(base, tmp_path / "peft", target_modules="all-linear")
    with pytest.raises(SimPOError, match=r"not in this model.*vision tower"):
        from_peft(adapter, tmp_path / "mlx", model=str(base), verify=False)
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """MLX, PEFT, MLX: bit for bit and the same scale."""
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    to_peft(adapter, tmp_path / "peft", model=str(base), verify=False)
    from_peft(tmp_path / "peft", tmp_path / "back", model=str(base), verify=False)
    before, after = (mx.load(str(f / "adapters.safetensors")) for f in (adapter, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[key], after[key]).item() for key in before)
    settings = json.loads((tmp_path / "back/adapter_config.json").read_text(encoding="utf-8"))
    assert settings["lora_parameters"]["scale"] == 2.5


@every_case
def test_fused(name: str, spelling: str, tmp_path: Path) -> None:
    """A complete folder: what MLX did not run is there bit for bit, and both libraries compute what
    MLX does with base and adapter; then back into MLX's format."""
    base, fused = saved(name, tmp_path / "base", spelling), tmp_path / "fused"
    adapter = mlx_adapter(base, tmp_path / "mlx")
    fuse(fused, adapter=str(adapter), model=str(base), verify=False)
    live = mlx_logits(base, adapter=adapter)
    assert np.abs(live - mlx_logits(base)).max() > 0.1
    agree(torch_logits(fused), live, CLOSE)
    agree(mlx_logits(fused), live, MODELS[name].same)
    before, after = tensors(base), tensors(fused)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    beside = [k for k in before if not mx.array_equal(before[k], after[k]).item()]
    assert beside
    assert all("layers." in k and "vision" not in k and "mtp" not in k for k in beside)
    was, now = (json.loads((f / "config.json").read_text("utf-8")) for f in (base, fused))
    assert now["vision_config"] == was["vision_config"]
    assert was["text_config"].items() <= now["text_config"].items()
    assert {k: v for k, v in was.items() if k != "text_config"}.items() <= now.items()
    assert [(fused / f).read_bytes() for f in COMPANIONS] == [
        (base / f).read_bytes() for f in COMPANIONS
    ]
    from_hf(str(fused), tmp_path / "converted", verify=False)
    agree(mlx_logits(tmp_path / "converted"), live, MODELS[name].same)


@pytest.mark.parametrize("name", MODELS)
def test_the_commands_prove_it(name: str, tmp_path: Path) -> None:
    """Verified by the commands themselves, with transformers and PEFT on the whole model."""
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx", keys=["self_attn.q_proj"])
    for done in (
        to_peft(adapter, tmp_path / "peft", model=str(base), verify=True),
        from_peft(tmp_path / "peft", tmp_path / "back", model=str(base), verify=True),
        fuse(tmp_path / "fused", adapter=str(adapter), model=str(base), verify=True),
    ):
        assert len(done.comparisons) == 2
        assert all(c.passed for c in done.comparisons)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_in_bfloat16(name: str, tmp_path: Path) -> None:
    """All of it, and the configuration says so at every level."""
    base = saved(name, tmp_path / "base")
    fuse(tmp_path / "half", model=str(base), dtype="bfloat16", verify=False)
    assert {value.dtype for value in tensors(tmp_path / "half").values()} == {mx.bfloat16}
    config = json.loads((tmp_path / "half/config.json").read_text("utf-8"))
    parts = (config, config["text_config"], config["vision_config"])
    assert [part["dtype"] for part in parts] == ["bfloat16"] * 3
    torch_model(tmp_path / "half")


@pytest.mark.parametrize("name", MODELS)
def test_mlx_format_has_no_vision_tower(name: str, tmp_path: Path) -> None:
    """An adapter of a 4-bit model converts; a complete folder cannot be made of it."""
    base, small = saved(name, tmp_path / "base"), tmp_path / "small"
    loaded = load_model(str(base), dtype="float32")
    model, config = quantize_model(loaded.model, load_config(base), group_size=32, bits=4)
    save(small, str(base), model, loaded.tokenizer, config)
    adapter = mlx_adapter(small, tmp_path / "mlx", keys=["self_attn.q_proj"])
    with pytest.raises(SimPOError, match=r"MLX's names.*vision tower.*--format mlx.*--model"):
        fuse(tmp_path / "out", adapter=str(adapter), model=str(small), verify=False)
    assert not (tmp_path / "out").exists()
    fuse(tmp_path / "wide", adapter=str(adapter), model=str(small), format="mlx", verify=False)
    agree(mlx_logits(tmp_path / "wide"), mlx_logits(small, adapter=adapter), MODELS[name].same)
    to_peft(adapter, tmp_path / "peft", model=str(small), verify=False)
    torch_logits(base, tmp_path / "peft")


def test_tensors_that_no_rule_names_are_refused(tmp_path: Path) -> None:
    """MLX's own names in a file that says it is transformers'."""
    base = saved("qwen3_5_moe", tmp_path / "base")
    weights = dict(tree_flatten(load_model(str(base)).model.parameters()))
    mx.eval(weights)
    rewritten(base, lambda _: weights)
    with pytest.raises(SimPOError, match="does not have"):
        fuse(tmp_path / "out", model=str(base), verify=False)
