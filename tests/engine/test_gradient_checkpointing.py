"""Gradient checkpointing gives the same gradients as the plain backward pass, with dropout too."""

import gc
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import architecture_with_lora
from helpers.gradients import greatest_difference
from helpers.gradients import run as engine_run
from helpers.tiny import tiny_model, token_pair
from mlx.utils import tree_flatten, tree_map

from mlx_simpo import LoRAConfig
from mlx_simpo.engine import gradient_checkpointing as checkpointing
from mlx_simpo.engine.choice import shared_prefix_engine
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing, is_checkpointed
from mlx_simpo.engine.operations import Operations, current_operations, patched
from mlx_simpo.engine.prefix_cache import (
    PrefixCacheList,
    PrefixKVCache,
    PrefixStates,
    cache_arrays,
)
from mlx_simpo.model.adapters import flat_arrays
from mlx_simpo.model.lora import attach_lora

TOKENS = mx.random.randint(0, 500, (2, 24), key=mx.random.key(3))


def model_with_lora(**lora: Any) -> Any:
    model = tiny_model()
    attach_lora(model, LoRAConfig(rank=4, **lora), seed=1)
    # B is zero at first, and so would be A's gradients.
    model.update(tree_map(lambda p: p + 0.05, model.trainable_parameters()))
    model.train()
    return model


def gradients(model: nn.Module, *, compiled: bool = False) -> dict[str, np.ndarray]:
    def loss() -> mx.array:
        logits = model(TOKENS)
        return (logits.logsumexp(axis=-1) - logits[..., 7]).mean()

    mx.random.seed(11)
    state = [model.state, mx.random.state]
    function = nn.value_and_grad(model, loss)
    if compiled:
        function = mx.compile(function, inputs=state, outputs=state)
    value, gradient = function()
    mx.eval(value, gradient)
    return {"loss": np.array(value), **{n: np.array(g) for n, g in tree_flatten(gradient)}}


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"num_layers": 1}])
def test_gradients_equal_those_without(lora: dict, compiled: bool) -> None:
    model = model_with_lora(**lora)
    expected = gradients(model)
    with gradient_checkpointing(model):
        assert_equal(gradients(model, compiled=compiled), expected)


def gradient_errors(model: nn.Module, *, compiled: bool = False) -> list[float]:
    """Relative errors of some gradients against differences of the loss with the same masks. (The
    masks are others than without checkpointing, whose gradients are no oracle here.)"""
    name = "model.layers.0.mlp.up_proj.lora_b"
    start = dict(tree_flatten(model.trainable_parameters()))[name]
    actual = gradients(model, compiled=compiled)[name]
    errors = []
    for index in [(0, 3), (2, 17), (3, 40)]:
        losses = []
        for step in (1e-2, -1e-2):
            moved = np.array(start)
            moved[index] += step
            model.load_weights([(name, mx.array(moved))], strict=False)
            losses.append(gradients(model)["loss"].astype(np.float64))
        model.load_weights([(name, start)], strict=False)
        expected = (losses[0] - losses[1]) / 2e-2
        errors.append(abs(actual[index] - expected) / abs(expected))
    return errors


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_draws_the_same_mask_again(compiled: bool) -> None:
    model = model_with_lora(dropout=0.4)
    with gradient_checkpointing(model):
        assert max(gradient_errors(model, compiled=compiled)) < 0.02


def test_a_fresh_mask_in_the_second_run_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug is what mx.checkpoint does with mlx's own dropout layer."""
    monkeypatch.setattr(
        checkpointing._DropoutKeys, "next", lambda keys: None
    )  # the global random state
    model = model_with_lora(dropout=0.4)
    with gradient_checkpointing(model):
        assert max(gradient_errors(model)) > 0.1


class DroppingLayer(nn.Module):
    """A layer with two dropout layers, which shows what they make of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.none = nn.Dropout(0.3), nn.Dropout(0.3), nn.Dropout(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        assert type(self.none) is nn.Dropout  # which drops nothing, and costs nothing
        return mx.stack([self.first(x), self.second(x)])


def test_every_dropout_layer_has_masks_of_its_own_in_every_call() -> None:
    """Of 10,000 ones, 7,000 ± 46 become 1 / 0.7; two independent masks agree in 58 %."""
    model: Any = nn.Module()
    model.layers = [DroppingLayer(), DroppingLayer()]

    def drop() -> list[np.ndarray]:
        mx.random.seed(4)
        out = [layer(mx.ones(10_000)) for _ in range(2) for layer in model.layers]
        return list(np.array(mx.concatenate(out)))

    with gradient_checkpointing(model):
        masks, again = drop(), drop()
    for number, mask in enumerate(masks):
        assert np.unique(mask).tolist() == [0.0, np.float32(1 / 0.7)]
        assert (mask > 0).sum() == pytest.approx(7000, abs=250)
        np.testing.assert_array_equal(mask, again[number])
        for other in masks[:number]:
            assert (mask == other).mean() == pytest.approx(0.58, abs=0.03)


def test_keys_do_not_repeat() -> None:
    model: Any = nn.Module()
    model.layers = [DroppingLayer()]
    with gradient_checkpointing(model):
        masks = [np.array(model.layers[0](mx.ones(128))) > 0 for _ in range(300)]
    assert len({mask.tobytes() for mask in masks}) == 300


def test_other_models_and_the_model_itself_are_left_as_they_were() -> None:
    model, other = model_with_lora(dropout=0.2), tiny_model()
    before = {path: type(m) for path, m in model.named_modules()}
    names = [n for n, _ in tree_flatten(model.trainable_parameters())]
    with gradient_checkpointing(model):
        assert type(other.layers[0]) is before["model.layers.0"]
        assert all(is_checkpointed(m) == (m is model) for m in (model, other))
        assert [n for n, _ in tree_flatten(model.trainable_parameters())] == names
        gradients(model)
    assert {path: type(m) for path, m in model.named_modules()} == before
    assert not is_checkpointed(model)
    mx.eval(model.parameters())  # no traced array is left behind


def test_restored_after_an_error() -> None:
    model = model_with_lora()
    with pytest.raises(RuntimeError), gradient_checkpointing(model):
        raise RuntimeError
    assert type(model.layers[0]) is type(tiny_model().layers[0])


def test_evaluation_is_the_same_inside() -> None:
    model = model_with_lora(dropout=0.5)
    model.eval()
    expected = np.array(model(TOKENS))
    with gradient_checkpointing(model):
        model.eval()
        np.testing.assert_allclose(np.array(model(TOKENS)), expected, atol=1e-6)


# --- layers of other shapes ------------------------------------------------------------------


class Layer(nn.Module):
    """A layer with a cache among its arguments by position or by name, beside None, numbers and
    texts, which returns its keys to others too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.random.normal((4, 4), key=mx.random.key(0))

    def __call__(self, x: mx.array, first: Any, cache: Any, kind: str = "", number: int = 0) -> Any:
        states = [cache[0]] if isinstance(cache, PrefixCacheList) else [cache]
        keys = (x @ self.weight)[:, None]
        if isinstance(cache, PrefixCacheList):
            keys, _ = cache[1].update_and_fetch(keys, 2 * keys)
        for state in filter(None, states):
            x = x if state[0] is None else x + mx.tanh(state[0])
            state[0] = mx.tanh(x[:, -1:] @ self.weight)
        first = x if first is None else first
        assert kind == "text"
        assert number == 3
        return mx.tanh(x @ self.weight) + keys.sum(axis=(1, 2), keepdims=True)[:, 0], first, keys


def states() -> PrefixStates:
    return PrefixStates([None, None])


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(
    "kind", [lambda: None, states, lambda: PrefixCacheList(states(), PrefixKVCache())]
)
def test_layers_with_caches_tuples_and_other_arguments(kind: Callable, by_name: bool) -> None:
    """Two layers twice, the second time on what the first left in their caches."""
    model: Any = nn.Module()
    model.layers = [Layer(), Layer()]
    inputs: Any = mx.random.normal((2, 3, 4), key=mx.random.key(1))

    def value() -> mx.array:
        caches, total = [kind(), kind()], mx.array(0.0)
        for x in (inputs, 0.5 * inputs):
            first = None
            for layer, cache in zip(model.layers, caches, strict=True):
                arguments = {"cache": cache, "number": 3} if by_name else {"number": 3}
                positions = () if by_name else (cache, "text")
                arguments |= {"kind": "text"} if by_name else {}
                x, first, keys = layer(x, first, *positions, **arguments)
                total += (x * first).sum() + (keys**2).sum()
        for cache in filter(None, caches):
            arrays: Any = tree_flatten(cache_arrays(cache))
            total += sum((array**2).sum() for _, array in arrays)
        return total

    def run() -> tuple[float, dict[str, np.ndarray]]:
        loss, gradient = nn.value_and_grad(model, value)()
        return loss.item(), {name: np.array(g) for name, g in tree_flatten(gradient)}

    expected_loss, expected = run()
    with gradient_checkpointing(model):
        loss, actual = run()
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_equal(actual, expected)
    assert all(np.abs(g).max() > 1e-3 for g in actual.values())


class RecordingLayer(nn.Module):
    """A layer that notes which operations are in force when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = mx.ones(1), []

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        self.seen.append(current_operations())
        return x * self.weight


@pytest.mark.parametrize("cache", [None, PrefixKVCache()])
def test_the_second_run_computes_with_the_operations_of_the_first(cache: Any) -> None:
    """It comes with the backward pass, when the engine's context has ended."""
    model: Any = nn.Module()
    model.layers = [RecordingLayer()]
    operations = Operations(None, None)

    def value() -> mx.array:
        with patched((), operations):
            return model.layers[0](mx.ones(1), cache).sum()

    with gradient_checkpointing(model):
        nn.value_and_grad(model, value)()
    assert len(model.layers[0].seen) == 2
    assert all(seen is operations for seen in model.layers[0].seen)
    assert current_operations() is not operations


def test_an_array_that_is_returned_twice_keeps_both_gradients() -> None:
    """Gemma 4's keys: in the cache, and for the layers that share them."""
    model = architecture_with_lora("gemma4_text")
    engine, pairs = shared_prefix_engine(model), [token_pair(20, 5, 9)]
    expected = engine_run(model, engine, pairs)
    with gradient_checkpointing(model):
        assert greatest_difference(engine_run(model, engine, pairs), expected) < 1e-4


def test_a_lost_gradient_of_an_array_that_is_returned_twice_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = architecture_with_lora("gemma4_text")
    engine, pairs = shared_prefix_engine(model), [token_pair(20, 5, 9)]
    expected = engine_run(model, engine, pairs)
    monkeypatch.setattr(mx, "depends", lambda arrays, on: arrays)
    with gradient_checkpointing(model):
        assert greatest_difference(engine_run(model, engine, pairs), expected) > 1e-2


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_results_that_are_never_computed_hold_no_weights(name: str) -> None:
    """An engine that is made within the context looks at the layers without computing anything."""

    def bytes_left() -> int:
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory()

    def look_at_the_layers() -> int:
        model = architecture_with_lora(name)
        mx.eval(model.parameters())
        with gradient_checkpointing(model):
            shared_prefix_engine(model)
        return sum(array.nbytes for array in flat_arrays(model.parameters()).values())

    look_at_the_layers()  # what is cached for good is cached now
    before = bytes_left()
    size = look_at_the_layers()
    assert bytes_left() - before < size / 10
