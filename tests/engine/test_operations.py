"""The patch of mlx-lm's operations: that it is there while a graph is built, with the operations of
its context, and gone afterwards."""

import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import copy_context
from threading import Barrier, Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import ARCHITECTURES, architecture_with_lora
from helpers.gradients import run
from helpers.tiny import tiny_model
from helpers.tiny import token_pair as pair
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models import base, gated_delta
from mlx_lm.models.cache import make_prompt_cache

from mlx_simpo import ObjectiveConfig, SimPOConfig, TrainConfig, evaluate_pairs, train_steps
from mlx_simpo.engine import operation_choice, operations
from mlx_simpo.engine.attention import attention
from mlx_simpo.engine.choice import choose_engine, shared_prefix_engine
from mlx_simpo.engine.delta_rule import chunked_delta_rule
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
from mlx_simpo.engine.operations import (
    MLX_LM,
    AttentionCall,
    Operations,
    current_operations,
    patchable_modules,
    patched,
)
from mlx_simpo.engine.prefix_cache import PrefixKVCache

PAIRS = [pair(40, 20, 7), pair(35, 3, 60)]


def is_patched() -> bool:
    """Whether any module of mlx-lm's has another attention than mlx-lm's."""
    modules = [m for name, m in sys.modules.items() if name.startswith("mlx_lm.models.")]
    functions = [vars(m).get("scaled_dot_product_attention") for m in modules]
    assert base.scaled_dot_product_attention in functions or operations._attention in functions
    return any(f not in (None, base.scaled_dot_product_attention) for f in functions)


@pytest.fixture(autouse=True)
def nothing_is_patched_before_or_after() -> Iterator[None]:
    assert not is_patched()
    assert current_operations() == MLX_LM
    yield
    assert not is_patched()
    assert current_operations() == MLX_LM
    assert not any(operations._holders.values())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of our attention."""
    calls: list[tuple] = []

    def recording(*args: Any) -> mx.array:
        calls.append(args)
        return attention(*args)

    monkeypatch.setattr(operation_choice, "attention", recording)
    return calls


def named(name: str) -> Operations:
    """Operations that can be told apart; they are not called."""

    def unused(*args: Any) -> mx.array:
        raise AssertionError(name)

    return Operations(unused, None)


# --- whose attention runs ----------------------------------------------------------------------


# Gemma 2 has a softcap in code of its own, Plamo 2 calls MLX's operation itself, latent attention
# adds scores to the mask, and the others have no attention.
WITHOUT_OURS = {"gemma2", "plamo2", "longcat_flash", "deepseek_v32", "kimi_linear"}
WITHOUT_OURS |= {"mamba", "mamba2", "rwkv7"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whose_attention_is_ours(name: str, calls: list[tuple]) -> None:
    """That of every architecture whose file has mlx-lm's; and with no other cache than ours, even
    while the patch is there."""
    model = architecture_with_lora(name)
    run(model, shared_prefix_engine(model), PAIRS[:1])
    modules = patchable_modules(model)
    assert bool(calls) == (name not in WITHOUT_OURS)
    calls.clear()
    tokens = mx.arange(9)[None]
    with patched(modules, named("ours")):
        mx.eval(model(tokens, cache=make_prompt_cache(model)), model(tokens))
    assert calls == []


@pytest.mark.parametrize("sinks", [None, [0.5, -0.5]])
@pytest.mark.parametrize("mask", ["causal", None])
def test_operations_get_what_the_layer_passes(mask: str | None, sinks: list | None) -> None:
    q, k, v = (mx.random.normal((1, 2, 4, 8)) for _ in range(3))
    seen: list[AttentionCall] = []

    def recording(call: AttentionCall) -> mx.array:
        seen.append(call)
        return call.queries

    cache, sink_array = PrefixKVCache(), None if sinks is None else mx.array(sinks)
    with patched([], Operations(recording, None)):
        out = operations._attention(q, k, v, cache, 0.3, mask, sink_array)
    assert out is q
    passed = (q, k, v, 0.3, mask, sink_array)
    assert all(one is other for one, other in zip(seen[0], passed, strict=True))
    outside = operations._attention(q, k, v, cache, 0.3, mask, sink_array)
    arguments: Any = (q, k, v, None, 0.3, mask, sink_array)
    expected = base.scaled_dot_product_attention(*arguments)
    np.testing.assert_array_equal(outside, expected)
    assert len(seen) == 1


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"lower_bound": -3.0}, {"allow_neg_eigval": True}], ids=str
)
def test_the_delta_rule_gets_what_mlx_lm_makes_of_the_layers_gates(
    options: dict[str, Any], with_state: bool, vector: bool
) -> None:
    keys = mx.random.split(mx.random.key(0), 8)
    sizes = (2, 5, 2, 8), (2, 5, 2, 8), (2, 5, 4, 6), (2, 5, 4, *([8] if vector else []))
    sizes = (*sizes, (2, 5, 4), (4,), sizes[3][2:])
    arrays = [mx.random.normal(size, key=key) for size, key in zip(sizes, keys, strict=False)]
    q, k, v, a, b, log_a, bias = arrays
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    state = mx.random.normal((2, 4, 6, 8), key=keys[7]) if with_state else None
    inputs = (q, k, v, a, b, log_a[:, None] if vector else log_a, bias, state)
    ours: Any = operations._gated_delta_update
    theirs: Any = gated_delta.gated_delta_update
    mask = mx.arange(5) < mx.array([[3], [5]])
    for masked in (None, mask):
        expected = theirs(*inputs, masked, use_kernel=False, **options)
        with patched([], Operations(None, chunked_delta_rule)):
            actual = ours(*inputs, masked, use_kernel=False, **options)
        for one, two in zip(actual, expected, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)


# --- when it is there --------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [nullcontext, gradient_checkpointing])
def test_attention_is_ours_forward_and_when_it_is_recomputed(
    checkpointing: Callable, calls: list[tuple]
) -> None:
    """The recomputation comes with the gradient, after the engine's own context has ended."""
    model = architecture_with_lora()
    engine, forward_calls = shared_prefix_engine(model), []
    layers, passes = len(model.layers), 1 + len(engine.collate(PAIRS).arrays[1])

    def logps(*args: Any, **kwargs: Any) -> mx.array:
        logps = engine.logps(*args, **kwargs)
        assert not is_patched()
        forward_calls.append(len(calls))
        return logps

    with checkpointing(model):
        run(model, engine._replace(logps=logps), PAIRS)
    assert forward_calls == [layers * passes]
    runs = 1 if checkpointing is nullcontext else 2
    assert len(calls) == runs * layers * passes


def train_one_step(model: nn.Module, *, checkpointing: bool) -> None:
    train = TrainConfig(batch_size=2, steps=1, gradient_checkpointing=checkpointing)
    config = SimPOConfig(model="tiny", train=train)
    for _ in train_steps(model, PAIRS, config, shared_prefix_engine(model)):
        assert not is_patched()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_patch_is_left_after_a_step(checkpointing: bool, calls: list[tuple]) -> None:
    model = architecture_with_lora()
    train_one_step(model, checkpointing=checkpointing)
    assert calls
    assert not is_patched()


def test_no_patch_is_left_after_the_choice_and_an_evaluation(calls: list[tuple]) -> None:
    model = architecture_with_lora()
    engine = choose_engine("shared_prefix", model)
    assert not is_patched()
    evaluate_pairs(model, PAIRS, ObjectiveConfig(), engine=engine)
    assert calls
    assert not is_patched()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("in_recomputation", [False, True])
def test_no_patch_is_left_after_an_exception(
    in_recomputation: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = architecture_with_lora(), 0
    passes = 1 + len(shared_prefix_engine(model).collate(PAIRS).arrays[1])
    forward = len(model.layers) * passes

    def failing(*args: Any) -> mx.array:
        nonlocal calls
        calls += 1
        if calls > (forward if in_recomputation else 1):
            assert is_patched()
            raise error
        return attention(*args)

    monkeypatch.setattr(operation_choice, "attention", failing)
    with pytest.raises(error):
        train_one_step(model, checkpointing=in_recomputation)
    assert calls == (forward if in_recomputation else 1) + 1
    assert not is_patched()


# --- contexts that are nested, overlap, run in threads or are abandoned ------------------------


def test_contexts_may_be_nested_and_overlap() -> None:
    modules = patchable_modules(tiny_model())
    assert [module.__name__ for module in modules] == ["mlx_lm.models.llama"]
    outer, inner, other = named("outer"), named("inner"), named("other")
    first, second = patched(modules, outer), patched(modules, other)
    with first:
        # Asked for again within a context, the modules are the same.
        assert patchable_modules(tiny_model()) == modules
        with patched(modules, inner):
            assert is_patched()
            assert current_operations() is inner
        assert is_patched()
        assert current_operations() is outer
        second.__enter__()
    assert is_patched()  # the second, which began within the first, has not ended
    assert current_operations() is other
    second.__exit__(None, None, None)
    assert not is_patched()


@given(st.lists(st.integers(0, 9), max_size=12))
def test_the_operations_are_those_of_the_last_context_that_has_not_ended(order: list[int]) -> None:
    """Contexts that begin and end in any order: a number seen for the second time ends its own."""
    modules, running = patchable_modules(tiny_model()), {}
    for number in order:
        if number in running:
            context, _ = running.pop(number)
            context.__exit__(None, None, None)
        else:
            chosen = named(str(number))
            running[number] = (patched(modules, chosen), chosen)
            running[number][0].__enter__()
        expected = [chosen for _, chosen in running.values()]
        assert current_operations() is (expected[-1] if expected else MLX_LM)
        assert is_patched() == bool(running)
    for context, _ in running.values():
        context.__exit__(None, None, None)


def test_another_thread_computes_with_mlx_lms_own() -> None:
    """Though the name in the module is ours: which operations it means, the context says."""
    model, tokens = tiny_model(), mx.arange(9)[None]
    expected = np.array(model(tokens))
    with patched(patchable_modules(model), named("of this thread only")):
        with ThreadPoolExecutor(1) as other:
            assert other.submit(current_operations).result() == MLX_LM
            assert other.submit(is_patched).result()
            caches = [PrefixKVCache() for _ in model.layers]
            logits = other.submit(lambda: np.array(model(tokens, cache=caches)))
            np.testing.assert_allclose(logits.result(), expected, atol=1e-5)
        assert current_operations() != MLX_LM


def test_threads_do_not_take_the_patch_from_each_other() -> None:
    modules, barrier = patchable_modules(tiny_model()), Barrier(4)
    seen: list[bool] = []

    def enter_and_leave(mine: Operations) -> None:
        barrier.wait()
        for _ in range(300):
            with patched(modules, mine):
                function = vars(modules[0])["scaled_dot_product_attention"]
                seen.append(function is operations._attention and current_operations() is mine)

    threads = [Thread(target=enter_and_leave, args=(named(str(i)),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1200
    assert all(seen)


def abandoned(chosen: Operations) -> list[AbstractContextManager]:
    """A context that has been entered, in a list so that it can be let go of anywhere."""
    context = patched(patchable_modules(tiny_model()), chosen)
    context.__enter__()
    return [context]


def in_this_context(let_go: Callable[[], None]) -> None:
    let_go()


def in_another_context(let_go: Callable[[], None]) -> None:
    copy_context().run(let_go)


def in_another_thread(let_go: Callable[[], None]) -> None:
    thread = Thread(target=let_go)
    thread.start()
    thread.join()


@pytest.mark.filterwarnings("error")  # what a generator raises while it is collected is a warning
@pytest.mark.parametrize("where", [in_this_context, in_another_context, in_another_thread])
def test_an_abandoned_context_takes_its_patch_away(where: Callable) -> None:
    """Wherever the garbage collector ends it; ContextVar.reset would raise in another context."""
    context = abandoned(named("abandoned"))
    assert is_patched()
    assert current_operations() != MLX_LM
    where(context.clear)
    gc.collect()
    assert not is_patched()
    assert current_operations() == MLX_LM


def test_an_abandoned_context_leaves_those_around_it_alone() -> None:
    outer, inner = named("outer"), named("inner")
    modules = patchable_modules(tiny_model())
    with patched(modules, outer):
        context = abandoned(named("abandoned"))
        with patched(modules, inner):
            in_another_thread(context.clear)
            assert is_patched()
            assert current_operations() is inner
        assert is_patched()
        assert current_operations() is outer


def test_a_generator_that_is_not_finished_takes_its_patch_away() -> None:
    """A loop over training steps that the user breaks out of, or interrupts with Ctrl-C."""

    def steps() -> Iterator[int]:
        with patched(patchable_modules(tiny_model()), named("of a step")):
            yield from range(3)

    generator = steps()
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(KeyboardInterrupt))
        for _ in generator:
            assert is_patched()
            raise KeyboardInterrupt
    assert is_patched()  # the generator still stands within its context
    del generator
    assert not is_patched()
