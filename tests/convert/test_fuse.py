"""Fused folders, without torch: the live model to the last bit that float32 has, and nothing lost
beside the weights. (In transformers: tests/parity/test_convert_models.py.)"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import arrays, assert_same_arrays, captured_display
from helpers.made import MIXTRAL, mlx_adapter, mlx_model
from helpers.tiny import tiny_folder

from mlx_simpo import SimPOError, fuse, load_adapter, load_model
from mlx_simpo.convert import folder as folders
from mlx_simpo.convert.verify import compare as verify
from mlx_simpo.model.adapters import flat_arrays

TOKENS = mx.array([[3, 14, 15, 92, 65, 35, 89]])


def live(base: Path, adapter: Path | None = None) -> np.ndarray:
    model = load_model(str(base)).model
    model.set_dtype(mx.float32)
    if adapter is not None:
        load_adapter(model, adapter)
    return np.array(model(TOKENS))


@pytest.mark.parametrize("format", ["hf", "mlx"])
@pytest.mark.parametrize(
    ("model_type", "bits", "changes"),
    [
        ("llama", None, {}),
        ("llama", 4, {}),
        ("mixtral", None, MIXTRAL),
        ("mixtral", 8, MIXTRAL),
    ],
    ids=str,
)
def test_the_live_model_is_written(
    format: str, model_type: str, bits: int | None, changes: dict, tmp_path: Path
) -> None:
    base = mlx_model(tmp_path / "base", model_type, bits, **changes)
    keys = ["self_attn.q_proj", "mlp.down_proj", "block_sparse_moe.switch_mlp.up_proj"]
    adapter = mlx_adapter(base, tmp_path / "adapter", keys=keys)
    out = fuse(tmp_path / "out", adapter=adapter, format=format, verify=False).output
    expected = live(base, adapter)
    np.testing.assert_allclose(live(out), expected, atol=2e-5)
    assert np.abs(live(base) - expected).max() > 0.1
    config = json.loads((out / "config.json").read_text())
    assert not [name for name in config if name.startswith("quantiz")]
    names = arrays(out / "model.safetensors").keys()
    assert any("experts.3.w2" in name for name in names) == (format == "hf" and bool(changes))


def test_what_the_adapter_does_not_touch_is_the_bases_own(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "adapter", keys=["self_attn.v_proj"])
    out = fuse(tmp_path / "out", adapter=adapter, verify=False).output
    before, after = arrays(base / "model.safetensors"), arrays(out / "model.safetensors")
    changed = {name for name in before if "v_proj" in name}
    assert_same_arrays(
        {n: a for n, a in after.items() if n not in changed},
        {n: a for n, a in before.items() if n not in changed},
    )
    assert all(not np.array_equal(after[name], before[name]) for name in changed)


def test_tensors_that_mlx_does_not_run_go_along(tmp_path: Path) -> None:
    """Of a checkpoint's multi-token prediction, say; but no second head beside tied embeddings."""
    base = tiny_folder(tmp_path / "base")
    weights = mx.load(str(base / "model.safetensors"))
    assert isinstance(weights, dict)
    more = {
        "lm_head.weight": mx.zeros((512, 32)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros(4),
    }
    mx.save_safetensors(str(base / "model.safetensors"), weights | more, {"format": "pt"})
    out = fuse(tmp_path / "out", model=str(base), verify=False).output
    assert arrays(out / "model.safetensors").keys() == weights.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(dtype: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    display, text = captured_display()
    adapter = mlx_adapter(base, tmp_path / "adapter")
    done = fuse(tmp_path / "out", adapter=adapter, dtype=dtype, verify=True, display=display)
    assert load_model(str(done.output)).dtype == dtype
    assert json.loads((done.output / "config.json").read_text())["dtype"] == dtype
    said = text.getvalue()
    assert "as rounded" in said
    assert "what the adapter changes" in said
    assert [c.limit is None for c in done.comparisons][:4] == [True, True, False, False]
    assert 0 < done.comparisons[0].largest < done.comparisons[1].largest


def test_packing_again_is_shown_for_what_it_is(tmp_path: Path) -> None:
    """On a small tune the rounding is larger than what was learnt."""
    base = mlx_model(tmp_path / "base", "llama", 4)
    adapter = mlx_adapter(base, tmp_path / "adapter", size=0.01)
    display, _ = captured_display()
    done = fuse(
        tmp_path / "out",
        adapter=adapter,
        format="mlx",
        dequantize=False,
        verify=True,
        display=display,
    )
    rounding, learnt, merged, same = done.comparisons[:4]
    assert rounding.mean > learnt.mean
    assert merged.passed
    assert same.largest == 0
    kept = arrays(done.output / "model.safetensors")
    before = arrays(base / "model.safetensors")
    assert kept["model.layers.0.mlp.up_proj.weight"].dtype == np.uint32
    assert json.loads((done.output / "config.json").read_text())["quantization"]["bits"] == 4
    assert_same_arrays(
        {n: a for n, a in kept.items() if "norm" in n},
        {n: a for n, a in before.items() if "norm" in n},
    )


def test_the_template_of_the_training_goes_along(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "adapter")
    (base / "generation_config.json").write_text('{"temperature": 0.6}')
    (adapter / "chat_template.jinja").write_text("{{ 'trained with this' }}")
    out = fuse(tmp_path / "out", adapter=adapter, verify=False).output
    assert load_model(str(out)).tokenizer.chat_template == "{{ 'trained with this' }}"
    assert (out / "generation_config.json").read_text() == '{"temperature": 0.6}'
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings.get("chat_template", "{{ 'trained with this' }}") == "{{ 'trained with this' }}"
    plain = fuse(tmp_path / "plain", model=str(base), verify=False).output
    assert (
        load_model(str(plain)).tokenizer.chat_template
        == load_model(str(base)).tokenizer.chat_template
    )


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: Any) -> None:
    base = tiny_folder(tmp_path / "base")
    shards = folders.make_shards
    monkeypatch.setattr(folders, "make_shards", lambda w: [*map(dict, pieces(shards(w)[0], 5))])
    out = fuse(tmp_path / "out", model=str(base), verify=False).output
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("model*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for path in out.glob("model*.safetensors"):
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(
            arrays(path)
        )
    assert index["metadata"]["total_size"] == sum(
        p.nbytes for p in flat_arrays(load_model(str(base)).model.parameters()).values()
    )
    np.testing.assert_array_equal(live(out), live(base))


def pieces(weights: dict, size: int) -> list:
    items = list(weights.items())
    return [items[start : start + size] for start in range(0, len(items), size)]


@pytest.mark.parametrize("format", ["hf", "mlx"])
def test_what_does_not_fit_is_not_verified_and_said(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_folder(tmp_path / "base")
    monkeypatch.setattr(verify, "total_memory_bytes", lambda: 1)
    display, text = captured_display()
    done = fuse(tmp_path / "out", model=str(base), format=format, display=display)
    assert done.comparisons == []
    assert "not verified: in float32 the model takes" in text.getvalue()


@pytest.mark.parametrize(
    ("options", "bits", "words"),
    [
        ({"format": "gguf"}, None, "must be one of hf, mlx"),
        ({"dequantize": False}, None, "not quantized"),
        ({"dequantize": True}, None, "not quantized"),
        ({"model": None, "adapter": None}, None, "name the model to write"),
        ({"dequantize": False}, 4, "--format mlx"),
        ({"dequantize": False, "format": "mlx", "dtype": "float16"}, 4, "stay packed"),
    ],
)
def test_what_is_refused(options: dict, bits: int | None, words: str, tmp_path: Path) -> None:
    base = mlx_model(tmp_path / "base", "llama", bits)
    with pytest.raises(SimPOError, match=words):
        fuse(tmp_path / "out", **{"model": str(base), **options}, verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
