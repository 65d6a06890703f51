"""Whole models, fused with MLX and read by transformers; and what is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.utils import load_config, quantize_model, save
from parity.zoo import TOKENS, ZOO, agree, mlx_adapter, mlx_logits, saved, torch_logits, torch_model
from peft import IA3Config, LoraConfig, get_peft_model

from mlx_simpo import SimPOError, load_adapter, load_model
from mlx_simpo.convert import from_peft, fuse, to_peft

CLOSE = 1e-3  # beyond the floor
SAME = 1e-4  # of the same weights in the same framework


def tensors(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= mx.load(str(path))  # type: ignore[arg-type]
    return found


def quantized(base: Path, folder: Path) -> Path:
    """4 bits in groups of 32, as mlx_lm.convert writes it."""
    loaded = load_model(str(base), dtype="float32")
    model, config = quantize_model(loaded.model, load_config(base), group_size=32, bits=4)
    save(folder, str(base), model, loaded.tokenizer, config)
    return folder


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_fused(name: str, dora: bool, tmp_path: Path) -> None:
    """Base and adapter in one: transformers and mlx-lm both compute what MLX does with the two."""
    base, fused = saved(name, tmp_path / "base"), tmp_path / "fused"
    chosen = {"keys": ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]} if dora else {}
    if dora and name == "deepseek_v3":
        chosen = {"keys": ["self_attn.q_b_proj", "mlp.shared_experts.up_proj"]}
    adapter = mlx_adapter(base, tmp_path / "mlx", dora=dora, **chosen)
    fuse(fused, adapter=str(adapter), model=str(base), dtype="float32", verify=False)
    live = mlx_logits(base, adapter=adapter)
    assert np.abs(live - mlx_logits(base)).max() > 0.1
    agree(torch_logits(fused), live, ZOO[name].floor + CLOSE)
    agree(mlx_logits(fused), live, SAME)
    assert {k: v.shape for k, v in tensors(base).items()} == {
        k: v.shape for k, v in tensors(fused).items()
    }


@pytest.mark.parametrize("name", ZOO)
def test_back_from_mlx(name: str, tmp_path: Path) -> None:
    """A model as mlx-lm saves it (experts stacked, tensors renamed and transposed) is again what
    transformers had saved, tensor by tensor."""
    base, ours, back = saved(name, tmp_path / "base"), tmp_path / "mlx", tmp_path / "back"
    loaded = load_model(str(base))
    save(ours, str(base), loaded.model, loaded.tokenizer, load_config(base))
    fuse(back, model=str(ours), verify=False)
    before, after = tensors(base), tensors(back)
    assert before.keys() == after.keys()
    changed = [key for key in before if not mx.array_equal(before[key], after[key]).item()]
    if name == "qwen3_5_text":  # mlx-lm adds 1 to its norms, which rounds
        assert all(key.endswith("norm.weight") for key in changed)
        assert all(mx.allclose(before[key], after[key], atol=1e-6).item() for key in changed)
    else:
        assert changed == []
    agree(torch_logits(base), torch_logits(back), SAME)
    agree(mlx_logits(base), mlx_logits(back), SAME)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3_moe"])
def test_4bit(name: str, tmp_path: Path) -> None:
    """An adapter of a 4-bit model is one of the dequantized model, in torch as in MLX."""
    base = saved(name, tmp_path / "base")
    small = quantized(base, tmp_path / "small")
    adapter = mlx_adapter(small, tmp_path / "mlx")
    fuse(tmp_path / "wide", model=str(small), dtype="float32", verify=False)
    to_peft(adapter, tmp_path / "peft", model=str(small), verify=False)
    live, bound = mlx_logits(small, adapter=adapter), ZOO[name].floor + CLOSE
    assert np.abs(live - mlx_logits(small)).max() > 0.1
    assert np.abs(mlx_logits(small) - mlx_logits(base)).max() > 10 * bound
    agree(torch_logits(tmp_path / "wide"), mlx_logits(small), bound)
    agree(torch_logits(tmp_path / "wide", adapter=tmp_path / "peft"), live, bound)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3_moe"])
def test_4bit_fused(name: str, tmp_path: Path) -> None:
    small = quantized(saved(name, tmp_path / "base"), tmp_path / "small")
    adapter = mlx_adapter(small, tmp_path / "mlx")
    fuse(tmp_path / "fused", adapter=str(adapter), model=str(small), dtype="float32", verify=False)
    live = mlx_logits(small, adapter=adapter)
    agree(torch_logits(tmp_path / "fused"), live, ZOO[name].floor + CLOSE)
    agree(mlx_logits(tmp_path / "fused"), live, SAME)


def test_tied_embedding_fused(tmp_path: Path) -> None:
    """The way out that the refusal names: fused, the head is what MLX makes of it."""
    base = saved("llama-tied", tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx", keys=["model.embed_tokens"])
    fuse(tmp_path / "fused", adapter=str(adapter), model=str(base), dtype="float32", verify=False)
    live = mlx_logits(base, adapter=adapter)
    assert np.abs(live - mlx_logits(base)).max() > 0.1
    agree(torch_logits(tmp_path / "fused"), live, ZOO["llama-tied"].floor + CLOSE)


def test_fused_in_bfloat16(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    for dtype, folder in (("bfloat16", tmp_path / "half"), ("float32", tmp_path / "full")):
        fuse(folder, adapter=str(adapter), model=str(base), dtype=dtype, verify=False)
    rounded = tree_map(lambda v: v.astype(mx.bfloat16), tensors(tmp_path / "full"))
    half = tensors(tmp_path / "half")
    assert rounded.keys() == half.keys()
    assert all(mx.array_equal(rounded[key], half[key]).item() for key in half)
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    torch_model(tmp_path / "half")


REFUSED: dict[str, tuple[str, Any]] = {
    "bias": ("bias", {"bias": "all"}),
    "lora-bias": ("bias", {"lora_bias": True}),
    "modules": ("modules_to_save", {"modules_to_save": ["lm_head"]}),
    "tokens": ("token", {"trainable_token_indices": [3, 4]}),
    "other": ("IA3", None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_peft_refused(case: str, tmp_path: Path) -> None:
    """What mlx-lm has no place for, by its name and before anything is written."""
    said, changes = REFUSED[case]
    base = saved("llama", tmp_path / "base")
    config: Any = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    if changes is not None:
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(torch_model(base), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(SimPOError, match=said):
        from_peft(tmp_path / "peft", tmp_path / "mlx", model=str(base), verify=False)
    assert not (tmp_path / "mlx").exists()


def test_kv_b_of_deepseek_v3_is_refused(tmp_path: Path) -> None:
    """mlx-lm has absorbed it into two others."""
    base = saved("deepseek_v3", tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["kv_b_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(torch_model(base), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(SimPOError, match="kv_b_proj"):
        from_peft(tmp_path / "peft", tmp_path / "mlx", model=str(base), verify=False)


@pytest.mark.parametrize("end", ["lora_a", "lora_b"])
def test_incomplete_adapter_is_refused(end: str, tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    path = adapter / "adapters.safetensors"
    weights = mx.load(str(path))
    lost = f"model.layers.1.mlp.up_proj.{end}"
    mx.save_safetensors(str(path), {k: mx.array(v) for k, v in weights.items() if k != lost})
    for write in (
        lambda: to_peft(adapter, tmp_path / "out", model=str(base), verify=False),
        lambda: fuse(tmp_path / "out", adapter=str(adapter), model=str(base), verify=False),
    ):
        with pytest.raises(SimPOError, match=r"model\.layers\.1\.mlp\.up_proj"):
            write()
        assert not (tmp_path / "out").exists()


def test_incomplete_peft_adapter_is_refused(tmp_path: Path) -> None:
    """PEFT itself only warns."""
    base = saved("llama", tmp_path / "base")
    peft = tmp_path / "peft"
    to_peft(mlx_adapter(base, tmp_path / "mlx"), peft, model=str(base), verify=False)
    path = peft / "adapter_model.safetensors"
    lost = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    weights = {k: mx.array(v) for k, v in mx.load(str(path)).items()}
    del weights[lost]
    path.unlink()
    mx.save_safetensors(str(path), weights, {"format": "pt"})
    with pytest.raises(SimPOError, match=r"model\.layers\.1\.mlp\.up_proj"):
        from_peft(peft, tmp_path / "back", model=str(base), verify=False)


def test_another_base_is_refused(tmp_path: Path) -> None:
    base, other = saved("mistral", tmp_path / "base"), saved("phi3", tmp_path / "other")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    with pytest.raises(SimPOError):
        to_peft(adapter, tmp_path / "peft", model=str(other), verify=False)
    assert not (tmp_path / "peft").exists()


def test_quantized_live_is_float32(tmp_path: Path) -> None:
    """What these tests call live computes in float32: scales and biases of the 4-bit model too."""
    small = quantized(saved("llama", tmp_path / "base"), tmp_path / "small")
    model = load_model(str(small), dtype="float32").model
    load_adapter(model, mlx_adapter(small, tmp_path / "mlx"))
    assert model(mx.array(TOKENS)).dtype == mx.float32
