"""The probe: any rearrangement that a sanitize may make is read back, and undone bit for bit."""

import itertools
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_simpo.convert.probe import trace
from mlx_simpo.convert.weights import Layout, checkpoint_tensors
from mlx_simpo.errors import SimPOError

Weights = dict[str, mx.array]
SHAPES = {"a": (4, 6), "b": (4, 6), "c": (6,), "d": (2, 4, 3), "e": (8, 6), "f": (1, 1)}


def model_with(sanitize: Callable[[Weights], Weights]) -> nn.Module:
    """A model whose sanitize is this function."""
    model = nn.Module()
    model.sanitize = sanitize
    return model


def round_trip(sanitize: Callable[[Weights], Weights]) -> None:
    """What sanitize made of random tensors is turned back into these very tensors."""
    rng = np.random.default_rng(0)
    tensors = {name: mx.array(rng.normal(size=s).astype(np.float32)) for name, s in SHAPES.items()}
    found = trace(lambda: model_with(lambda weights: sanitize(dict(weights))), SHAPES)
    layout = Layout(SHAPES, {name: pieces for name, (_, pieces) in found.items()})
    made = sanitize(dict(tensors))
    assert {name: shape for name, (shape, _) in found.items()} == {
        n: w.shape for n, w in made.items()
    }
    back = checkpoint_tensors(made, layout)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.array(back[name]), np.array(tensor), err_msg=name)


def stacked(w: Weights) -> Weights:
    return {"ab": mx.stack([w.pop("a"), w.pop("b")]), **w}


def joined(w: Weights) -> Weights:
    return {"eab": mx.concatenate([w.pop("e"), w.pop("b"), w.pop("a")], axis=0), **w}


def moved(w: Weights) -> Weights:
    z = w.pop("f")
    return {**w, "d": w["d"].moveaxis(2, 1), "a": w["a"].T, "z": z}


def split(w: Weights) -> Weights:
    up, gate = mx.split(w.pop("e"), 2, axis=0)
    return {**w, "gate": gate, "up": up}


def by_heads(w: Weights) -> Weights:
    """As deepseek_v3 splits kv_b_proj: rows by head, one part of each transposed."""
    e = w.pop("e").reshape(2, 4, 6)
    return {**w, "k": e[:, :3].swapaxes(-1, -2), "v": e[:, 3:]}


def interleaved(w: Weights) -> Weights:
    e = w.pop("e")
    return {**w, "even": e[::2], "odd": e[1::2]}


def backwards(w: Weights) -> Weights:
    return {**w, "a": w["a"][::-1]}


def one_more(w: Weights) -> Weights:
    return {**w, "c": w["c"] + 1.0}


@pytest.mark.parametrize(
    "sanitize", [stacked, joined, moved, split, by_heads, interleaved, backwards], ids=str
)
def test_rearrangements_are_undone(sanitize: Callable) -> None:
    round_trip(sanitize)


def test_what_is_added_is_taken_off() -> None:
    found = trace(lambda: model_with(lambda w: one_more(dict(w))), SHAPES)
    assert [piece.offset for piece in found["c"][1]] == [1.0]
    back = checkpoint_tensors(
        {"c": mx.array([1.0, 2, 3, 4, 5, 6])}, Layout({"c": (6,)}, {"c": found["c"][1]})
    )
    assert back["c"].tolist() == [0, 1, 2, 3, 4, 5]


def renamed(w: Weights) -> Weights:
    return {
        f"model.{name}" if len(name) == 1 and name in "bc" else name: t for name, t in w.items()
    }


@pytest.mark.parametrize("steps", list(itertools.permutations([renamed, moved, split])), ids=str)
def test_one_after_the_other(steps: Sequence[Callable]) -> None:
    def sanitize(weights: Weights) -> Weights:
        for step in steps:
            weights = step(weights)
        return weights

    round_trip(sanitize)


@pytest.mark.parametrize(
    "sanitize",
    [
        lambda w: {**w, "a": w["a"] * 2},
        lambda w: {**w, "a": w["a"] + w["b"]},
        lambda w: {**w, "a": (w["a"] + w["b"]) / 2},
        lambda w: {**w, "a": mx.repeat(w["a"], 2, axis=0)},
        lambda w: {**w, "c": w["c"] * w["c"]},
        lambda w: {**w, "c": -mx.abs(w["c"])},
    ],
    ids=["twice", "sum", "mean", "repeated", "squared", "absolute"],
)
def test_what_cannot_be_undone_is_refused(sanitize: Callable) -> None:
    with pytest.raises(SimPOError, match=r"undone|cannot be made|two arrays"):
        round_trip(sanitize)


def test_a_tensor_that_is_dropped_cannot_be_made() -> None:
    shapes = {"a": (2, 2), "b": (3,)}
    found = trace(lambda: model_with(lambda w: {"a": w["a"]}), shapes)
    layout = Layout(shapes, {name: pieces for name, (_, pieces) in found.items()})
    with pytest.raises(SimPOError, match=r"1 tensors .* cannot be made .* b"):
        checkpoint_tensors({"a": mx.zeros((2, 2))}, layout)


def test_a_part_of_a_tensor_cannot_stand_for_it() -> None:
    found = trace(lambda: model_with(lambda w: {"a": w["a"][:1]}), {"a": (2, 2)})
    with pytest.raises(SimPOError, match="cannot be made"):
        checkpoint_tensors({"a": mx.zeros((1, 2))}, Layout({"a": (2, 2)}, {"a": found["a"][1]}))


def test_sanitize_that_fails_is_named() -> None:
    with pytest.raises(SimPOError, match="KeyError"):
        trace(lambda: model_with(lambda w: {"a": w["missing"]}), {"a": (2, 2)})


def test_each_pass_has_a_fresh_model() -> None:
    """gemma3_text's sanitize, say, changes the model it belongs to."""
    made = []

    def fresh() -> nn.Module:
        model = model_with(lambda w: w)
        made.append(model)
        return model

    trace(fresh, {"a": (2, 2)})
    assert len(made) == len({id(model) for model in made}) == 5
