"""The probe: any rearrangement that a sanitize may do is read back, and undone bit for bit."""

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
Sanitize = Callable[[Weights], Weights]
SHAPES = {"a": (4, 6), "b": (4, 6), "c": (6,), "d": (2, 4, 3), "e": (8, 6), "f": (1, 1)}


def model_with(sanitize: Sanitize) -> nn.Module:
    """A model with this sanitize, which may change the dictionary that it gets."""
    model = nn.Module()
    model.sanitize = lambda weights: sanitize(dict(weights))
    return model


def traced_layout(sanitize: Sanitize, shapes: dict) -> Layout:
    """The layout that the probe finds for a model with this sanitize."""
    traced = trace(lambda: model_with(sanitize), shapes)
    return Layout(shapes, {name: pieces for name, (_, pieces) in traced.items()})


def check_round_trip(sanitize: Sanitize) -> None:
    """What sanitize makes of random tensors is turned back into these very tensors."""
    rng = np.random.default_rng(0)
    tensors = {name: mx.array(rng.normal(size=s).astype(np.float32)) for name, s in SHAPES.items()}
    weights = sanitize(dict(tensors))
    traced = trace(lambda: model_with(sanitize), SHAPES)
    assert {name: shape for name, (shape, _) in traced.items()} == {
        name: array.shape for name, array in weights.items()
    }
    back = checkpoint_tensors(weights, traced_layout(sanitize, SHAPES))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.array(back[name]), np.array(tensor), err_msg=name)


def stacked(w: Weights) -> Weights:
    return {"ab": mx.stack([w.pop("a"), w.pop("b")]), **w}


def concatenated(w: Weights) -> Weights:
    return {"eab": mx.concatenate([w.pop("e"), w.pop("b"), w.pop("a")], axis=0), **w}


def transposed(w: Weights) -> Weights:
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


def reversed_rows(w: Weights) -> Weights:
    return {**w, "a": w["a"][::-1]}


def renamed(w: Weights) -> Weights:
    return {f"model.{name}" if name in ("b", "c") else name: array for name, array in w.items()}


@pytest.mark.parametrize(
    "sanitize", [stacked, concatenated, transposed, split, by_heads, interleaved, reversed_rows]
)
def test_rearrangements_are_undone(sanitize: Sanitize) -> None:
    check_round_trip(sanitize)


@pytest.mark.parametrize("steps", list(itertools.permutations([renamed, transposed, split])))
def test_several_rearrangements_are_undone_in_any_order(steps: Sequence[Sanitize]) -> None:
    def sanitize(weights: Weights) -> Weights:
        for step in steps:
            weights = step(weights)
        return weights

    check_round_trip(sanitize)


def test_an_added_constant_is_subtracted() -> None:
    layout = traced_layout(lambda w: {"c": w["c"] + 1.0}, {"c": (6,)})
    assert [piece.offset for piece in layout.pieces["c"]] == [1.0]
    back = checkpoint_tensors({"c": mx.array([1.0, 2, 3, 4, 5, 6])}, layout)
    assert back["c"].tolist() == [0, 1, 2, 3, 4, 5]


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
    ids=["doubled", "sum", "mean", "repeated", "squared", "absolute"],
)
def test_what_cannot_be_undone_is_rejected(sanitize: Sanitize) -> None:
    with pytest.raises(SimPOError, match=r"cannot be undone|cannot be rebuilt"):
        check_round_trip(sanitize)


def test_an_error_in_sanitize_is_named() -> None:
    with pytest.raises(SimPOError, match=r"cannot read a checkpoint .*: KeyError: 'missing'"):
        trace(lambda: model_with(lambda w: {"a": w["missing"]}), {"a": (2, 2)})


def test_each_pass_has_a_new_model() -> None:
    """gemma3_text's sanitize, for example, changes the model that it belongs to."""
    models = []

    def new_model() -> nn.Module:
        models.append(model_with(lambda w: w))
        return models[-1]

    trace(new_model, {"a": (2, 2)})
    assert len({id(model) for model in models}) == len(models) == 5  # 3 passes, and 2 axes
