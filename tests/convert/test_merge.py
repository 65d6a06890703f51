"""Merging an adapter into a model's weights."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.mlx_folders import mlx_adapter, mlx_model

from mlx_simpo import load_model
from mlx_simpo.convert.lora_delta import apply_lora_deltas
from mlx_simpo.convert.merge import fused_model, release
from mlx_simpo.convert.mlx_format import read_mlx
from mlx_simpo.model.adapters import flat_arrays

KEYS = ["self_attn.q_proj", "mlp.up_proj"]
CHANGED = {f"model.layers.{n}.{key}.weight" for n in range(2) for key in KEYS}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_model_has_the_weights_that_the_deltas_define(
    bits: int | None, dora: bool, tmp_path: Path
) -> None:
    base = mlx_model(tmp_path / "base", bits=bits)
    adapter = mlx_adapter(base, tmp_path / "adapter", keys=KEYS, dora=dora)
    fused = fused_model(load_model(str(base)), adapter, dequantize=True)
    assert fused.changed == CHANGED
    expected = fused_model(load_model(str(base)), None, dequantize=True)
    assert expected.changed == set()
    deltas = read_mlx(adapter, load_model(str(base)).model)
    apply_lora_deltas(expected.model, deltas)
    actual, defined = (flat_arrays(f.model.parameters()) for f in (fused, expected))
    assert actual.keys() == defined.keys()
    for name, array in actual.items():
        assert array.dtype == mx.float32
        np.testing.assert_allclose(np.array(array), np.array(defined[name]), atol=1e-5)


def test_a_quantized_model_can_stay_quantized(tmp_path: Path) -> None:
    base = mlx_model(tmp_path / "base", bits=4)
    adapter = mlx_adapter(base, tmp_path / "adapter", keys=KEYS)
    fused = fused_model(load_model(str(base)), adapter, dequantize=False)
    arrays = flat_arrays(fused.model.parameters())
    before = flat_arrays(load_model(str(base)).model.parameters())
    assert arrays.keys() == before.keys()
    packed = {name for name, array in before.items() if array.dtype == mx.uint32}
    assert {n for n in packed if not mx.array_equal(arrays[n], before[n]).item()} == CHANGED


def test_a_released_model_holds_no_weights(tmp_path: Path) -> None:
    model = load_model(str(mlx_model(tmp_path / "base"))).model
    release(model)
    assert sum(array.size for array in flat_arrays(model.parameters()).values()) == 0
