"""AdamW as in torch, and learning rate schedules as in transformers."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from ..config.simpo_config import TrainConfig


def learning_rate_schedule(config: TrainConfig, steps: int) -> Callable[[mx.array], mx.array]:
    """Return the function from a step's index (from 0) to its learning rate.

    As in transformers' get_*_schedule_with_warmup: linear from 0 during the warm-up, then the
    schedule down to 0 (or constant).
    """
    # The last step is never part of the warm-up: a run of one step would train at a rate of 0.
    warmup = min(math.ceil(config.warmup_ratio * steps), steps - 1)
    peak, after = config.learning_rate, max(1, steps - warmup)
    if config.schedule == "cosine":
        main = optim.cosine_decay(peak, after)
    elif config.schedule == "linear":
        main = optim.linear_schedule(peak, 0.0, after)
    else:
        main = optim.linear_schedule(peak, peak, after)
    if warmup == 0:
        return main
    return optim.join_schedules([optim.linear_schedule(0.0, peak, warmup), main], [warmup])


def build_optimizer(config: TrainConfig, steps: int) -> optim.AdamW:
    """Create AdamW as in torch (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2).

    MLX's own defaults differ: no bias correction, and a weight decay of 0.01.
    """
    return optim.AdamW(
        learning_rate_schedule(config, steps),
        betas=[config.adam_beta1, config.adam_beta2],
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        bias_correction=True,
    )
