"""What mlx-lm's models need before they can be trained."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from helpers.architectures import ARCHITECTURES, architecture_with_lora
from helpers.gradients import greatest_difference, run
from helpers.mlx_folders import mlx_model
from helpers.tiny import tiny_model, token_pair
from mlx.utils import tree_flatten
from mlx_lm.models import rwkv7

from mlx_simpo import LoRAConfig, load_model
from mlx_simpo.engine.choice import REFERENCE, check_gradient, choose_engine
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.model.trainable import make_trainable

PAIRS = [token_pair(6, 3, 5)]
TOKENS = mx.array([[5, 9, 2, 7]])


def test_recurrent_gemma_can_be_frozen(tmp_path: Path) -> None:
    settings = ARCHITECTURES["recurrent_gemma"]
    with pytest.raises(AttributeError, match="_no_grad"):  # otherwise there is nothing to do
        attach_lora(tiny_model("recurrent_gemma", **settings), LoRAConfig(), seed=0)
    model: Any = load_model(str(mlx_model(tmp_path, "recurrent_gemma", **settings))).model
    attach_lora(model, LoRAConfig(rank=2), seed=0)
    trainable: Any = tree_flatten(model.trainable_parameters())
    assert "model.layers.0.temporal_block.linear_x.lora_a" in dict(trainable)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A device that mlx-lm's RWKV 7 takes for a Mac's GPU, and the calls of its kernel, which has
    no gradient."""
    calls: list[tuple] = []

    def kernel(*args: mx.array) -> tuple[mx.array, mx.array]:
        calls.append(args)
        *inputs, state = args
        step: Any = rwkv7._wkv7_step_ops
        outputs = []
        for t in range(inputs[0].shape[1]):
            output, state = step(*(x[:, t] for x in inputs), state)
            outputs.append(output)
        return mx.stop_gradient(mx.stack(outputs, axis=1)), mx.stop_gradient(state)

    monkeypatch.setattr(rwkv7, "wkv7_kernel", kernel)
    metal = SimpleNamespace(is_available=lambda: True)
    on_metal = {"default_device": lambda: mx.gpu, "metal": metal}
    monkeypatch.setattr(rwkv7, "mx", SimpleNamespace(**vars(mx) | on_metal))
    return calls


@pytest.mark.parametrize("checkpointing", [nullcontext, gradient_checkpointing])
@pytest.mark.parametrize("engine", ["reference", "shared_prefix"])
def test_rwkv7_trains_without_its_kernel(
    engine: str, checkpointing: Callable, request: pytest.FixtureRequest
) -> None:
    model = architecture_with_lora("rwkv7").train()
    expected = run(model, REFERENCE, PAIRS)
    calls = request.getfixturevalue("kernel_calls")
    chosen = choose_engine(engine, model)
    check_gradient(model, chosen)
    assert bool(calls) == (engine == "shared_prefix")  # the trial is no training
    calls.clear()
    with checkpointing(model):
        actual = run(model, chosen, PAIRS)
    assert calls == []
    assert greatest_difference(actual, expected) < 1e-4


def test_rwkv7_uses_its_kernel_for_everything_else(kernel_calls: list[tuple]) -> None:
    model = architecture_with_lora("rwkv7")
    model.eval()
    mx.eval(model(TOKENS))
    assert len(kernel_calls) == len(model.layers)


def test_the_kernel_in_training_would_be_noticed(kernel_calls: list[tuple]) -> None:
    """mlx-lm's own layers: the stand-in's missing gradient shows."""
    model = architecture_with_lora("rwkv7").train()
    expected = run(model, REFERENCE, PAIRS)
    for layer in model.layers:
        layer.attn.__class__ = rwkv7.Rwkv7TimeMixing
    assert greatest_difference(run(model, REFERENCE, PAIRS), expected) > 1e-2
    assert kernel_calls


def test_other_models_are_left_alone() -> None:
    model = tiny_model()
    before = {path: type(module) for path, module in model.named_modules()}
    make_trainable(model)
    assert {path: type(module) for path, module in model.named_modules()} == before
