"""Mistakes planted in the writing of models, which verification must catch."""

import json
from collections.abc import Callable
from pathlib import Path
from sys import modules
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.mistakes import (
    EXPERT_ORDER,
    FROM_HF,
    FUSE,
    WRONG,
    Arrays,
    ConvertVerified,
    Patch,
    after,
    all_of,
    base_folder,
    before,
    swap,
)

from mlx_simpo.convert import from_hf, fuse
from mlx_simpo.errors import SimPOError
from mlx_simpo.model.adapters import load_adapter


def model_config(patch: Patch, change: Callable[[dict], None]) -> None:
    """Change config.json after it was written."""

    def edit(_: None, folder: Path, *__: object) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    after(patch, FUSE, "write_config", edit)


def rope(config: dict) -> None:
    config["rope_theta"] *= 2
    config["rope_parameters"]["rope_theta"] *= 2


def weights_of(module: Any, change: Callable[[Arrays], Any]) -> Callable[[Patch], None]:
    """Change the tensors before they are written."""
    return lambda p: before(p, module, "write_weights", lambda _, weights, *__: change(weights))


def half_changed(patch: Patch) -> None:
    """Take one of the changed weights for an unchanged one."""
    after(patch, FUSE, "fused_model", lambda f, *_: f._replace(changed=set(sorted(f.changed)[1:])))


def merged_twice(patch: Patch) -> None:
    """Merge the adapter with twice its scale."""

    def double(model: nn.Module, folder: Path) -> None:
        load_adapter(model, folder)
        for _, layer in model.named_modules():
            if "lora_a" in layer:
                layer.scale *= 2  # type: ignore[operator]

    patch.setattr(modules["mlx_simpo.convert.merge"], "load_adapter", double)


def no_transposition(patch: Patch) -> None:
    """Square weights come out of `checkpoint_block` transposed."""
    square = lambda b, *_: b.T if b.ndim == 2 and b.shape[0] == b.shape[1] else b  # noqa: E731
    after(patch, modules["mlx_simpo.convert.weights"], "checkpoint_block", square)


def tied(patch: Patch) -> None:
    """Forget the output layer and declare it tied to the embedding."""
    weights_of(FUSE, lambda weights: weights.pop("lm_head.weight"))(patch)
    model_config(patch, lambda config: config.update(tie_word_embeddings=True))


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
WHOLE = {
    "rope": ("llama", lambda p: model_config(p, rope)),
    "eps": ("llama", lambda p: model_config(p, lambda c: c.update(rms_norm_eps=1e-2))),
    "not fused": ("llama", half_changed),
    "merged twice": ("llama", merged_twice),
    "untransposed": ("llama", no_transposition),
    "lm_head": ("llama", tied),
    "experts": (
        "mixtral",
        weights_of(FUSE, lambda f: swap(f, EXPERT.format(0, "w1"), EXPERT.format(1, "w1"))),
    ),
    "gate and up": (
        "mixtral",
        weights_of(FUSE, lambda f: swap(f, EXPERT.format(0, "w1"), EXPERT.format(0, "w3"))),
    ),
    "dora merged twice": ("dora", merged_twice),
}


@pytest.mark.parametrize("mistake", WHOLE)
def test_fuse_catches(mistake: str, convert_verified: ConvertVerified, monkeypatch: Patch) -> None:
    name, plant = WHOLE[mistake]
    plant(monkeypatch)
    with pytest.raises(SimPOError, match=WRONG):
        convert_verified("fuse", name)


def test_fuse_notices_a_missing_output_layer(
    convert_verified: ConvertVerified, monkeypatch: Patch
) -> None:
    weights_of(FUSE, lambda weights: weights.pop("lm_head.weight"))(monkeypatch)
    with pytest.raises(SimPOError, match=r"cannot be loaded.*lm_head"):
        convert_verified("fuse", "llama")


def test_fuse_notices_a_rotary_base_that_mlx_does_not_read(
    convert_verified: ConvertVerified, monkeypatch: Patch
) -> None:
    model_config(monkeypatch, lambda c: c["rope_parameters"].update(rope_theta=7.0))
    with pytest.raises(SimPOError, match=WRONG):
        convert_verified("fuse", "llama")


@pytest.mark.parametrize("mistake", ["rope", "not fused", "untransposed", "lm_head"])
def test_fuse_to_bfloat16_catches(
    mistake: str, folders: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    WHOLE[mistake][1](monkeypatch)
    with pytest.raises(SimPOError, match=WRONG):
        fuse(tmp_path / "out", adapter=folders / "llama" / "mlx", dtype="bfloat16", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_fuse_to_bfloat16_catches_a_wrong_merge(
    folders: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    merged_twice(monkeypatch)
    with pytest.raises(SimPOError, match=WRONG):
        fuse(tmp_path / "out", adapter=folders / "llama" / "mlx", dtype="bfloat16", verify=True)
    assert list(tmp_path.iterdir()) == []


def hf_config(patch: Patch, change: Callable[[dict], None]) -> None:
    before(patch, FROM_HF, "save_config", lambda config, _: change(config))


def scaled(array: mx.array) -> mx.array:
    """Return the array 2 % larger; packed weights become other codes."""
    return (array * 1.02).astype(array.dtype)


HF = {
    "rope": ("llama", lambda p: hf_config(p, lambda c: c.update(rope_theta=2e4))),
    "one tensor": (
        "llama",
        weights_of(FROM_HF, all_of("layers.1.mlp.up_proj", scaled)),
    ),
    "experts": ("mixtral", weights_of(FROM_HF, all_of("switch_mlp.up", lambda w: w[EXPERT_ORDER]))),
    "lm_head": ("llama", weights_of(FROM_HF, all_of("lm_head", lambda w: w[::-1]))),
}


@pytest.mark.parametrize("mistake", HF)
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": 8, "group_size": 32}])
def test_from_hf_catches(
    mistake: str, options: dict, folders: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    name, plant = HF[mistake]
    plant(monkeypatch)
    with pytest.raises(SimPOError, match=WRONG):
        from_hf(str(base_folder(folders, name)), tmp_path / "out", verify=True, **options)
    assert list(tmp_path.iterdir()) == []
