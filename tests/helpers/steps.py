"""Optimizer steps on the tiny model: encoded pairs, a model with LoRA, the gradient of a step."""

from itertools import pairwise
from typing import Any

import mlx.nn as nn
import numpy as np
from helpers.tiny import some_pairs, tiny_model, tiny_tokenizer
from mlx.utils import tree_flatten, tree_map

from mlx_simpo import DataConfig, LoRAConfig, SimPOConfig, TrainConfig
from mlx_simpo.data.encode import EncodedPair, Encoder, encode_pairs
from mlx_simpo.data.records import Pair
from mlx_simpo.engine.choice import REFERENCE, Engine
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.training.step import GradientFunction, collate_step, step_gradients


def encoded_pairs(count: int = 11) -> list[EncodedPair]:
    pairs = [Pair(**p, index=i, source=f"pairs:{i + 1}") for i, p in enumerate(some_pairs(count))]
    encoded, quarantined = encode_pairs(Encoder(tiny_tokenizer(), DataConfig()), pairs)
    assert not quarantined
    return encoded


def model_with_lora(**lora: Any) -> Any:
    """A tiny model with LoRA of rank 4, whose B is not zero, so that A has a gradient too."""
    model = tiny_model()
    attach_lora(model, LoRAConfig(rank=4, **lora), seed=1)
    model.update(tree_map(lambda p: p + 0.02, model.trainable_parameters()))
    return model


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    """The trainable weights by their names."""
    return {name: np.array(p) for name, p in tree_flatten(model.trainable_parameters())}


def step_config(**train: Any) -> SimPOConfig:
    """A configuration with steps of 4 pairs, unless ``train`` says otherwise."""
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
    }
    return SimPOConfig(model="tiny", train=TrainConfig(**(defaults | train)))


def loss_and_gradients(
    model: nn.Module,
    parts: list[list[EncodedPair]],
    engine: Engine = REFERENCE,
    *,
    compiled: bool = False,
    **objective: object,
) -> dict[str, np.ndarray]:
    """The loss (as "loss") and gradients of one step whose micro-batches are ``parts``."""
    options = {"beta": 2.0, "gamma_beta_ratio": 0.5, **objective}
    model.train()
    function = GradientFunction(model, options, engine, compiled=compiled)
    edges = np.cumsum([0, *map(len, parts)])
    plan = [list(range(a, b)) for a, b in pairwise(edges.tolist())]
    planned = engine._replace(plan=lambda *_: plan)
    batch = collate_step([pair for part in parts for pair in part], planned, TrainConfig())
    metrics, gradients = step_gradients(function, batch)
    loss = {"loss": np.concatenate([np.array(part["loss"]) for part in metrics]).mean()}
    return loss | {name: np.array(g) for name, g in tree_flatten(gradients)}
