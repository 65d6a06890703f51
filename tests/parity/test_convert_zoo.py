"""The models that the conversions are tested on: without any adapter both frameworks agree, to
the floor that the other tests add their own bound to; and what an adapter loses, the logits show.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from parity import wrapped
from parity.zoo import COMMON, EXACT, TOKENS, ZOO, mlx_adapter, mlx_logits, saved, torch_logits

from mlx_simpo import load_adapter, load_model
from mlx_simpo.convert.architectures import deviation
from mlx_simpo.files import read_json


@pytest.mark.parametrize("name", ZOO)
def test_floor(name: str, tmp_path: Path) -> None:
    zoo = ZOO[name]
    folder = saved(name, tmp_path)
    theirs = torch_logits(folder)
    assert 1 < np.abs(theirs).max() < 60
    assert theirs.std() > 0.5
    assert np.abs(theirs - mlx_logits(folder)).max() <= zoo.floor
    assert (zoo.floor > EXACT) == bool(zoo.why)


@pytest.mark.parametrize("name", ["phi3", "phimoe"])
def test_longrope_is_another_model(name: str, tmp_path: Path) -> None:
    """mlx-lm's reading of it is not transformers'; the commands say so and do not judge."""
    steps = {"short_factor": [1.1] * 8, "long_factor": [1.5 + 0.1 * n for n in range(8)]}
    scales = {"short_mscale": 1.2, "long_mscale": 1.3} if name == "phimoe" else {}
    rope = COMMON["rope_parameters"] | steps | scales
    rope |= {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZOO, name, ZOO[name]._replace(changes={**ZOO[name].changes, **changes}))
        folder = saved(name, tmp_path)
    assert np.abs(torch_logits(folder) - mlx_logits(folder)).max() > 1
    assert "longrope" in deviation(read_json(folder / "config.json"))


@pytest.mark.parametrize("name", [*ZOO, *wrapped.MODELS])
def test_every_layer_is_seen(name: str, tmp_path: Path) -> None:
    """Without the adapter of any one layer the logits are off by more than the tests allow."""
    base = (saved if name in ZOO else wrapped.saved)(name, tmp_path / "base")
    floor = ZOO[name].floor if name in ZOO else EXACT
    model = load_model(str(base), dtype="float32").model
    load_adapter(model, mlx_adapter(base, tmp_path / "mlx"))
    whole = np.array(model(mx.array(TOKENS)))
    for path, value in tree_flatten(model.trainable_parameters()):
        if path.endswith(".lora_b"):
            model.load_weights([(path, mx.zeros_like(value))], strict=False)
            change = np.abs(np.array(model(mx.array(TOKENS))) - whole).max()
            assert change > 2 * (floor + 1e-3), path
            model.load_weights([(path, value)], strict=False)
