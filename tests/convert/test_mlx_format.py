"""mlx-lm reads what is written for it: any mixture of ranks and scales, any set of layers."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.utils import load_adapters

from mlx_simpo import SimPOError
from mlx_simpo.convert.lora_delta import LoRADelta, lora_deltas_of
from mlx_simpo.convert.mlx_format import keys_of, read_mlx, write_mlx
from mlx_simpo.convert.names import adaptable_layers, layer_shape

PATHS = sorted(p for p in adaptable_layers(tiny_model()) if "layers" in p)


def update(path: str, rank: int = 2, scale: float = 2.0, seed: int = 0) -> LoRADelta:
    out, into = layer_shape(adaptable_layers(tiny_model())[path])
    key_a, key_b = mx.random.split(mx.random.key(seed))
    return LoRADelta(
        mx.random.normal((rank, into), key=key_a), mx.random.normal((out, rank), key=key_b), scale
    )


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from(PATHS), min_size=1))
def test_exactly_these_layers_are_adapted(
    tmp_path_factory: pytest.TempPathFactory, paths: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    updates = {path: update(path, seed=n) for n, path in enumerate(sorted(paths))}
    write_mlx(folder, updates, tiny_model(), {})
    model = load_adapters(tiny_model(), str(folder))
    found = lora_deltas_of(model)
    assert found.keys() == paths
    for path in paths:
        assert mx.array_equal(found[path].a, updates[path].a)
        assert mx.array_equal(found[path].b, updates[path].b)


@pytest.mark.parametrize(
    ("paths", "keys", "layers"),
    [
        (["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"], ["mlp.up_proj"], -1),
        (["model.layers.1.mlp.up_proj"], ["mlp.up_proj"], 1),
        (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"], -1),
        (["model.embed_tokens"], ["model.embed_tokens"], -1),
    ],
)
def test_short_names_where_they_say_the_same(
    paths: list[str], keys: list[str], layers: int
) -> None:
    assert keys_of(set(paths), tiny_model()) == (keys, layers)


def test_ranks_and_scales_are_made_one(tmp_path: Path) -> None:
    one, two = PATHS[0], PATHS[-1]
    updates = {one: update(one, 3, 0.7), two: update(two, 5, 2.0)}
    write_mlx(tmp_path, updates, tiny_model(), {})
    found = read_mlx(tmp_path, tiny_model())
    assert {(u.rank, u.scale) for u in found.values()} == {(5, 2.0)}
    for path in updates:
        wanted = updates[path].scale * updates[path].b @ updates[path].a
        made = found[path].scale * found[path].b @ found[path].a
        np.testing.assert_allclose(np.array(made), np.array(wanted), atol=1e-5)


def test_what_else_is_recorded_is_left_alone(tmp_path: Path) -> None:
    write_mlx(tmp_path, {PATHS[0]: update(PATHS[0])}, tiny_model(), {"mlx_simpo": {"a": 1}})
    load_adapters(tiny_model(), str(tmp_path))
    assert '"mlx_simpo"' in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        (lambda u: {PATHS[0]: LoRADelta(u.a, u.b, 0.0)}, "changes nothing"),
        (
            lambda u: {PATHS[0]: LoRADelta(u.a, u.b, 1.0, mx.ones(32)), PATHS[1]: update(PATHS[1])},
            "some of its layers only",
        ),
    ],
    ids=["zero", "mixed"],
)
def test_what_mlx_lm_has_not(updates, words: str, tmp_path: Path) -> None:
    with pytest.raises(SimPOError, match=words):
        write_mlx(tmp_path, updates(update(PATHS[0])), tiny_model(), {})
