"""An MLX model's weights as the tensors of its checkpoint: sanitize undone."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from ..errors import SimPOError
from .probe import Piece, Shape


class Layout(NamedTuple):
    """How a model's arrays lie in a checkpoint.

    shapes: of the checkpoint's tensors that the model uses; pieces: of each array of the model.
    """

    shapes: dict[str, Shape]
    pieces: dict[str, list[Piece]]


def checkpoint_tensors(
    weights: Mapping[str, mx.array], layout: Layout, only: set[str] | None = None
) -> dict[str, mx.array]:
    """The checkpoint's tensors, from the model's arrays; lazy.

    Args:
        weights: the model's arrays by name, float.
        only: tensors to make; None for all.

    Raises:
        SimPOError: a tensor is not filled whole by the model's arrays.
    """
    filled = {
        name: mx.zeros(shape, dtype=mx.float32)
        for name, shape in layout.shapes.items()
        if only is None or name in only
    }
    missing = {name: filled[name].size for name in filled}
    for target, parts in layout.pieces.items():
        for piece in parts:
            if piece.source not in filled:
                continue
            block = inverse(weights[target], piece)
            if missing[piece.source] < block.size:
                raise SimPOError(f"two arrays of the MLX model are made of {piece.source}")
            whole = filled[piece.source]
            missing[piece.source] -= block.size
            if block.shape == whole.shape:
                filled[piece.source] = block
            else:
                if whole.dtype != block.dtype:
                    whole = whole.astype(block.dtype)
                whole[piece.source_region] = block
                filled[piece.source] = whole
    if lacking := [name for name, count in missing.items() if count]:
        raise SimPOError(
            f"{len(lacking)} tensors of the checkpoint cannot be made from the MLX model, e.g. "
            f"{lacking[0]}"
        )
    return filled


def inverse(array: mx.array, piece: Piece) -> mx.array:
    """The block of the checkpoint's tensor that a piece of the model's array came from."""
    shape = [part.stop - part.start for part in piece.source_region]
    block = array[piece.region].reshape([shape[axis] for axis in piece.axes])
    back = sorted(range(len(piece.axes)), key=lambda axis: piece.axes[axis])
    block = block.transpose(back)
    return block - piece.offset if piece.offset else block


def sources_of(layout: Layout, changed: set[str]) -> set[str]:
    """The checkpoint's tensors that hold any part of the model's arrays ``changed``."""
    return {piece.source for name in changed for piece in layout.pieces[name]}


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts layer 10 behind layer 9."""
    parts = re.split(r"(\d+)", name)
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]
