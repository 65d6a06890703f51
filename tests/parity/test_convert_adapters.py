"""Adapters between mlx-lm's format and PEFT's, judged by logits alone: ours computed with MLX,
theirs by PEFT on transformers' model, on tiny models of every architecture."""

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from parity.zoo import (
    ZOO,
    agree,
    attention,
    mlx_adapter,
    mlx_logits,
    saved,
    torch_logits,
    torch_model,
)
from peft import LoraConfig, get_peft_model

from mlx_simpo import SimPOError
from mlx_simpo.convert import from_peft, to_peft

CLOSE = 1e-3  # beyond the floor
MOE = [name for name in ZOO if ZOO[name].experts]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
GLU = ["gate_proj", "up_proj", "down_proj"]
SWITCH = [f"mlp.switch_mlp.{n}" for n in GLU]


def peft_adapter(base: Path, folder: Path, config: Any, dtype: Any = None, **saving: Any) -> Path:
    """An adapter that PEFT made and saved, with random weights; A's and B's both."""
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(torch_model(base), config)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_magnitude" in key:
                    value.mul_(1 + 0.2 * torch.randn_like(value))
                elif "lora_" in key:
                    value.normal_(0, 0.1)
        model.to(dtype or torch.float32)
        model.save_pretrained(folder, **saving)
    return folder


def check_exported(name: str, base: Path, adapter: Path, output: Path) -> None:
    """MLX adapter -> PEFT: what PEFT computes is what MLX computes, and something at all."""
    to_peft(adapter, output, model=str(base), verify=False)
    ours = mlx_logits(base, adapter=adapter)
    assert np.abs(ours - mlx_logits(base)).max() > 0.1
    agree(torch_logits(base, adapter=output), ours, ZOO[name].floor + CLOSE)


def check_imported(name: str, base: Path, adapter: Path, output: Path) -> None:
    """PEFT adapter -> MLX."""
    from_peft(adapter, output, model=str(base), verify=False)
    theirs = torch_logits(base, adapter=adapter)
    assert np.abs(theirs - torch_logits(base)).max() > 0.1
    agree(theirs, mlx_logits(base, adapter=output), ZOO[name].floor + CLOSE)


@pytest.mark.parametrize("name", ZOO)
def test_to_peft(name: str, tmp_path: Path) -> None:
    """All linear layers of the blocks: routers, experts and shared experts too."""
    base = saved(name, tmp_path / "base")
    check_exported(name, base, mlx_adapter(base, tmp_path / "mlx"), tmp_path / "peft")


@pytest.mark.parametrize("name", ZOO)
def test_dora_to_peft(name: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    chosen = {"keys": [f"self_attn.{n}" for n in attention(name)]} if name in MOE else {}
    adapter = mlx_adapter(base, tmp_path / "mlx", dora=True, **chosen)
    check_exported(name, base, adapter, tmp_path / "peft")


@pytest.mark.parametrize(
    ("name", "key"), [("deepseek_v2", "mlp.down_proj"), ("mixtral", "block_sparse_moe.gate")]
)
def test_dora_of_a_parameter_is_refused(name: str, key: str, tmp_path: Path) -> None:
    """PEFT reaches these as parameters only, and there it has no DoRA."""
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx", dora=True, keys=[key])
    with pytest.raises(SimPOError, match=rf"DoRA.*{key.rpartition('.')[2]}.*fuse"):
        to_peft(adapter, tmp_path / "peft", model=str(base), verify=False)


PARTIAL: dict[str, dict[str, Any]] = {
    "last-layer": {"num_layers": 1},
    "zero-is-all": {"num_layers": 0},
    "scale-no-integer": {"rank": 3, "scale": 1.7},
    "scale-one-alpha": {"rank": 8, "scale": 0.125},
    "full-path": {"num_layers": 1, "keys": ["model.layers.0.self_attn.q_proj"]},
    "dropout": {"dropout": 0.05},
}


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_5_text", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("case", PARTIAL)
def test_settings_to_peft(name: str, case: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    settings = dict(PARTIAL[case])
    if case == "full-path" and name == "qwen3_5_text":  # its layer 0 has another attention
        settings["keys"] = ["language_model.model.layers.3.self_attn.q_proj"]
    check_exported(name, base, mlx_adapter(base, tmp_path / "mlx", **settings), tmp_path / "peft")


ALONE = {
    "llama": ["lm_head", "model.embed_tokens"],
    "gemma4_text": ["model.per_layer_model_projection"],
    "mixtral": ["block_sparse_moe.gate", "block_sparse_moe.switch_mlp.up_proj"],
    "phimoe": ["block_sparse_moe.gate", "block_sparse_moe.switch_mlp.up_proj"],
    "qwen3_moe": ["mlp.gate", *SWITCH],
    "olmoe": ["mlp.gate"],
    "qwen2_moe": ["mlp.gate", SWITCH[0], "mlp.shared_expert.gate_proj"],
    "deepseek_v2": ["mlp.down_proj", "mlp.shared_experts.up_proj", SWITCH[1]],
    "deepseek_v3": ["mlp.gate_proj", "mlp.shared_experts.down_proj"],
    "granitemoe": ["block_sparse_moe.router.layer", "block_sparse_moe.switch_mlp.gate_proj"],
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in ALONE for key in ALONE[name]])
def test_alone_to_peft(name: str, key: str, tmp_path: Path) -> None:
    """One layer and no other: half of what PEFT has fused, or what it calls a parameter."""
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx", keys=[key], scale=5.0)
    check_exported(name, base, adapter, tmp_path / "peft")


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "cohere"])
def test_tied_embedding_is_refused(name: str, tmp_path: Path) -> None:
    """PEFT would adapt the embedding and not the head."""
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx", keys=["model.embed_tokens"])
    with pytest.raises(SimPOError, match=r"(?s)tied.*fuse|fuse.*tied"):
        to_peft(adapter, tmp_path / "peft", model=str(base), verify=False)
    assert not (tmp_path / "peft").exists()


def peft_config(name: str, **changes: Any) -> LoraConfig:
    """For all that can be converted: linear layers, and fused experts as target_parameters."""
    modules = attention(name) if name in MOE else "all-linear"
    wanted = {"r": 4, "lora_alpha": 6, "target_modules": modules}
    if name in MOE:
        wanted["target_parameters"] = [
            f"{ZOO[name].experts}.{p}" for p in ("gate_up_proj", "down_proj")
        ]
    return LoraConfig(**(wanted | changes))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_from_peft(name: str, dora: bool, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    config = peft_config(name, **({"use_dora": True, "target_parameters": None} if dora else {}))
    check_imported(name, base, peft_adapter(base, tmp_path / "peft", config), tmp_path / "mlx")


EXPERT_VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "gate-up": {"target_parameters": EXPERTS[:1]},
    "down": {"target_parameters": EXPERTS[1:]},
    "alone": {"target_modules": []},
    "last-layer": {"target_parameters": [f"model.layers.1.{p}" for p in EXPERTS]},
    "patterns": {
        "rank_pattern": {r"mlp\.experts\.gate_up_proj": 7, "q_proj": 2},
        "alpha_pattern": {r".*\.0\.mlp\.experts\.down_proj": 9},
    },
    "short": {"target_parameters": ["gate_up_proj", "down_proj"]},
    "router": {"target_parameters": ["mlp.gate.weight"]},
    "all-linear": {"target_modules": "all-linear", "target_parameters": None},
}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "qwen2_moe"])
@pytest.mark.parametrize("case", EXPERT_VARIANTS)
def test_experts_from_peft(name: str, case: str, tmp_path: Path) -> None:
    """all-linear: of these models PEFT makes it the router and fused experts of twice the rank."""
    base = saved(name, tmp_path / "base")
    config = peft_config(name, **EXPERT_VARIANTS[case])
    adapter = peft_adapter(base, tmp_path / "peft", config)
    check_imported(name, base, adapter, tmp_path / "mlx")


PER_EXPERT = {"mixtral": ["w1", "w3", "w2"]} | dict.fromkeys(MOE[2:-1], GLU)


@pytest.mark.parametrize("name", PER_EXPERT)
def test_pairs_per_expert_from_peft(name: str, tmp_path: Path) -> None:
    """As transformers 4 had the experts: a pair each. PEFT fuses them while it loads."""
    base, adapter = saved(name, tmp_path / "base"), tmp_path / "peft"
    rng = np.random.default_rng(3)
    weights = {}
    for key, value in mx.load(str(base / "model.safetensors")).items():
        if ".experts." in key:
            rows, columns = value.shape
            path = f"base_model.model.{key.removesuffix('.weight')}"
            for end, shape in (("lora_A", (4, columns)), ("lora_B", (rows, 4))):
                random = rng.normal(0, 0.1, shape).astype(np.float32)
                weights[f"{path}.{end}.weight"] = mx.array(random)
    LoraConfig(r=4, lora_alpha=6, target_modules=PER_EXPERT[name]).save_pretrained(adapter)
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), weights, {"format": "pt"})
    if name == "qwen2_moe":  # PEFT itself does not load it: the config means the shared expert
        with pytest.raises(AssertionError, match="missing"):
            torch_logits(base, adapter=adapter)
        return
    check_imported(name, base, adapter, tmp_path / "mlx")


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 6},
        "alpha_pattern": {r"^model\.layers\.0\.mlp\.(up|down)_proj": 11, "v_proj": 3},
    },
    "patterns-rslora": {"rank_pattern": {"up_proj": 2}, "use_rslora": True},
    "patterns-dora": {"rank_pattern": {"up_proj": 2}, "use_dora": True},
    "one-layer": {"layers_to_transform": 1, "target_modules": ["q_proj", "up_proj"]},
    "layers": {
        "layers_to_transform": [0],
        "layers_pattern": "layers",
        "target_modules": ["k_proj"],
    },
    "regex": {"target_modules": r".*\.(0\.self_attn\.[qv]_proj|1\.mlp\.\w+_proj)"},
    "excluded": {"exclude_modules": r".*\.0\.mlp\.up_proj"},
    "suffix": {"target_modules": ["self_attn.o_proj", "model.layers.1.mlp.gate_proj"]},
    "alpha": {"lora_alpha": 6.3},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "dropout": {"lora_dropout": 0.1},
}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("case", VARIANTS)
def test_variants_from_peft(name: str, case: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    config = LoraConfig(
        **({"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | VARIANTS[case])
    )
    adapter = peft_adapter(base, tmp_path / "peft", config, save_embedding_layers=False)
    check_imported(name, base, adapter, tmp_path / "mlx")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_saved_embedding_from_peft(target: str, tmp_path: Path) -> None:
    """Of an adapted head or embedding PEFT saves the base's weights beside the adapter's."""
    base = saved("llama", tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", target])
    check_imported("llama", base, peft_adapter(base, tmp_path / "peft", config), tmp_path / "mlx")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_from_peft(name: str, tmp_path: Path) -> None:
    """The adapter's own numbers, not rounded once more; asked for, they are float32."""
    base = saved(name, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=GLU)
    adapter = peft_adapter(base, tmp_path / "peft", config, torch.bfloat16)
    check_imported(name, base, adapter, tmp_path / "mlx")
    from_peft(adapter, tmp_path / "float32", model=str(base), dtype="float32", verify=False)
    kept, wide = (contents(tmp_path / k, "adapters.safetensors")[0] for k in ("mlx", "float32"))
    assert {str(v.dtype) for v in wide.values()} == {"mlx.core.float32"}
    assert all(mx.array_equal(kept[k].astype(mx.float32), v).item() for k, v in wide.items())


def contents(folder: Path, weights: str) -> tuple[dict[str, mx.array], dict[str, Any]]:
    read = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return mx.load(str(folder / weights)), read  # type: ignore[return-value]


def same(first: dict[str, mx.array], second: dict[str, mx.array]) -> None:
    assert first.keys() == second.keys()
    assert [k for k, v in first.items() if not mx.array_equal(v, second[k]).item()] == []


@pytest.mark.parametrize("name", ZOO)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """MLX, PEFT, MLX: bit for bit and the same scale; and from there to PEFT, bit for bit again."""
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    for turn, (convert, source) in enumerate([(to_peft, "mlx"), (from_peft, "0"), (to_peft, "1")]):
        convert(tmp_path / source, tmp_path / str(turn), model=str(base), verify=False)
    before, settings = contents(adapter, "adapters.safetensors")
    after, read = contents(tmp_path / "1", "adapters.safetensors")
    same(before, after)
    for key in ("rank", "scale"):
        assert read["lora_parameters"][key] == settings["lora_parameters"][key]
    first, _ = contents(tmp_path / "0", "adapter_model.safetensors")
    same(first, contents(tmp_path / "2", "adapter_model.safetensors")[0])


@pytest.mark.parametrize("name", [name for name in ZOO if name not in MOE])
def test_peft_there_and_back(name: str, tmp_path: Path) -> None:
    """PEFT, MLX, PEFT: what PEFT saved for a uniform adapter, bit for bit, and the same scaling."""
    base = saved(name, tmp_path / "base")
    adapter = peft_adapter(base, tmp_path / "peft", peft_config(name))
    from_peft(adapter, tmp_path / "mlx", model=str(base), verify=False)
    to_peft(tmp_path / "mlx", tmp_path / "back", model=str(base), verify=False)
    before, config = contents(adapter, "adapter_model.safetensors")
    after, again = contents(tmp_path / "back", "adapter_model.safetensors")
    same(before, after)
    assert config["lora_alpha"] / config["r"] == again["lora_alpha"] / again["r"]
