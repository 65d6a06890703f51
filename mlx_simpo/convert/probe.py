"""Where every element of an MLX model's weights comes from in its checkpoint.

mlx-lm's ``sanitize`` renames, stacks, slices and transposes a checkpoint's tensors when it loads
them, and nothing undoes this for writing. Here sanitize is run on arrays whose values say where
they are: one pass with the index of each tensor, and one pass per axis with the position along it.
What comes out tells what was done, and so how to undo it. A last pass with random numbers checks
this, and that values are moved and not changed (except for a constant offset). The arrays are
broadcast from a few vectors, so no pass needs the memory of a model.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import SimPOError

Shape = tuple[int, ...]
Region = tuple[slice, ...]


class Piece(NamedTuple):
    """A block of a model's array, and the block of a checkpoint's tensor that it comes from.

    array[region] = source[source_region].transpose(axes).reshape(shape of the region) + offset
    """

    source: str
    source_region: Region
    region: Region
    axes: tuple[int, ...]
    offset: float


class Traces(NamedTuple):
    """The results of the passes for one array of the model, all of that array's shape.

    offset: what sanitize adds to each element. tensor: the index of the tensor that each element
    comes from. random: the random number that each element gets. positions: per axis, the position
    in that tensor.
    """

    offset: mx.array
    tensor: mx.array
    random: mx.array
    positions: list[mx.array]


def trace(
    new_model: Callable[[], nn.Module], shapes: Mapping[str, Shape]
) -> dict[str, tuple[Shape, list[Piece]]]:
    """Find out what ``sanitize`` makes of tensors with these names and shapes.

    Args:
        new_model: creates the model; called for every pass, since sanitize may change the model
            that it belongs to.
        shapes: of the checkpoint's tensors, by name.

    Returns:
        For each array that the model would load: its shape, and the pieces that it consists of.

    Raises:
        SimPOError: sanitize fails on these tensors, or changes values in a way that cannot be
            undone.
    """
    indices = {name: index for index, name in enumerate(shapes)}
    # Zeros show what is added: sanitize may add a constant to a tensor (qwen3_5 adds 1 to norms).
    passes: list[Callable[[str, Shape], mx.array]] = [
        lambda _, shape: mx.broadcast_to(mx.array(0.0), shape),
        lambda name, shape: mx.broadcast_to(mx.array(float(indices[name])), shape),
        lambda name, shape: random_tensor(indices[name], shape),
    ]
    depth = max((len(shape) for shape in shapes.values()), default=0)
    passes += [lambda _, shape, axis=axis: positions_along(shape, axis) for axis in range(depth)]
    results, inputs = [], []
    for encode in passes:
        weights = {name: encode(name, shape) for name, shape in shapes.items()}
        results.append(sanitized(new_model(), dict(weights)))
        # With the arrays themselves, so that no id is reused while they are compared.
        inputs.append({id(array): (name, array) for name, array in weights.items()})
    names = list(shapes)
    traced = {}
    for target in list(results[0]):
        arrays = [result.pop(target) for result in results]
        shape = arrays[0].shape
        whole = tuple(slice(0, size) for size in shape)
        sources = {known.get(id(a), (None,))[0] for known, a in zip(inputs, arrays, strict=True)}
        if len(sources) == 1 and (source := sources.pop()) is not None:
            # The very array that went in: no need to compute anything, however large it is.
            traced[target] = shape, [Piece(source, whole, whole, tuple(range(len(shape))), 0.0)]
            continue
        if stacked := stacked_pieces(arrays[1], arrays[2], names, shapes):
            traced[target] = shape, stacked
            continue
        offset, *others = arrays
        tensor, random, *positions = (array - offset for array in others)
        try:
            traces = Traces(offset, tensor, random, positions)
            traced[target] = shape, list(find_pieces(traces, whole, names, shapes))
        except ValueError:
            raise SimPOError(
                f"mlx-lm's sanitize makes {target} of the checkpoint's tensors in a way that "
                "cannot be undone; convert this model with the library it came from"
            ) from None
    return traced


def stacked_pieces(
    tensor: mx.array, random: mx.array, names: list[str], shapes: Mapping[str, Shape]
) -> list[Piece]:
    """Return the pieces of an array that is a plain stack of whole tensors; [] if it is not one.

    The same as `find_pieces` returns, in a fraction of the time: most of the arrays of a mixture
    of experts are such stacks.

    Args:
        tensor, random: as in Traces, without the offset subtracted.
    """
    count, *inner = tensor.shape or (0,)
    indices = (
        np.array(tensor[(slice(None), *[0] * len(inner))]) if inner and count else np.array([])
    )
    pieces = []
    for position, index in enumerate(indices.tolist()):
        # Not an index if sanitize computed with it.
        name = names[int(index)] if index in range(len(names)) else ""
        if shapes.get(name) != tuple(inner):
            return []
        if not mx.array_equal(random[position], random_tensor(int(index), tuple(inner))).item():
            return []
        block = tuple(slice(0, size) for size in inner)
        region = (slice(position, position + 1), *block)
        pieces.append(Piece(name, block, region, tuple(range(len(inner))), 0.0))
    return pieces


def sanitized(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return what a model's sanitize makes of a checkpoint's tensors.

    Raises:
        SimPOError: sanitize fails on them.
    """
    sanitize = getattr(model, "sanitize", None)
    if sanitize is None:
        return weights
    try:
        return dict(sanitize(weights))
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise SimPOError(
            f"mlx-lm cannot read a checkpoint with these tensors: {type(error).__name__}: {error}"
        ) from None


def random_tensor(index: int, shape: Shape) -> mx.array:
    """Return random numbers of which hardly two are equal, within this tensor or in two of them.

    They are whole numbers, so that float32 represents them, and their sums with what sanitize may
    add, exactly. As sums of one vector per axis they need no memory for the whole shape.

    Args:
        index: of the tensor; the seed.
    """
    key = mx.random.key(index)
    total = mx.broadcast_to(mx.random.randint(0, 1 << 20, key=key).astype(mx.float32), shape)
    for axis, size in enumerate(shape):
        key, now = mx.random.split(key)
        line = mx.random.randint(0, 1 << 20, (size,), key=now).astype(mx.float32)
        total = total + line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return total


def positions_along(shape: Shape, axis: int) -> mx.array:
    """Return an array whose elements are their position along ``axis``; 0 without such an axis."""
    if axis >= len(shape):
        return mx.broadcast_to(mx.array(0.0), shape)
    line = mx.arange(shape[axis], dtype=mx.float32)
    return mx.broadcast_to(line.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape)


def find_pieces(
    traces: Traces, region: Region, names: list[str], shapes: Mapping[str, Shape]
) -> Iterator[Piece]:
    """Yield the pieces that a region of one array consists of.

    Raises:
        ValueError: its elements are not elements of the checkpoint's tensors.
    """
    tensor = traces.tensor[region]
    lowest, highest = scalar(tensor.min()), scalar(tensor.max())
    if lowest == highest and lowest in range(len(names)):
        piece = single_piece(traces, region, names[int(lowest)], shapes)
        # Squaring leaves positions 0 and 1 unchanged, for example, but not random numbers.
        if piece is not None and reproduces_random(piece, traces, int(lowest), shapes):
            yield piece
            return
    parts = split_region(tensor, region)
    if not parts:
        raise ValueError
    for part in parts:
        yield from find_pieces(traces, part, names, shapes)


def split_region(tensor: mx.array, region: Region) -> list[Region]:
    """Split a region where the tensor changes along an axis; into single rows if it does not.

    Args:
        tensor: the indices of the tensors in this region.

    Returns:
        At least two regions; none for a single element, which cannot be split.
    """
    for axis, size in enumerate(tensor.shape):
        line = np.array(tensor[tuple(slice(None) if a == axis else 0 for a in range(tensor.ndim))])
        cuts = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), size]
        if len(cuts) > 2:  # more than both ends
            return [subregion(region, axis, start, stop) for start, stop in pairwise(cuts)]
    # All of one tensor, but not one block of it: reversed or interleaved rows, for example.
    for axis, size in enumerate(tensor.shape):
        if size > 1:
            return [subregion(region, axis, index, index + 1) for index in range(size)]
    return []


def subregion(region: Region, axis: int, start: int, stop: int) -> Region:
    """Return a region's part from ``start`` to ``stop`` along ``axis``, relative to the region."""
    part = slice(region[axis].start + start, region[axis].start + stop)
    return (*region[:axis], part, *region[axis + 1 :])


def single_piece(
    traces: Traces, region: Region, source: str, shapes: Mapping[str, Shape]
) -> Piece | None:
    """Describe a region as one transposed block of a tensor; None if it is not one.

    Args:
        source: the tensor that all elements of the region come from.
    """
    sizes = [part.stop - part.start for part in region]
    offset = traces.offset[region]
    constant = scalar(offset.min())
    if scalar(offset.max()) != constant:
        return None
    block: list[slice] = []
    order: list[int] = []  # for each axis of the source: the axis of the region that it became
    for axis in range(len(shapes[source])):
        positions = traces.positions[axis][region]
        start = scalar(positions.min())
        target = next(
            (a for a in range(len(sizes)) if increases_along(positions, start, a, sizes)), None
        )
        if start != int(start) or (target is None and scalar(positions.max()) != start):
            return None
        length = 1 if target is None else sizes[target]
        block.append(slice(int(start), int(start) + length))
        # Axes of length 1 leave no trace in the positions, and it does not matter where they go.
        order.append(len(sizes) if target is None else target)
    # Fewer elements in the block than in the region: some were repeated.
    if np.prod([b.stop - b.start for b in block]) != np.prod(sizes):
        return None
    axes = tuple(sorted(range(len(order)), key=lambda axis: order[axis]))
    return Piece(source, tuple(block), region, axes, constant)


def reproduces_random(
    piece: Piece, traces: Traces, index: int, shapes: Mapping[str, Shape]
) -> bool:
    """Whether the piece turns the random tensor of this index into what sanitize made of it."""
    sizes = [part.stop - part.start for part in piece.region]
    source = random_tensor(index, shapes[piece.source])[piece.source_region]
    expected = source.transpose(piece.axes).reshape(sizes)
    return mx.array_equal(expected, traces.random[piece.region]).item() is True


def increases_along(positions: mx.array, start: float, axis: int, sizes: list[int]) -> bool:
    """Whether positions are start, start + 1, … along ``axis`` and constant along the others."""
    if sizes[axis] == 1:
        return False
    return mx.all(positions == start + positions_along(tuple(sizes), axis)).item() is True


def scalar(array: mx.array) -> float:
    """Return the value of an array with one element."""
    return float(np.array(array))
