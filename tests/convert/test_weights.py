"""A checkpoint's tensors from a model's arrays. (With what the probe finds: test_probe.py.)"""

import mlx.core as mx
import pytest

from mlx_simpo.convert.probe import Piece
from mlx_simpo.convert.weights import (
    Layout,
    checkpoint_block,
    checkpoint_tensors,
    natural_sort_key,
    source_names,
)
from mlx_simpo.errors import SimPOError

WHOLE = (slice(0, 2), slice(0, 2))
TOP, BOTTOM = (slice(0, 1), slice(0, 2)), (slice(1, 2), slice(0, 2))


def piece(source: str, source_region: tuple = WHOLE, region: tuple = WHOLE) -> Piece:
    return Piece(source, source_region, region, (0, 1), 0.0)


def test_a_tensor_that_no_array_holds_cannot_be_made() -> None:
    layout = Layout({"a": (2, 2), "b": (3,)}, {"a": [piece("a")]})
    with pytest.raises(SimPOError, match=r"1 tensors of the checkpoint cannot be made .* b;"):
        checkpoint_tensors({"a": mx.zeros((2, 2))}, layout)


def test_a_tensor_that_is_held_in_part_cannot_be_made() -> None:
    layout = Layout({"a": (2, 2)}, {"a": [piece("a", TOP, TOP)]})
    with pytest.raises(SimPOError, match="cannot be made from the MLX model"):
        checkpoint_tensors({"a": mx.zeros((1, 2))}, layout)


def test_a_tensor_that_two_arrays_hold_cannot_be_made() -> None:
    layout = Layout({"a": (2, 2)}, {"x": [piece("a")], "y": [piece("a")]})
    with pytest.raises(SimPOError, match="a cannot be rebuilt: two arrays"):
        checkpoint_tensors({"x": mx.zeros((2, 2)), "y": mx.zeros((2, 2))}, layout)


def test_parts_keep_their_dtype() -> None:
    layout = Layout({"a": (2, 2)}, {"x": [piece("a", TOP, TOP)], "y": [piece("a", BOTTOM, TOP)]})
    weights = {"x": mx.full((1, 2), 1.0, mx.bfloat16), "y": mx.full((1, 2), 2.0, mx.bfloat16)}
    tensors = checkpoint_tensors(weights, layout)
    assert tensors["a"].dtype == mx.bfloat16
    assert tensors["a"].tolist() == [[1, 1], [2, 2]]


def test_only_the_tensors_that_were_asked_for_are_made() -> None:
    layout = Layout({"a": (2, 2), "b": (2, 2)}, {"a": [piece("a")], "b": [piece("b")]})
    weights = {"a": mx.zeros((2, 2)), "b": mx.ones((2, 2))}
    assert checkpoint_tensors(weights, layout, source_names(layout, {"b"})).keys() == {"b"}


def test_a_block_is_transposed_back() -> None:
    array = mx.array([[1.0, 3.0], [2.0, 4.0]])
    assert checkpoint_block(array, Piece("a", WHOLE, WHOLE, (1, 0), 0.0)).tolist() == [
        [1, 2],
        [3, 4],
    ]
    assert checkpoint_block(array, Piece("a", WHOLE, WHOLE, (0, 1), 1.0)).tolist() == [
        [0, 2],
        [1, 3],
    ]


def test_layer_10_is_sorted_behind_layer_9() -> None:
    names = ["layers.10.a", "layers.9.b", "layers.9.a", "embed"]
    assert sorted(names, key=natural_sort_key) == ["embed", "layers.9.a", "layers.9.b", names[0]]
