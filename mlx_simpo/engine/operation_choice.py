"""Which attention and which delta rule a model's layers compute with here, and why."""

from functools import partial
from typing import Any, Literal, NamedTuple

from .attention import attention
from .figures import Figures
from .operations import Operations

AttentionSetting = Literal["auto", "mlx", "blocks"]


class OperationChoice(NamedTuple):
    """What the layers compute with while training and in evaluation.

    note: what runs and why, for the user.
    """

    training: Operations
    evaluation: Operations
    note: str


def choose_operations(model: Any, setting: AttentionSetting, figures: Figures) -> OperationChoice:
    """Return what computes attention and the delta rule in this model on MLX's default device.

    Args:
        setting: of ``engine.attention``.
    """
    blocks = Operations(partial(attention, tile_scores=figures.tile_scores), None)
    return OperationChoice(blocks, blocks, "attention: blocks")
