"""Updates: the definition of what an adapter adds, against mlx-lm's layers and plain numpy."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import tiny_model
from mlx.utils import tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_simpo.convert.lora_delta import (
    LoRADelta,
    apply_lora_deltas,
    check_lora_delta,
    lora_deltas_of,
)
from mlx_simpo.convert.merge import fused_model
from mlx_simpo.errors import SimPOError
from mlx_simpo.model.loading import LoadedModel

TOKENS = mx.array([[3, 14, 15, 92, 65, 35]])
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


def product(update: LoRADelta) -> np.ndarray:
    return update.scale * np.array(update.b, np.float64) @ np.array(update.a, np.float64)


def random_update(scale: float = 0.7, dtype: mx.Dtype = mx.float32) -> LoRADelta:
    return LoRADelta(
        mx.random.normal((3, 5)).astype(dtype), mx.random.normal((4, 3)).astype(dtype), scale
    )


def adapted(model_type: str, *, dora: bool = False, keys: list[str] | None = None, **more: int):
    """A model with random LoRA layers, and the same without."""
    bare, model = tiny_model(model_type, **more), tiny_model(model_type, **more)
    model.freeze()
    settings = {"rank": 3, "scale": 1.7, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, -1, settings, use_dora=dora)
    mx.random.seed(4)
    trained = tree_map(lambda p: p + mx.random.normal(p.shape) * 0.3, model.trainable_parameters())
    model.update(trained)
    return bare, model.eval()


@pytest.mark.parametrize(
    ("model_type", "dora", "keys", "more"),
    [
        ("llama", False, None, {}),
        ("llama", True, ["self_attn.q_proj", "mlp.down_proj"], {}),
        ("llama", False, ["lm_head", "model.embed_tokens"], {"tie_word_embeddings": False}),
        ("mixtral", False, None, MIXTRAL),
    ],
)
def test_the_definition_is_mlx_lms(
    model_type: str, dora: bool, keys: list[str] | None, more: dict
) -> None:
    bare, model = adapted(model_type, dora=dora, keys=keys, **more)
    before = bare(TOKENS)
    apply_lora_deltas(bare, lora_deltas_of(model))
    difference = mx.abs(bare(TOKENS) - model(TOKENS)).max().item()
    assert difference < 1e-4
    assert mx.abs(bare(TOKENS) - before).max().item() > 0.1


def test_mlx_lms_fusing_is_the_same_definition() -> None:
    bare, model = adapted("llama")
    apply_lora_deltas(bare, lora_deltas_of(model))
    loaded = LoadedModel(bare, None, {}, "", None, "", None)  # type: ignore[arg-type]
    fused = fused_model(loaded, None, dequantize=True).model
    assert mx.array_equal(fused(TOKENS), bare(TOKENS))


@pytest.mark.parametrize("scale", [1.4, 0.175, 3.0, -0.7])
def test_another_scale_is_the_same_update(scale: float) -> None:
    update = random_update()
    np.testing.assert_allclose(
        product(update.scaled_to(scale)), product(update), rtol=1e-6, atol=1e-7
    )
    assert update.scaled_to(scale).scale == scale


@pytest.mark.parametrize(("scale", "dtype"), [(1.4, mx.bfloat16), (1.0, mx.float32)])
def test_a_power_of_two_keeps_the_dtype_and_every_bit(scale: float, dtype: mx.Dtype) -> None:
    update = random_update(dtype=mx.bfloat16)
    scaled = update.scaled_to(scale)
    assert scaled.b.dtype == dtype
    if dtype == mx.bfloat16:
        assert mx.array_equal(scaled.b * 2, update.b)


@pytest.mark.parametrize("experts", [(), (4,)])
def test_a_higher_rank_is_the_same_update(experts: tuple[int, ...]) -> None:
    update = LoRADelta(mx.random.normal((*experts, 3, 5)), mx.random.normal((*experts, 4, 3)), 2.0)
    padded = update.padded_to(8)
    assert padded.rank == 8
    np.testing.assert_array_equal(product(padded), product(update))
    assert padded.without_zeros().rank == 3
    np.testing.assert_array_equal(np.array(padded.without_zeros().a), np.array(update.a))


def test_an_update_that_is_zero_stays_whole() -> None:
    update = LoRADelta(mx.ones((3, 5)), mx.zeros((4, 3)), 1.0)
    assert update.without_zeros() is update


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (LoRADelta(mx.ones((3, 6)), mx.ones((4, 3)), 1.0), "A has shape"),
        (LoRADelta(mx.ones((3, 5)), mx.ones((5, 3)), 1.0), "B has shape"),
        (LoRADelta(mx.ones((3, 5)), mx.ones((4, 3)), 1.0, mx.ones((5,))), "magnitude has shape"),
        (LoRADelta(mx.ones((3, 5)), mx.ones((4, 3)), float("nan")), "finite"),
        (LoRADelta(mx.ones((3, 5), mx.int32), mx.ones((4, 3)), 1.0), "must be a float"),
    ],
)
def test_an_update_that_does_not_fit(update: LoRADelta, words: str) -> None:
    with pytest.raises(SimPOError, match=words):
        check_lora_delta("x", update, nn.Linear(5, 4))


def test_a_model_without_layers_of_an_adapter() -> None:
    with pytest.raises(SimPOError, match="no layer at all"):
        lora_deltas_of(tiny_model())
