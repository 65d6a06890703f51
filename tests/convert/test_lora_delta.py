"""LoRA deltas: the definition of what an adapter adds, against mlx-lm's layers and numpy."""

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
    most_common,
)
from mlx_simpo.errors import SimPOError

TOKENS = mx.array([[3, 14, 15, 92, 65, 35]])
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


def product(delta: LoRADelta) -> np.ndarray:
    """scale · b @ a in float64."""
    return delta.scale * np.array(delta.b, np.float64) @ np.array(delta.a, np.float64)


def random_delta(dtype: mx.Dtype = mx.float32) -> LoRADelta:
    """A delta for nn.Linear(5, 4), of rank 3 and scale 0.7."""
    a, b = mx.random.normal((3, 5)), mx.random.normal((4, 3))
    return LoRADelta(a.astype(dtype), b.astype(dtype), 0.7)


def adapted(
    model_type: str, *, dora: bool = False, keys: list[str] | None = None, **changes: int
) -> tuple[nn.Module, nn.Module]:
    """A base model, and the same with random LoRA layers."""
    base, model = tiny_model(model_type, **changes), tiny_model(model_type, **changes)
    model.freeze()
    settings = {"rank": 3, "scale": 1.7, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, -1, settings, use_dora=dora)
    mx.random.seed(4)
    trainable = model.trainable_parameters()
    model.update(tree_map(lambda p: p + mx.random.normal(p.shape) * 0.3, trainable))
    return base, model.eval()


@pytest.mark.parametrize(
    ("model_type", "dora", "keys", "changes"),
    [
        ("llama", False, None, {}),
        ("llama", True, ["self_attn.q_proj", "mlp.down_proj"], {}),
        ("llama", False, ["lm_head", "model.embed_tokens"], {"tie_word_embeddings": False}),
        ("mixtral", False, None, MIXTRAL),
    ],
)
def test_applied_deltas_compute_what_mlx_lms_layers_do(
    model_type: str, dora: bool, keys: list[str] | None, changes: dict
) -> None:
    base, model = adapted(model_type, dora=dora, keys=keys, **changes)
    before = base(TOKENS)
    apply_lora_deltas(base, lora_deltas_of(model))
    assert float(mx.abs(base(TOKENS) - model(TOKENS)).max()) < 1e-4
    assert float(mx.abs(base(TOKENS) - before).max()) > 0.1


@pytest.mark.parametrize("scale", [1.4, 0.175, 3.0, -0.7])
def test_another_scale_is_the_same_delta(scale: float) -> None:
    delta = random_delta()
    scaled = delta.scaled_to(scale)
    assert scaled.scale == scale
    np.testing.assert_allclose(product(scaled), product(delta), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("scale", "dtype"), [(1.4, mx.bfloat16), (1.0, mx.float32)])
def test_a_power_of_two_keeps_the_dtype_and_every_bit(scale: float, dtype: mx.Dtype) -> None:
    delta = random_delta(mx.bfloat16)
    scaled = delta.scaled_to(scale)
    assert scaled.b.dtype == dtype
    if dtype == mx.bfloat16:
        assert mx.array_equal(scaled.b * 2, delta.b)


@pytest.mark.parametrize("experts", [(), (4,)])
def test_a_higher_rank_is_the_same_delta(experts: tuple[int, ...]) -> None:
    delta = LoRADelta(mx.random.normal((*experts, 3, 5)), mx.random.normal((*experts, 4, 3)), 2.0)
    padded = delta.padded_to(8)
    assert padded.rank == 8
    np.testing.assert_array_equal(product(padded), product(delta))
    assert padded.without_zeros().rank == 3
    np.testing.assert_array_equal(np.array(padded.without_zeros().a), np.array(delta.a))


def test_a_delta_of_zeros_keeps_its_rank() -> None:
    delta = LoRADelta(mx.ones((3, 5)), mx.zeros((4, 3)), 1.0)
    assert delta.without_zeros() is delta


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (LoRADelta(mx.ones((3, 6)), mx.ones((4, 3)), 1.0), "A has shape"),
        (LoRADelta(mx.ones((3, 5)), mx.ones((5, 3)), 1.0), "B has shape"),
        (LoRADelta(mx.ones((3, 5)), mx.ones((4, 3)), 1.0, mx.ones((5,))), "magnitude has shape"),
        (LoRADelta(mx.ones((3, 5)), mx.ones((4, 3)), float("nan")), "must be a finite number"),
        (LoRADelta(mx.ones((3, 5), mx.int32), mx.ones((4, 3)), 1.0), "must be a float"),
    ],
)
def test_a_delta_that_does_not_fit_its_layer_is_rejected(delta: LoRADelta, message: str) -> None:
    with pytest.raises(SimPOError, match=f"x: .*{message}"):
        check_lora_delta("x", delta, nn.Linear(5, 4))


def test_a_model_without_lora_layers_is_rejected() -> None:
    with pytest.raises(SimPOError, match="adapts no layer at all"):
        lora_deltas_of(tiny_model())


def test_the_most_common_value_is_the_largest_of_several() -> None:
    assert most_common([1.0, 3.0, 3.0, 2.0]) == 3.0
    assert most_common([1.0, 4.0, 2.0]) == 4.0
