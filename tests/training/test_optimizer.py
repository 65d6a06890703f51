"""The optimizer: torch's AdamW on the clipped gradient, and transformers' schedules."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.steps import encoded_pairs, loss_and_gradients, model_with_lora, step_config, weights

from mlx_simpo import TrainConfig
from mlx_simpo.training.optimizer import learning_rate_schedule
from mlx_simpo.training.trainer import train_steps

PAIRS = encoded_pairs()


def numpy_adamw(
    w: np.ndarray, gradients: list, rates: list[float], options: TrainConfig
) -> np.ndarray:
    """torch.optim.AdamW's update in float64 (Loshchilov and Hutter, algorithm 2)."""
    b1, b2 = options.adam_beta1, options.adam_beta2
    m, v, w = np.zeros_like(w), np.zeros_like(w), w.astype(np.float64)
    for step, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        w = w * (1 - rate * options.weight_decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w -= rate * (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + options.adam_epsilon)
    return w


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.5},  # torch's defaults
        {"max_grad_norm": 0.5, "weight_decay": 0.1},
        # Beside this epsilon a gradient's size counts, and so does how far it was clipped.
        {"max_grad_norm": 0.25, "adam_beta1": 0.6, "adam_beta2": 0.8, "adam_epsilon": 0.05},
        {"max_grad_norm": None, "adam_epsilon": 0.05},
        {"max_grad_norm": 1e6, "adam_epsilon": 0.05},
    ],
    ids=str,
)
def test_updates_are_adamw_on_the_clipped_gradient(settings: dict[str, Any]) -> None:
    """Three steps, replayed in NumPy with the gradients at each step's weights."""
    config = step_config(steps=3, batch_size=11, **settings)
    model, replay = model_with_lora(), model_with_lora()
    start, clipped, rates = weights(model), [], []
    limit = math.inf if config.train.max_grad_norm is None else config.train.max_grad_norm
    for step in train_steps(model, PAIRS, config):
        gradients = loss_and_gradients(replay, [PAIRS])
        gradients.pop("loss")
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        assert step.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert norm > 1  # so that small limits clip, and no limit is not one of 1
        factor = min(1.0, limit / norm)
        clipped.append({n: g.astype(np.float64) * factor for n, g in gradients.items()})
        rates.append(step.metrics["learning_rate"])
        replay.update(model.trainable_parameters())
    assert rates[0] == 0 < rates[1]  # the warm-up begins at 0, as in transformers
    for name, value in weights(model).items():
        expected = numpy_adamw(start[name], [g[name] for g in clipped], rates, config.train)
        np.testing.assert_allclose(value, expected, atol=3e-7, err_msg=name)


def transformers_factor(schedule: str, step: int, warmup: int, steps: int) -> float:
    """The factors of transformers.get_{cosine,linear,constant}_schedule_with_warmup."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[
        schedule
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "ratio"), [(40, 0.1), (7, 0.0), (9, 0.5), (1, 0.1)])
def test_schedules_are_those_of_transformers(schedule: str, steps: int, ratio: float) -> None:
    options = TrainConfig(schedule=schedule, warmup_ratio=ratio, learning_rate=3e-4)  # type: ignore[arg-type]
    rate = learning_rate_schedule(options, steps)
    warmup = math.ceil(ratio * steps) if steps > 1 else 0  # a run of one step trains too
    for step in range(steps):
        expected = 3e-4 * transformers_factor(schedule, step, warmup, steps)
        actual = float(rate(mx.array(step, mx.uint64)))
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-10)
