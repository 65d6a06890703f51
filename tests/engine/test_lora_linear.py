"""LoRA in few operations: the values and gradients of mlx-lm's LoRALinear, counted in the graph."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import architecture_with_lora
from helpers.gradients import greatest_difference
from helpers.graphs import ELEMENTWISE, PRODUCTS, count, primitives
from mlx.utils import tree_map
from mlx_lm.tuner.lora import LoRALinear

from mlx_simpo.engine import operations
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
from mlx_simpo.engine.lora_linear import SharedWork, lora_operation
from mlx_simpo.engine.operations import LoRA, Operations, patchable_modules, patched

SCALE = 3.0
D, E = 64, 96  # sizes that can be quantized
KINDS = ("plain", "bias", "quantized")


def layer(kind: str = "plain", dtype: mx.Dtype = mx.float32, seed: int = 0, e: int = E) -> Any:
    """A LoRALinear of D inputs, with B not 0."""
    mx.random.seed(seed)
    base: Any = nn.Linear(D, e, bias=kind == "bias")
    base.set_dtype(dtype)
    if kind == "quantized":
        base = nn.QuantizedLinear.from_linear(base, group_size=32, bits=8)
    base.freeze()
    lora: Any = LoRALinear.from_base(base, r=4, scale=SCALE)
    lora.lora_b = mx.random.normal(lora.lora_b.shape) / 8
    mx.eval(lora.parameters())
    return lora


def inputs(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    x = mx.random.normal((*shape, D), key=mx.random.key(7)).astype(dtype)
    mx.eval(x)
    return x


def compute(lora: Any, operation: LoRA | None) -> Callable[[mx.array, mx.array, mx.array], Any]:
    """The layer as a function of what has a gradient; None: as mlx-lm computes it."""

    def function(x: mx.array, lora_a: mx.array, lora_b: mx.array) -> mx.array:
        if operation is not None:
            return operation(x, lora.linear, lora_a, lora_b, lora.scale)
        lora.update({"lora_a": lora_a, "lora_b": lora_b})
        return lora(x)

    return function


def gradients(function: Callable, *primals: mx.array) -> list[mx.array]:
    """The value, and the gradients of a sum of it with weights of both signs."""
    shape = function(*primals).shape
    d_out = mx.random.normal(shape, key=mx.random.key(9))
    mx.eval(d_out)

    def total(*primals: mx.array) -> tuple[mx.array, mx.array]:
        out = function(*primals)
        return (out * d_out).sum(), out

    (_, out), vjps = mx.value_and_grad(total, argnums=[*range(len(primals))])(*primals)
    return [out, *vjps]


def named(arrays: list[mx.array]) -> dict[str, np.ndarray]:
    return {str(i): np.array(a.astype(mx.float32)) for i, a in enumerate(arrays)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3), (2, 2, 3)])
def test_value_and_gradients_are_those_of_mlx_lm(shape: tuple[int, ...], kind: str) -> None:
    lora = layer(kind)
    primals = (inputs(*shape), lora.lora_a, lora.lora_b)
    ours, theirs = (
        named(gradients(compute(lora, operation), *primals))
        for operation in (lora_operation(), None)
    )
    assert {k: a.shape for k, a in ours.items()} == {k: a.shape for k, a in theirs.items()}
    assert greatest_difference(ours, theirs) < 1e-5


def test_half_precision_is_as_near_to_float32_as_mlx_lm_is() -> None:
    half, exact = (layer(dtype=dtype) for dtype in (mx.bfloat16, mx.float32))
    exact.linear.weight = half.linear.weight.astype(mx.float32)
    weights = (half.lora_a, half.lora_b)
    x = inputs(200, dtype=mx.bfloat16)
    expected = named(gradients(compute(exact, None), x.astype(mx.float32), *weights))

    def errors(operation: LoRA | None) -> np.ndarray:
        arrays = gradients(compute(half, operation), x, *weights)
        assert [a.dtype for a in arrays] == [mx.bfloat16] * 2 + [mx.float32] * 2
        return np.array([np.std(a - expected[k]) for k, a in named(arrays).items()])

    assert (errors(lora_operation()) < 1.1 * errors(None) + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_three_products_and_five_for_the_gradients(kind: str) -> None:
    lora = layer(kind)
    primals = (inputs(5), lora.lora_a, lora.lora_b)
    function = compute(lora, lora_operation())
    out = primitives(function(*primals))
    assert (count(out, *PRODUCTS), count(out, *ELEMENTWISE)) == (3, 0)
    outs, vjps = mx.vjp(function, [*primals], [mx.zeros((5, E))])
    both = primitives(*outs, *vjps)
    assert (count(both, *PRODUCTS), count(both, *ELEMENTWISE)) == (8, 0)
    outs, vjps = mx.vjp(compute(lora, None), [*primals], [mx.zeros((5, E))])
    assert count(primitives(*outs, *vjps), *PRODUCTS, *ELEMENTWISE) == 12


def test_weights_that_are_not_frozen_get_their_gradient() -> None:
    lora = layer("bias")
    lora.linear.unfreeze()
    x, operation = inputs(5), lora_operation()

    def total(weights: dict, operation: LoRA | None) -> mx.array:
        lora.linear.update(weights)
        return mx.square(compute(lora, operation)(x, lora.lora_a, lora.lora_b)).sum()

    weights = dict(lora.linear.parameters())
    ours, theirs = (mx.grad(total)(weights, o) for o in (operation, None))
    for name, gradient in theirs.items():
        assert mx.abs(gradient).max() > 1
        assert mx.allclose(ours[name], gradient, rtol=1e-4, atol=1e-4)


def test_an_input_has_its_gradient_where_the_base_layer_trains() -> None:
    lora = layer("bias")
    lora.linear.unfreeze()
    primals = (inputs(5), lora.lora_a, lora.lora_b)
    ours, theirs = (
        named(gradients(compute(lora, operation), *primals))
        for operation in (lora_operation(), None)
    )
    assert greatest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("adapter", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("base", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_mixed_dtypes(dtype: mx.Dtype, base: mx.Dtype, adapter: mx.Dtype) -> None:
    """Some checkpoints hold a few layers in another dtype, and an adapter may be in any: as near to
    float32 as mlx-lm is."""
    lora, exact = layer("bias", base), layer("bias", mx.float32)
    exact.linear.update(tree_map(lambda p: p.astype(mx.float32), lora.linear.parameters()))
    primals = [inputs(200, dtype=dtype), lora.lora_a.astype(adapter), lora.lora_b.astype(adapter)]
    wide = [primal.astype(mx.float32) for primal in primals]
    expected = named(gradients(compute(exact, None), *wide))
    ours, theirs = (
        gradients(compute(lora, operation), *primals) for operation in (lora_operation(), None)
    )
    assert [a.dtype for a in ours] == [a.dtype for a in theirs]
    for name, actual in named(ours).items():
        limit = np.std(named(theirs)[name] - expected[name])
        assert np.std(actual - expected[name]) <= 1.1 * limit + 1e-6 * np.std(expected[name]), name


def test_two_layers_on_the_same_base_layer() -> None:
    one, other = layer(), layer(seed=1)
    other.linear = one.linear
    operation = lora_operation()

    def total(x: mx.array, a: mx.array, b: mx.array, c: mx.array, d: mx.array) -> mx.array:
        outs, shared = [], SharedWork()
        for number, part in enumerate(mx.split(x, 2)):
            with shared.in_pass(is_last=number == 1):
                outs += [compute(one, operation)(part, a, b), compute(other, operation)(part, c, d)]
        return mx.concatenate(outs)

    def expected(x: mx.array, a: mx.array, b: mx.array, c: mx.array, d: mx.array) -> mx.array:
        outs = []
        for part in mx.split(x, 2):
            outs += [compute(one, None)(part, a, b), compute(other, None)(part, c, d)]
        return mx.concatenate(outs)

    primals = (inputs(6), one.lora_a, one.lora_b, other.lora_a, other.lora_b)
    ours, theirs = (named(gradients(f, *primals)) for f in (total, expected))
    assert greatest_difference(ours, theirs) < 1e-5


def in_passes(lora: Any, operation: LoRA, *, shares: bool) -> Callable:
    """The layer, three times, on parts of its input; the first pass stays by itself."""

    def function(x: mx.array, lora_a: mx.array, lora_b: mx.array) -> mx.array:
        outs, shared = [], SharedWork()
        for number, part in enumerate(mx.split(x, 3)):
            with shared.in_pass(is_last=number != 1) if shares else nullcontext():
                outs.append(compute(lora, operation)(part, lora_a, lora_b))
        return mx.concatenate(outs)

    return function


def test_passes_add_up_their_gradients_within_the_products() -> None:
    lora, operation = layer(), lora_operation()
    primals = (inputs(12), lora.lora_a, lora.lora_b)
    expected = named(gradients(compute(lora, None), *primals))
    adds = []
    for shares in (False, True):
        arrays = gradients(in_passes(lora, operation, shares=shares), *primals)
        adds.append(primitives(*arrays)["Add"])
        assert greatest_difference(named(arrays), expected) < 1e-5
    assert adds == [4, 2]  # of A and of B: three parts each, of which two are one


def test_a_part_that_is_lost_between_passes_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora, operation = layer(), lora_operation()
    primals = (inputs(12), lora.lora_a, lora.lora_b)
    expected = named(gradients(compute(lora, None), *primals))
    addmm = mx.addmm

    def forgetting(c: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        weights = c.shape in (lora.lora_a.shape, lora.lora_b.shape)
        return addmm(mx.zeros_like(c) if weights else c, *args, **kwargs)

    monkeypatch.setattr(mx, "addmm", forgetting)
    actual = named(gradients(in_passes(lora, operation, shares=True), *primals))
    assert greatest_difference(actual, expected) > 0.1


def test_layers_that_read_the_same_input_cast_it_once() -> None:
    layers = [layer(dtype=mx.bfloat16, seed=i, e=32) for i in range(3)]
    x, operation = inputs(5, dtype=mx.bfloat16), lora_operation()

    def run(x: mx.array) -> list[mx.array]:
        return [operation(x, m.linear, m.lora_a, m.lora_b, m.scale) for m in layers]

    casts = [primitives(*run(x))["AsType"]]
    with SharedWork().in_pass(is_last=True):
        shared = run(x)
        casts.append(primitives(*shared)["AsType"])
        other = run(x + 1)
    assert casts == [6, 4]  # with the three outputs
    for one, two in zip(shared, run(x), strict=True):
        assert mx.array_equal(one, two)
    for one, two in zip(other, run(x + 1), strict=True):
        assert mx.array_equal(one, two)


class Model(nn.Module):
    """As much of a model as the patch looks at."""

    def __init__(self, lora: Any) -> None:
        super().__init__()
        self.layers = [lora]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_the_patch_leaves_dropout_to_mlx_lm(dropout: float, training: bool) -> None:
    lora = layer()
    lora.dropout = nn.Dropout(dropout)
    lora.train(training)
    calls: list[tuple] = []

    def recording(*args: Any) -> mx.array:
        calls.append(args)
        return lora_operation()(*args)

    modules = patchable_modules(Model(lora))
    assert LoRALinear in modules
    expected = 0 if dropout and training else 1
    with patched(modules, Operations(None, None, recording)):
        lora(inputs(5))
    assert len(calls) == expected
    lora(inputs(5))
    assert len(calls) == expected
    assert LoRALinear.__call__ is operations._ORIGINAL_LORA


def test_the_patch_leaves_dropout_that_repeats_itself_to_mlx_lm() -> None:
    """Within gradient checkpointing, layers have a dropout of ours; without dropout, none."""
    operation, calls = lora_operation(), 0

    def counting(*args: Any) -> mx.array:
        nonlocal calls
        calls += 1
        return operation(*args)

    tokens = mx.arange(9)[None]
    for dropout, expected in ((0.5, 0), (0.0, 2 * 2 * 7)):  # twice, two layers of seven each
        lora: Any = architecture_with_lora(dropout=dropout)
        for training in (True, False):
            lora.train(training)
            with (
                gradient_checkpointing(lora),
                patched(patchable_modules(lora), Operations(None, None, counting)),
            ):
                mx.eval(lora(tokens))
        assert calls == expected


def test_another_scale_is_another_function() -> None:
    lora, operation = layer(), lora_operation()
    primals = (inputs(5), lora.lora_a, lora.lora_b)
    for scale in (SCALE, 2 * SCALE, SCALE):
        lora.scale = scale
        ours, theirs = (named(gradients(compute(lora, o), *primals)) for o in (operation, None))
        assert greatest_difference(ours, theirs) < 1e-5
