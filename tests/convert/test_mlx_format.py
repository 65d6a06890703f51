"""mlx-lm reads what is written for it: any mixture of ranks and scales, any set of layers."""

from collections.abc import Callable
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


def random_delta(path: str, rank: int = 2, scale: float = 2.0, seed: int = 0) -> LoRADelta:
    """A delta for the layer of the tiny model at this path."""
    outputs, inputs = layer_shape(adaptable_layers(tiny_model())[path])
    key_a, key_b = mx.random.split(mx.random.key(seed))
    a = mx.random.normal((rank, inputs), key=key_a)
    return LoRADelta(a, mx.random.normal((outputs, rank), key=key_b), scale)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from(PATHS), min_size=1))
def test_exactly_these_layers_are_adapted(
    tmp_path_factory: pytest.TempPathFactory, paths: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    deltas = {path: random_delta(path, seed=n) for n, path in enumerate(sorted(paths))}
    write_mlx(folder, deltas, tiny_model(), {})
    loaded = lora_deltas_of(load_adapters(tiny_model(), str(folder)))
    assert loaded.keys() == paths
    for path in paths:
        assert mx.array_equal(loaded[path].a, deltas[path].a)
        assert mx.array_equal(loaded[path].b, deltas[path].b)


@pytest.mark.parametrize(
    ("paths", "keys", "num_layers"),
    [
        (["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"], ["mlp.up_proj"], -1),
        (["model.layers.1.mlp.up_proj"], ["mlp.up_proj"], 1),
        (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"], -1),
        (["model.embed_tokens"], ["model.embed_tokens"], -1),
    ],
)
def test_keys_are_short_names_where_these_select_the_same_layers(
    paths: list[str], keys: list[str], num_layers: int
) -> None:
    assert keys_of(set(paths), tiny_model()) == (keys, num_layers)


def test_different_ranks_and_scales_become_one(tmp_path: Path) -> None:
    first, last = PATHS[0], PATHS[-1]
    deltas = {first: random_delta(first, 3, 0.7), last: random_delta(last, 5, 2.0)}
    write_mlx(tmp_path, deltas, tiny_model(), {})
    loaded = read_mlx(tmp_path, tiny_model())
    assert {(delta.rank, delta.scale) for delta in loaded.values()} == {(5, 2.0)}
    for path, delta in deltas.items():
        actual = loaded[path].scale * loaded[path].b @ loaded[path].a
        expected = delta.scale * delta.b @ delta.a
        np.testing.assert_allclose(np.array(actual), np.array(expected), atol=1e-5)


def test_mlx_lm_ignores_extra_entries(tmp_path: Path) -> None:
    extra = {"mlx_simpo": {"a": 1}}
    write_mlx(tmp_path, {PATHS[0]: random_delta(PATHS[0])}, tiny_model(), extra)
    load_adapters(tiny_model(), str(tmp_path))
    assert '"mlx_simpo"' in (tmp_path / "adapter_config.json").read_text()


def without_scale(delta: LoRADelta) -> dict[str, LoRADelta]:
    return {PATHS[0]: LoRADelta(delta.a, delta.b, 0.0)}


def dora_and_lora(delta: LoRADelta) -> dict[str, LoRADelta]:
    dora = LoRADelta(delta.a, delta.b, 1.0, mx.ones(32))
    return {PATHS[0]: dora, PATHS[1]: random_delta(PATHS[1])}


def dora_on_the_embedding(_: LoRADelta) -> dict[str, LoRADelta]:
    path = "model.embed_tokens"
    return {path: LoRADelta(mx.ones((2, 512)), mx.ones((32, 2)), 1.0, mx.ones(512))}


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        (without_scale, "scale is 0, so it changes nothing"),
        (dora_and_lora, "DoRA on some of its layers only, .*merge_and_unload"),
        (dora_on_the_embedding, "DoRA on an embedding, which is not converted"),
    ],
)
def test_what_mlx_lm_does_not_support_is_rejected(
    deltas: Callable[[LoRADelta], dict[str, LoRADelta]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SimPOError, match=message):
        write_mlx(tmp_path, deltas(random_delta(PATHS[0])), tiny_model(), {})
    assert list(tmp_path.iterdir()) == []
