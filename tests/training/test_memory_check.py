"""The forecast beside the peak of the training itself, and the training after it."""

import gc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.devices import on_cpu
from helpers.steps import encoded_pairs, model_with_lora, step_config, weights
from helpers.tiny import tiny_model, token_pair

from mlx_simpo import LoRAConfig, SimPOConfig
from mlx_simpo.engine.choice import choose_engine
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.training.memory_check import forecast_training
from mlx_simpo.training.trainer import train_steps

# Wide enough for activations to be most of the memory.
SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "head_dim": 24,
}
PAIRS = [token_pair(20, 30 + i, 40, seed=i) for i in range(4)]


def prepared(lora: dict[str, Any], **train: Any) -> tuple[Any, SimPOConfig, Any]:
    model = tiny_model(**SHAPE)
    attach_lora(model, LoRAConfig(**lora), seed=1)
    config = step_config(**{"batch_size": 2, "steps": 2, **train})
    return model, config, choose_engine(config.train.engine, model)


@pytest.mark.parametrize(
    ("train", "lora"),
    [
        ({}, {}),
        ({"gradient_accumulation_steps": 2}, {}),
        ({"gradient_checkpointing": True}, {}),
        ({"engine": "reference"}, {}),
        ({"engine": "reference", "compile": False}, {"dropout": 0.1}),
        ({}, {"dora": True, "num_layers": 5}),
        ({"batch_size": 1, "max_tokens_per_step": 64}, {"rank": 64}),
    ],
    ids=str,
)
def test_the_forecast_is_within_10_percent(train: dict[str, Any], lora: dict[str, Any]) -> None:
    with on_cpu():
        model, config, engine = prepared(lora, **train)
        forecast = forecast_training(model, PAIRS, config, engine)
        gc.collect()
        mx.reset_peak_memory()
        assert len(list(train_steps(model, PAIRS, config, engine))) == 2
    assert forecast.peak == pytest.approx(mx.get_peak_memory(), rel=0.1)
    assert forecast.advice() is None


def test_twice_the_length_is_noticed() -> None:
    with on_cpu():
        model, config, engine = prepared({}, batch_size=1)
        short, long = (
            forecast_training(model, [token_pair(*sizes)], config, engine)
            for sizes in ((20, 30, 40), (40, 60, 80))
        )
    ratio = long.positions / short.positions
    assert 1.7 < ratio < 2.1  # sequences of similar length are padded
    more = (long.peak - long.weights) / (short.peak - short.weights)
    assert more == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize("engine", ["shared_prefix", "reference"])
def test_a_training_after_the_forecast_is_the_same_to_the_bit(engine: str) -> None:
    trained = []
    for is_forecast in (False, True):
        model = model_with_lora(dropout=0.2)
        config = step_config(steps=3, engine=engine, gradient_checkpointing=True)
        pairs = encoded_pairs()
        if is_forecast:
            forecast_training(model, pairs, config, choose_engine(engine, model))
        losses = [step.metrics["loss"] for step in train_steps(model, pairs, config)]
        trained.append((losses, weights(model)))
    assert trained[0][0] == trained[1][0]
    for name, array in trained[0][1].items():
        np.testing.assert_array_equal(array, trained[1][1][name])
