"""What every adapter of an MLX library needs: the same model, and the library's own step."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers

Spec = dict[str, Any]
Pair = dict[str, Any]  # chosen, rejected: token ids; start: how many of them are the prompt
Step = Callable[[list[Pair]], dict[str, Any]]


class Reached(Exception):
    """A trainer has asked for its first batch: all that its loop uses is built by then."""


def add_lora(model: nn.Module, spec: Spec) -> nn.Module:
    """LoRA on every linear layer of every block; the same A for the same seed."""
    model.freeze()
    mx.random.seed(spec["seed"])
    settings = {"rank": spec["rank"], "scale": spec["scale"], "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), settings)  # type: ignore[arg-type]
    mx.eval(model.parameters())
    return model


def lora_model(spec: Spec) -> nn.Module:
    return add_lora(load(spec["model"])[0], spec)


def locals_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Local variables of a training function at the moment when something in it raises Reached.

    Libraries define the compiled step inside their training function. This takes that very step
    out instead of rewriting it, and the loop around it never runs.
    """
    try:
        function(*args, **kwargs)
    except Reached as reached:
        traceback = reached.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code is function.__code__:  # type: ignore[attr-defined]
                return dict(traceback.tb_frame.f_locals)
            traceback = traceback.tb_next
    raise RuntimeError(f"{function.__qualname__} did not stop where it reads its data")
