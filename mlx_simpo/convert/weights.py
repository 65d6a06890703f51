"""A checkpoint's tensors from the arrays of an MLX model: mlx-lm's sanitize undone."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from ..errors import SimPOError
from .probe import Piece, Shape


class Layout(NamedTuple):
    """How the arrays of a model are laid out in its checkpoint.

    shapes: of the checkpoint's tensors that the model uses, by name. pieces: of each array of the
    model, by name.
    """

    shapes: dict[str, Shape]
    pieces: dict[str, list[Piece]]


def checkpoint_tensors(
    weights: Mapping[str, mx.array], layout: Layout, only: set[str] | None = None
) -> dict[str, mx.array]:
    """Return the checkpoint's tensors, built lazily from the model's arrays.

    Args:
        weights: the model's arrays by name, of floats.
        only: names of the tensors to build; None for all.

    Raises:
        SimPOError: the model's arrays do not fill a tensor, or fill a part of it twice.
    """
    tensors = {
        name: mx.zeros(shape, dtype=mx.float32)
        for name, shape in layout.shapes.items()
        if only is None or name in only
    }
    missing = {name: tensors[name].size for name in tensors}  # elements that are not filled yet
    for name, parts in layout.pieces.items():
        for piece in parts:
            if piece.source not in tensors:
                continue
            block = checkpoint_block(weights[name], piece)
            if missing[piece.source] < block.size:
                raise SimPOError(
                    f"{piece.source} cannot be rebuilt: two arrays of the MLX model hold the same "
                    "part of it; such a model is not converted"
                )
            tensor = tensors[piece.source]
            missing[piece.source] -= block.size
            if block.shape == tensor.shape:
                tensors[piece.source] = block
            else:
                if tensor.dtype != block.dtype:
                    tensor = tensor.astype(block.dtype)
                tensor[piece.source_region] = block
                tensors[piece.source] = tensor
    if incomplete := [name for name, count in missing.items() if count]:
        raise SimPOError(
            f"{len(incomplete)} tensors of the checkpoint cannot be made from the MLX model, e.g. "
            f"{incomplete[0]}; such a model is not converted"
        )
    return tensors


def checkpoint_block(array: mx.array, piece: Piece) -> mx.array:
    """Return the block of the checkpoint's tensor that one piece of a model's array came from."""
    shape = [part.stop - part.start for part in piece.source_region]
    block = array[piece.region].reshape([shape[axis] for axis in piece.axes])
    inverse_axes = sorted(range(len(piece.axes)), key=lambda axis: piece.axes[axis])
    block = block.transpose(inverse_axes)
    # Without a subtraction where there is no offset, so that the dtype and every bit are kept.
    return block - piece.offset if piece.offset else block


def source_names(layout: Layout, arrays: set[str]) -> set[str]:
    """Return the names of the checkpoint's tensors that hold a part of these arrays."""
    return {piece.source for name in arrays for piece in layout.pieces[name]}


def natural_sort_key(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts layer 10 behind layer 9."""
    parts = re.split(r"(\d+)", name)
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]
