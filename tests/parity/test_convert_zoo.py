"""The models that the conversions are tested on: without any adapter both frameworks agree, to
the floor that the other tests add their own bound to; and what an adapter loses, the logits show.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from zoo import EXACT, TOKENS, ZOO, mlx_adapter, mlx_logits, saved, torch_logits

from mlx_simpo import load_adapter, load_model


@pytest.mark.parametrize("name", ZOO)
def test_floor(name: str, tmp_path: Path) -> None:
    zoo = ZOO[name]
    folder = saved(name, tmp_path)
    theirs = torch_logits(folder)
    assert 1 < np.abs(theirs).max() < 60
    assert theirs.std() > 0.5
    assert np.abs(theirs - mlx_logits(folder)).max() <= zoo.floor
    assert (zoo.floor > EXACT) == bool(zoo.why)


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_is_seen(name: str, tmp_path: Path) -> None:
    """Without the adapter of any one layer the logits are off by more than the tests allow."""
    base = saved(name, tmp_path / "base")
    model = load_model(str(base), dtype="float32").model
    load_adapter(model, mlx_adapter(base, tmp_path / "mlx"))
    whole = np.array(model(mx.array(TOKENS)))
    for path, value in tree_flatten(model.trainable_parameters()):
        if path.endswith(".lora_b"):
            model.load_weights([(path, mx.zeros_like(value))], strict=False)
            change = np.abs(np.array(model(mx.array(TOKENS))) - whole).max()
            assert change > 2 * (ZOO[name].floor + 1e-3), path
            model.load_weights([(path, value)], strict=False)
