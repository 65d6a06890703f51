"""The forecast of `planning.memory` for a training as the trainer runs it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from ..config.simpo_config import SimPOConfig, TrainConfig
from ..data.encode import EncodedPair
from ..engine.choice import Engine
from ..engine.gradient_checkpointing import gradient_checkpointing
from ..errors import SimPOError
from ..planning.memory import MemoryForecast, check_weights, forecast_memory
from .session import Session
from .step import collate_step, step_gradients
from .trainer import create_gradient_function, total_steps


def check_memory(session: Session) -> MemoryForecast | None:
    """Forecast the memory of a run, as ``train.memory_check`` says; None if it is off.

    Raises:
        SimPOError: the run will not fit, and train.memory_check is error.
    """
    setting = session.config.train.memory_check
    if setting == "off":
        return None
    forecast = None
    try:
        check_weights(session.model, session.config.memory)
        forecast = forecast_training(session.model, session.train, session.config, session.engine)
        session.display.warn(forecast.advice())
    except SimPOError as error:
        if setting == "error":
            raise SimPOError(f"{error}. train.memory_check=warn begins all the same") from None
        session.display.warn(str(error))
    return forecast


def forecast_training(
    model: nn.Module, pairs: Sequence[EncodedPair], config: SimPOConfig, engine: Engine
) -> MemoryForecast:
    """Forecast the peak memory of `trainer.train_steps` with these arguments.

    Model and random numbers stay as they are; see `planning.memory.forecast_memory`.
    """
    undivided = engine._replace(plan=lambda pairs, *_: [list(range(len(pairs)))])

    def compute_gradient(pairs: Sequence[EncodedPair], options: TrainConfig) -> None:
        # A new function each time: mx.compile would run what it has traced for other layers.
        function = create_gradient_function(model, replace(config, train=options), engine)
        batch = collate_step(pairs, undivided, options)
        with gradient_checkpointing(model) if options.gradient_checkpointing else nullcontext():
            mx.eval(step_gradients(function, batch))

    steps = total_steps(config, pairs)
    return forecast_memory(model, pairs, config, engine, steps, compute_gradient)
