"""Where every element of an MLX model's weights comes from in its checkpoint.

mlx-lm's ``sanitize`` renames, stacks, slices and transposes a checkpoint's tensors on the way in,
and nothing undoes it on the way out. Here it is run on arrays that say where they are: one pass
with the number of each tensor, one a axis with the position on it. What comes out tells what was
done, and so how to undo it; a last pass with random numbers shows that it tells the truth, and that
values were moved and not changed. The arrays are sums of a few vectors: no pass holds a model.
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
    """target[region] = source[source_region].transpose(axes).reshape(of the region) + offset."""

    source: str
    source_region: Region
    region: Region
    axes: tuple[int, ...]
    offset: float


class Traces(NamedTuple):
    """The passes' results for one array of the model: what is added, which tensor, random numbers
    in its place, and which place it is, an array an axis."""

    offset: mx.array
    tensor: mx.array
    random: mx.array
    places: list[mx.array]


def trace(
    fresh: Callable[[], nn.Module], shapes: Mapping[str, Shape]
) -> dict[str, tuple[Shape, list[Piece]]]:
    """What ``sanitize`` makes of tensors of these names and shapes.

    Args:
        fresh: makes the model anew; sanitize may change it.
        shapes: of the checkpoint's tensors.

    Returns:
        Of each array that the model would load: its shape, and the pieces it consists of.

    Raises:
        SimPOError: sanitize fails on them, or changes values in a way that cannot be undone.
    """
    numbers = {name: number for number, name in enumerate(shapes)}
    passes: list[Callable[[str, Shape], mx.array]] = [
        lambda _, shape: mx.broadcast_to(mx.array(0.0), shape),
        lambda name, shape: mx.broadcast_to(mx.array(float(numbers[name])), shape),
        lambda name, shape: scattered(numbers[name], shape),
    ]
    depth = max((len(shape) for shape in shapes.values()), default=0)
    passes += [lambda _, shape, axis=axis: positions(shape, axis) for axis in range(depth)]
    results, same = [], []
    for encode in passes:
        weights = {name: encode(name, shape) for name, shape in shapes.items()}
        results.append(sanitized(fresh(), dict(weights)))
        same.append({id(array): (name, array) for name, array in weights.items()})
    names = list(shapes)
    found = {}
    for target in list(results[0]):
        arrays = [result.pop(target) for result in results]
        shape = arrays[0].shape
        whole = tuple(slice(0, size) for size in shape)
        sources = {known.get(id(a), (None,))[0] for known, a in zip(same, arrays, strict=True)}
        if len(sources) == 1 and (source := sources.pop()) is not None:
            # The very array that went in: nothing is to be computed, however large it is.
            found[target] = shape, [Piece(source, whole, whole, tuple(range(len(shape))), 0.0)]
            continue
        if stacked := stack(arrays[1], arrays[2], names, shapes):
            found[target] = shape, stacked
            continue
        offset, *others = arrays
        tensor, random, *places = (array - offset for array in others)
        try:
            traces = Traces(offset, tensor, random, places)
            found[target] = shape, list(pieces(traces, whole, names, shapes))
        except ValueError:
            raise SimPOError(
                f"mlx-lm's sanitize makes {target} of the checkpoint's tensors in a way that "
                "cannot be undone; convert this model with the library it came from"
            ) from None
    return found


def stack(
    tensor: mx.array, random: mx.array, names: list[str], shapes: Mapping[str, Shape]
) -> list[Piece]:
    """The pieces of a plain stack of whole tensors; none if it is not one.

    What `pieces` would find, in a fraction of the time: stacked experts are most of such a model.
    """
    count, *inner = tensor.shape or (0,)
    numbers = (
        np.array(tensor[(slice(None), *[0] * len(inner))]) if inner and count else np.array([])
    )
    found = []
    for index, number in enumerate(numbers.tolist()):
        name = names[int(number)] if number in range(len(names)) else ""
        if shapes.get(name) != tuple(inner):
            return []
        if not mx.array_equal(random[index], scattered(int(number), tuple(inner))).item():
            return []
        block = tuple(slice(0, size) for size in inner)
        region = (slice(index, index + 1), *block)
        found.append(Piece(name, block, region, tuple(range(len(inner))), 0.0))
    return found


def sanitized(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """What a model makes of a checkpoint's tensors; SimPOError if it cannot take them."""
    sanitize = getattr(model, "sanitize", None)
    if sanitize is None:
        return weights
    try:
        return dict(sanitize(weights))
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise SimPOError(
            f"mlx-lm cannot read a checkpoint with these tensors: {type(error).__name__}: {error}"
        ) from None


def scattered(number: int, shape: Shape) -> mx.array:
    """Numbers of which hardly two are the same, in one tensor or in several; whole ones, so that
    float32 holds them, and their sums with what sanitize may add, exactly."""
    key = mx.random.key(number)
    total = mx.broadcast_to(mx.random.randint(0, 1 << 20, key=key).astype(mx.float32), shape)
    for axis, size in enumerate(shape):
        key, now = mx.random.split(key)
        line = mx.random.randint(0, 1 << 20, (size,), key=now).astype(mx.float32)
        total = total + line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return total


def positions(shape: Shape, axis: int) -> mx.array:
    """An array whose elements are their position on ``axis``; zeros if there is no such axis."""
    if axis >= len(shape):
        return mx.broadcast_to(mx.array(0.0), shape)
    line = mx.arange(shape[axis], dtype=mx.float32)
    return mx.broadcast_to(line.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape)


def pieces(
    traces: Traces, region: Region, names: list[str], shapes: Mapping[str, Shape]
) -> Iterator[Piece]:
    """The pieces of a region of one array; ValueError if it is no rearrangement of tensors."""
    tensor = traces.tensor[region]
    lowest, highest = value(tensor.min()), value(tensor.max())
    if lowest == highest and lowest in range(len(names)):
        piece = one_piece(traces, region, names[int(lowest)], shapes)
        if piece is not None and holds(piece, traces, int(lowest), shapes):
            yield piece
            return
    parts = split(tensor, region)
    if not parts:
        raise ValueError
    for part in parts:
        yield from pieces(traces, part, names, shapes)


def split(tensor: mx.array, region: Region) -> list[Region]:
    """The region cut where the tensor changes along an axis; into single rows if it does not."""
    for axis, size in enumerate(tensor.shape):
        line = np.array(tensor[tuple(slice(None) if a == axis else 0 for a in range(tensor.ndim))])
        cuts = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), size]
        if len(cuts) > 2:
            return [cut(region, axis, a, b) for a, b in pairwise(cuts)]
    for axis, size in enumerate(tensor.shape):
        if size > 1:
            return [cut(region, axis, a, a + 1) for a in range(size)]
    return []


def cut(region: Region, axis: int, start: int, stop: int) -> Region:
    """The part of a region from ``start`` to ``stop`` on ``axis``, counted within it."""
    inner = slice(region[axis].start + start, region[axis].start + stop)
    return (*region[:axis], inner, *region[axis + 1 :])


def one_piece(
    traces: Traces, region: Region, source: str, shapes: Mapping[str, Shape]
) -> Piece | None:
    """The region as one transposed block of ``source``; None if it is not."""
    sizes = [part.stop - part.start for part in region]
    offset = traces.offset[region]
    constant = value(offset.min())
    if value(offset.max()) != constant:
        return None
    block: list[slice] = []
    order: list[int] = []
    for axis in range(len(shapes[source])):
        place = traces.places[axis][region]
        start = value(place.min())
        target = next((a for a in range(len(sizes)) if runs_along(place, start, a, sizes)), None)
        if start != int(start) or (target is None and value(place.max()) != start):
            return None
        length = 1 if target is None else sizes[target]
        block.append(slice(int(start), int(start) + length))
        order.append(len(sizes) if target is None else target)
    if np.prod([b.stop - b.start for b in block]) != np.prod(sizes):
        return None
    axes = tuple(sorted(range(len(order)), key=lambda axis: order[axis]))
    return Piece(source, tuple(block), region, axes, constant)


def holds(piece: Piece, traces: Traces, number: int, shapes: Mapping[str, Shape]) -> bool:
    """Whether the piece makes of the random numbers what sanitize has made of them."""
    sizes = [part.stop - part.start for part in piece.region]
    source = scattered(number, shapes[piece.source])[piece.source_region]
    made = source.transpose(piece.axes).reshape(sizes)
    return mx.array_equal(made, traces.random[piece.region]).item() is True


def runs_along(place: mx.array, start: float, axis: int, sizes: list[int]) -> bool:
    """Whether positions are start, start + 1, … along ``axis`` and constant along the others."""
    if sizes[axis] == 1:
        return False
    return mx.all(place == start + positions(tuple(sizes), axis)).item() is True


def value(array: mx.array) -> float:
    """The value of an array with one element."""
    return float(np.array(array))
