"""What computes the gated delta rule in a model: on the CPU, and on a stand-in for a Mac whose
MLX has a fused gradient, right or planted wrong. And equality through whole models."""

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import architecture_with_lora
from helpers.devices import on_cpu
from helpers.gradients import greatest_difference, run
from helpers.tiny import token_pair as pair
from mlx.utils import tree_flatten
from mlx_lm.models.gated_delta import gated_delta_ops

from mlx_simpo.engine import fused_delta_rule as module
from mlx_simpo.engine.choice import REFERENCE, shared_prefix_engine
from mlx_simpo.engine.delta_rule import chunked_delta_rule
from mlx_simpo.engine.fused_attention import primitive_count
from mlx_simpo.engine.fused_delta_rule import (
    DeltaShape,
    check_fused_delta_rule,
    choose_delta_rule,
    forget_checks,
    fused_delta_rule,
    has_fused_delta_gradient,
    observe_delta_rule,
)
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing

SHAPES = {
    "qwen3_5": DeltaShape(2, 4, 32, 16, mx.float32, vector_gates=False),
    "qwen3_next": DeltaShape(2, 4, 32, 16, mx.float32, vector_gates=False),
    "olmo_hybrid": DeltaShape(2, 4, 32, 16, mx.float32, vector_gates=False),
    "kimi_linear": DeltaShape(4, 4, 8, 8, mx.float32, vector_gates=True),
}
CHUNKS = "delta rule: 64 tokens at a time in matrix products"
PAIRS = [pair(40, 20, 7), pair(35, 3, 60), pair(70, 11, 12)]
SMALL = DeltaShape(1, 2, 8, 4, mx.float32, vector_gates=False)


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    forget_checks()
    yield
    forget_checks()


# --- which layers compute it -----------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_what_the_layers_compute_with_is_observed(name: str) -> None:
    model = architecture_with_lora(name, dropout=0.1)
    model.eval()
    before = mx.random.state[0]  # type: ignore[index]
    assert observe_delta_rule(model) == (SHAPES[name],)
    assert not any(m.training for m in model.modules())
    np.testing.assert_array_equal(before, mx.random.state[0])  # type: ignore[index]


@pytest.mark.parametrize("name", ["llama", "mamba", "lfm2"])
def test_a_model_without_it_has_no_choice(name: str) -> None:
    assert choose_delta_rule(architecture_with_lora(name)) == (None, None)


# --- on the CPU ------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [False, True])
def test_a_cpu_has_no_fused_gradient(*, vector: bool) -> None:
    with on_cpu():
        assert not has_fused_delta_gradient(SMALL._replace(vector_gates=vector))


def test_on_a_cpu_chunks_are_chosen_and_the_engine_says_so() -> None:
    model = architecture_with_lora("qwen3_5")
    with on_cpu():
        note = f"{CHUNKS} (MLX has no fused gradient on the CPU)"
        assert choose_delta_rule(model) == (chunked_delta_rule, note)
        assert note in shared_prefix_engine(model).note


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_mlxs_operation_agrees_on_a_cpu(dtype: mx.Dtype, *, vector: bool) -> None:
    """Its loop over tokens there: the check passes what is right in every dtype."""
    agreement = check_fused_delta_rule(SMALL._replace(dtype=dtype, vector_gates=vector))
    assert agreement.passed
    assert agreement.value_error > 0
    assert agreement.dtype == str(dtype).removeprefix("mlx.core.")


@pytest.mark.parametrize("name", SHAPES)
def test_whole_models_equal_the_reference(name: str) -> None:
    model = architecture_with_lora(name)
    with on_cpu():
        engine = shared_prefix_engine(model)
        assert CHUNKS in engine.note
        expected = run(model, REFERENCE, PAIRS)
        for checkpointing in (nullcontext, gradient_checkpointing):
            with checkpointing(model):
                actual = run(model, engine, PAIRS)
            np.testing.assert_allclose(actual["logps"], expected["logps"], atol=1e-5)
            assert greatest_difference(actual, expected) < 1e-4


# --- a stand-in for a Mac --------------------------------------------------------------------

Change = Callable[[list[mx.array]], list[mx.array]]


class Count:
    """How often MLX's operation has been called, and its gradient."""

    forward = 0
    backward = 0


def untouched(arrays: list[mx.array]) -> list[mx.array]:
    return arrays


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Count]:
    """Let MLX report a GPU and have an operation with a gradient of its own, which puts a primitive
    into the graph that nothing else has."""

    def install(
        inputs: Change = untouched, values: Change = untouched, gradients: Change = untouched
    ) -> Count:
        count = Count()

        @mx.custom_function
        def update(*primals: mx.array) -> tuple[mx.array, ...]:
            count.forward += 1
            return tuple(values([*gated_delta_ops(*inputs(list(primals)))]))

        @update.vjp
        def gradient(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, ...]:
            count.backward += 1
            _, exact = mx.vjp(gated_delta_ops, inputs(list(primals)), list(cotangents))
            first, *others = gradients(exact)
            return first + mx.arctanh(mx.zeros(())), *others

        monkeypatch.setattr(mx.fast, "gated_delta_update", lambda *args: list(update(*args)))  # type: ignore[call-overload]
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
        monkeypatch.setattr(module, "FUSED_GRADIENT", "ArcTanh")
        return count

    return install


def scaled(index: int) -> Change:
    """One per cent too much of one array."""

    def change(arrays: list[mx.array]) -> list[mx.array]:
        return [a * 1.01 if i == index else a for i, a in enumerate(arrays)]

    return change


def first_decay(arrays: list[mx.array]) -> list[mx.array]:
    """As a kernel that reads one decay per head where there is one for each entry."""
    q, k, v, g, beta, state = arrays
    return [q, k, v, g if g.ndim == 3 else g[..., 0], beta, state]


def test_a_right_operation_is_checked_once_and_chosen(mac: Callable[..., Count]) -> None:
    model = architecture_with_lora("qwen3_5")
    count = mac()
    rule, note = choose_delta_rule(model)
    assert rule is fused_delta_rule
    assert note == (
        "delta rule: MLX's fused operation, whose gradient agrees with the recurrence's"
    )
    checks = (count.forward, count.backward)
    assert min(checks) > 3
    assert choose_delta_rule(model) == (rule, note)
    assert (count.forward, count.backward) == checks


@pytest.mark.parametrize("checkpointing", [nullcontext, gradient_checkpointing])
def test_training_takes_it_forward_and_when_it_is_recomputed(
    checkpointing: Callable, mac: Callable[..., Count]
) -> None:
    model = architecture_with_lora("qwen3_5")
    expected = run(model, REFERENCE, PAIRS)
    count = mac()
    engine = shared_prefix_engine(model)
    layers = sum(hasattr(layer, "linear_attn") for layer in model.layers)
    passes = 1 + len(engine.collate(PAIRS).arrays[1])
    count.forward = count.backward = 0
    with checkpointing(model):
        actual = run(model, engine, PAIRS)
    assert count.forward == layers * passes * (1 if checkpointing is nullcontext else 2)
    assert count.backward == layers * passes
    np.testing.assert_allclose(actual["logps"], expected["logps"], atol=1e-5)
    assert greatest_difference(actual, expected) < 1e-4


def test_its_gradient_is_in_the_graph_of_a_step(mac: Callable[..., Count]) -> None:
    model = architecture_with_lora("qwen3_5")
    count = mac()
    engine = shared_prefix_engine(model)
    arrays = engine.collate(PAIRS).arrays
    count.backward = 0
    gradient = nn.value_and_grad(
        model, lambda model: engine.logps(model, arrays, training=True).sum()
    )(model)[1]
    leaves: list[mx.array] = [leaf for _, leaf in tree_flatten(gradient)]  # type: ignore[misc]
    assert primitive_count("ArcTanh", *leaves) == count.backward > 0


def test_evaluation_on_a_gpu_keeps_mlx_lms_kernel(mac: Callable[..., Count]) -> None:
    model = architecture_with_lora("qwen3_5")
    count = mac()
    engine = shared_prefix_engine(model)
    model.eval()
    count.forward = 0
    mx.eval(engine.logps(model, engine.collate(PAIRS).arrays, training=False))
    assert count.forward == 0


PLANTED = {
    "the gradient of rates": {"gradients": scaled(4)},
    "the gradient of decays": {"gradients": scaled(3)},
    "the gradient of the state": {"gradients": scaled(5)},
    "the state": {"values": scaled(1)},
    "the outputs": {"values": scaled(0)},
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_deviation_is_found_and_said_and_chunks_are_taken(
    what: str, mac: Callable[..., Count]
) -> None:
    model = architecture_with_lora("qwen3_5")
    count = mac(**PLANTED[what])
    engine = shared_prefix_engine(model)
    reason = re.escape(f"{CHUNKS} (MLX's fused operation is off by 0.01")
    tokens = "(3|21|300)"
    where = rf"\d* of the largest entry in {what} after {tokens} tokens \(float32, where 0.002"
    assert re.search(reason + where, engine.note)
    count.forward = 0
    actual = run(model, engine, PAIRS)
    assert count.forward == 0
    assert greatest_difference(actual, run(model, REFERENCE, PAIRS)) < 1e-4


def test_decays_that_are_misread_are_found(mac: Callable[..., Count]) -> None:
    mac(inputs=first_decay)
    assert choose_delta_rule(architecture_with_lora("qwen3_5"))[0] is fused_delta_rule
    rule, note = choose_delta_rule(architecture_with_lora("kimi_linear"))
    assert rule is chunked_delta_rule
    assert note is not None
    assert "MLX's fused operation" in note


def test_what_it_does_not_take_is_said(
    mac: Callable[..., Count], monkeypatch: pytest.MonkeyPatch
) -> None:
    mac()
    monkeypatch.setattr(module, "FUSED_GRADIENT", "not in the graph")
    assert choose_delta_rule(architecture_with_lora("qwen3_5")) == (
        chunked_delta_rule,
        f"{CHUNKS} (MLX has no fused gradient for 2/4 heads of size 32/16 in float32)",
    )
    assert module.DeltaShape(4, 4, 8, 8, mx.bfloat16, vector_gates=True).description == (
        "4 heads of size 8 with a decay for each entry in bfloat16"
    )


def test_what_fails_while_it_runs_is_said(mac: Callable[..., Count]) -> None:
    def fails(arrays: list[mx.array]) -> list[mx.array]:
        if arrays[0].shape[1] == module.LONG[1]:
            raise RuntimeError("[metal] no\nsuch kernel")
        return arrays

    mac(inputs=fails)
    assert choose_delta_rule(architecture_with_lora("qwen3_5")) == (
        chunked_delta_rule,
        f"{CHUNKS} (MLX's fused operation does not run here ([metal] no such kernel))",
    )


@pytest.mark.parametrize("tokens", [1, 64, 65, 150])
def test_long_sequences_are_cut(
    tokens: int, mac: Callable[..., Count], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that MLX's gradient does not keep the states of all tokens at a time."""
    count = mac()
    monkeypatch.setattr(module, "MAX_STATE_BYTES", 64 * 2 * 2 * 4 * 8 * 4)  # of 64 tokens
    inputs, cotangents = module._samples(SMALL, 2, tokens)
    actual = module._results(fused_delta_rule, inputs, cotangents)
    assert count.forward == count.backward == -(-tokens // 64)
    expected = module._results(chunked_delta_rule, inputs, cotangents)
    for one, two in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
