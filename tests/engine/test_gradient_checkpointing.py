"""Gradient checkpointing gives the same gradients as the plain backward pass, with dropout too."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import tiny_model
from mlx.utils import tree_flatten, tree_map

from mlx_simpo import LoRAConfig
from mlx_simpo.engine import gradient_checkpointing as checkpointing
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
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


def test_other_models_and_the_model_itself_are_left_as_they_were() -> None:
    model, other = model_with_lora(dropout=0.2), tiny_model()
    before = {path: type(m) for path, m in model.named_modules()}
    names = [n for n, _ in tree_flatten(model.trainable_parameters())]
    with gradient_checkpointing(model):
        assert type(other.layers[0]) is before["model.layers.0"]
        assert type(model.layers[0]) is not before["model.layers.0"]
        assert [n for n, _ in tree_flatten(model.trainable_parameters())] == names
        gradients(model)
    assert {path: type(m) for path, m in model.named_modules()} == before
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
