"""Hugging Face models as folders in MLX's format: mlx-lm and this package load the same model."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import captured_display
from helpers.tiny import tiny_config, tiny_folder
from mlx_lm.utils import load as mlx_lm_load

from mlx_simpo import SimPOError, from_hf, load_model

TOKENS = mx.array([[3, 14, 15, 92, 65, 35, 89]])


def saved_by_transformers_5(folder: Path, base: float = 77.0) -> Path:
    """Write a model whose config.json has its rotary base where transformers 5 writes it."""
    tiny_folder(folder)
    config = tiny_config()
    del config["rope_theta"]
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": base}, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_mlx_lm_finds_the_rotary_base(tmp_path: Path) -> None:
    """In the original folder mlx-lm silently uses a default base."""
    source = saved_by_transformers_5(tmp_path / "hf")
    done = from_hf(str(source), tmp_path / "mlx", verify=True)
    ours = np.array(load_model(str(source)).model(TOKENS))
    theirs = np.array(mlx_lm_load(str(done.output))[0](TOKENS))
    np.testing.assert_array_equal(theirs, ours)
    assert np.abs(np.array(mlx_lm_load(str(source))[0](TOKENS)) - ours).max() > 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(bits: int, tmp_path: Path) -> None:
    display, text = captured_display()
    done = from_hf(
        str(saved_by_transformers_5(tmp_path / "hf")),
        tmp_path / "mlx",
        quantize=bits,
        group_size=32,
        verify=True,
        display=display,
    )
    config = json.loads((done.output / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    assert config["rope_theta"] == 77.0
    assert done.comparisons[0].largest == 0
    assert done.comparisons[1].largest > 0.001
    assert "bits per weight" in text.getvalue()
    assert mlx_lm_load(str(done.output))[0](TOKENS).shape == (1, 7, 512)


def test_another_dtype(tmp_path: Path) -> None:
    done = from_hf(
        str(saved_by_transformers_5(tmp_path / "hf")), tmp_path / "mlx", dtype="bfloat16"
    )
    assert load_model(str(done.output)).dtype == "bfloat16"
    assert json.loads((done.output / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": 7}, "quantize is 7; it must be one of 2, 3, 4, 5, 6, 8 bits"),
        ({"quantize": 4, "group_size": 48}, "group_size is 48; it must be 32, 64 or 128"),
    ],
)
def test_what_mlx_cannot_quantize_is_rejected(options: dict, message: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "hf")
    with pytest.raises(SimPOError, match=message):
        from_hf(str(source), tmp_path / "mlx", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "hf")
    quantized = from_hf(
        str(source), tmp_path / "quantized", quantize=4, group_size=32, verify=False
    )
    with pytest.raises(
        SimPOError, match="is quantized already; quantize the model that it was made of"
    ):
        from_hf(str(quantized.output), tmp_path / "again", quantize=4, group_size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "quantized"]
