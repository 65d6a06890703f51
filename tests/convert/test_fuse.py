"""Fused folders, without torch: they compute what base model and adapter do, and nothing beside the
weights is lost. (In transformers: tests/parity/test_convert_models.py.)"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import arrays, assert_same_arrays, captured_display
from helpers.mlx_folders import MIXTRAL, mlx_adapter, mlx_model
from helpers.tiny import tiny_folder

from mlx_simpo import SimPOError, fuse, load_adapter, load_model
from mlx_simpo.convert.verify import compare as verify

TOKENS = mx.array([[3, 14, 15, 92, 65, 35, 89]])


def logits_of(base: Path, adapter: Path | None = None) -> np.ndarray:
    """The logits of a folder's model in float32, with an adapter attached."""
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
def test_the_folder_computes_what_base_model_and_adapter_do(
    format: str, model_type: str, bits: int | None, changes: dict, tmp_path: Path
) -> None:
    base = mlx_model(tmp_path / "base", model_type, bits, **changes)
    keys = ["self_attn.q_proj", "mlp.down_proj", "block_sparse_moe.switch_mlp.up_proj"]
    adapter = mlx_adapter(base, tmp_path / "adapter", keys=keys)
    out = fuse(tmp_path / "out", adapter=adapter, format=format, verify=False).output
    expected = logits_of(base, adapter)
    np.testing.assert_allclose(logits_of(out), expected, atol=2e-5)
    assert np.abs(logits_of(base) - expected).max() > 0.1
    config = json.loads((out / "config.json").read_text())
    assert not [name for name in config if name.startswith("quantiz")]
    names = arrays(out / "model.safetensors").keys()
    assert any("experts.3.w2" in name for name in names) == (format == "hf" and bool(changes))


def test_tensors_that_the_adapter_does_not_change_are_copied_bit_for_bit(tmp_path: Path) -> None:
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


def test_obsolete_tensors_are_not_copied(tmp_path: Path) -> None:
    """A second output layer beside tied embeddings, and stored rotary frequencies. (Other tensors
    that MLX does not run are copied: tests/parity/test_convert_wrapped.py.)"""
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
def test_rounding_to_another_dtype_is_shown_and_not_checked(dtype: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    display, text = captured_display()
    adapter = mlx_adapter(base, tmp_path / "adapter")
    done = fuse(tmp_path / "out", adapter=adapter, dtype=dtype, verify=True, display=display)
    assert load_model(str(done.output)).dtype == dtype
    assert json.loads((done.output / "config.json").read_text())["dtype"] == dtype
    assert "as rounded" in text.getvalue()
    assert "what the adapter changes" in text.getvalue()
    assert [c.limit is None for c in done.comparisons][:4] == [True, True, False, False]
    assert 0 < done.comparisons[0].largest < done.comparisons[1].largest


def test_quantizing_again_rounds_away_a_small_adapter(tmp_path: Path) -> None:
    """The comparisons show that the rounding is larger than what the adapter changes."""
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
    rounding, adapter_change, merged, written = done.comparisons[:4]
    assert rounding.mean > adapter_change.mean
    assert merged.passed
    assert written.largest == 0
    after = arrays(done.output / "model.safetensors")
    before = arrays(base / "model.safetensors")
    assert after["model.layers.0.mlp.up_proj.weight"].dtype == np.uint32
    assert json.loads((done.output / "config.json").read_text())["quantization"]["bits"] == 4
    assert_same_arrays(
        {n: a for n, a in after.items() if "norm" in n},
        {n: a for n, a in before.items() if "norm" in n},
    )


def test_the_chat_template_of_the_training_is_written(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("format", ["hf", "mlx"])
def test_a_model_that_does_not_fit_into_memory_is_not_verified(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_folder(tmp_path / "base")
    monkeypatch.setattr(verify, "total_memory_bytes", lambda: 1)
    display, text = captured_display()
    done = fuse(tmp_path / "out", model=str(base), format=format, display=display)
    assert done.comparisons == []
    assert "not verified: the model takes" in text.getvalue()


@pytest.mark.parametrize(
    ("options", "bits", "message"),
    [
        ({"format": "gguf"}, None, "must be one of hf, mlx"),
        ({"dequantize": False}, None, "but this base is not quantized"),
        ({"dequantize": True}, None, "but this base is not quantized"),
        ({"model": None, "adapter": None}, None, "name the model to write"),
        ({"dequantize": False}, 4, "--format mlx"),
        ({"dequantize": False, "format": "mlx", "dtype": "float16"}, 4, "stay quantized"),
    ],
)
def test_options_that_do_not_fit_are_rejected(
    options: dict, bits: int | None, message: str, tmp_path: Path
) -> None:
    base = mlx_model(tmp_path / "base", "llama", bits)
    with pytest.raises(SimPOError, match=message):
        fuse(tmp_path / "out", **{"model": str(base), **options}, verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
