"""The adapter off and on: the base model's own layers, bit for bit."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import tiny_model
from mlx.utils import tree_map

from mlx_simpo import LoRAConfig
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.model.switch import AdapterSwitch

TOKENS = mx.array([[1, 7, 3, 250, 9]])


def quantized(**options: Any) -> Any:
    model = tiny_model(**options)
    nn.quantize(model, group_size=32, bits=4)
    return model


def with_random_adapter(model: Any, **lora: Any) -> None:
    attach_lora(model, LoRAConfig(rank=4, **lora), seed=0)
    mx.random.seed(7)
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.3, model.trainable_parameters()))
    model.eval()


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (tiny_model, {}),
        (tiny_model, {"dora": True}),
        (tiny_model, {"target_modules": "all-linear", "num_layers": 1}),
        (lambda: quantized(hidden_size=64, intermediate_size=64), {}),
        (
            lambda: tiny_model(
                "mixtral", num_local_experts=4, num_experts_per_tok=2, attention_bias=False
            ),
            {"target_modules": "all-linear"},
        ),
    ],
    ids=["lora", "dora", "some layers", "quantized", "experts"],
)
def test_off_is_the_base_model_and_on_the_adapter(make: Any, lora: dict[str, Any]) -> None:
    model = make()
    base = np.array(model(TOKENS))
    with_random_adapter(model, **lora)
    adapted = np.array(model(TOKENS))
    assert not np.array_equal(adapted, base)
    switch = AdapterSwitch(model)
    for is_on in (False, True, True, False, False, True):
        switch.set(is_on)
        assert switch.is_on == is_on
        np.testing.assert_array_equal(np.array(model(TOKENS)), adapted if is_on else base)


def test_an_adapter_that_overflows_leaves_the_base_model_as_it_is() -> None:
    """A scale of 0 would multiply infinity by 0."""
    model = tiny_model()
    base = np.array(model(TOKENS))
    with_random_adapter(model)
    model.update(tree_map(lambda p: p * 1e30, model.trainable_parameters()))
    switch = AdapterSwitch(model)
    assert np.isnan(np.array(model(TOKENS))).any()
    switch.set(False)
    np.testing.assert_array_equal(np.array(model(TOKENS)), base)
