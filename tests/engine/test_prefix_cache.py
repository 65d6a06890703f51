"""A prefix's keys and values behind mlx-lm's cache interface, and the patch of mlx-lm's attention:
that it is there while a graph is built, and gone afterwards."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from threading import Barrier, Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import ARCHITECTURES, RECURRENT, architecture_with_lora
from helpers.gradients import run
from helpers.tiny import tiny_model
from helpers.tiny import token_pair as pair
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_simpo import ObjectiveConfig, SimPOConfig, TrainConfig, evaluate_pairs, train_steps
from mlx_simpo.engine import prefix_cache
from mlx_simpo.engine.attention import attention
from mlx_simpo.engine.choice import choose_engine, shared_prefix_engine
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
from mlx_simpo.engine.prefix_cache import (
    PrefixKVCache,
    attention_modules,
    patched_attention,
    reason_not_shareable,
    run_continuations,
    run_prefix,
)

PAIRS = [pair(40, 20, 7), pair(35, 3, 60)]
TOKENS = mx.array([[5, 9, 2, 7, 1, 8], [3, 3, 6, 4, 2, 2]])


def is_patched() -> bool:
    """Whether any module of mlx-lm's has another attention than mlx-lm's."""
    modules = [m for name, m in sys.modules.items() if name.startswith("mlx_lm.models.")]
    functions = [vars(m).get("scaled_dot_product_attention") for m in modules]
    assert base.scaled_dot_product_attention in functions or prefix_cache._attention in functions
    return any(f not in (None, base.scaled_dot_product_attention) for f in functions)


@pytest.fixture(autouse=True)
def nothing_is_patched_before_or_after() -> Iterator[None]:
    assert not is_patched()
    yield
    assert not is_patched()
    assert not any(prefix_cache._holders.values())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of our attention."""
    calls: list[tuple] = []

    def recording(*args: Any) -> mx.array:
        calls.append(args)
        return attention(*args)

    monkeypatch.setattr(prefix_cache, "attention", recording)
    return calls


# --- the cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_length", [0, 1, 4])
def test_continuations_see_their_own_prefix(prefix_length: int) -> None:
    """Hidden states as of the whole sequences at once, with the prefixes in another order."""
    model = tiny_model()
    prefix = run_prefix(model, TOKENS[:, :prefix_length])
    index = mx.array([1, 0, 1])
    continuations = TOKENS[index][:, prefix_length:]
    actual = run_continuations(model, continuations, prefix, index)
    expected = model.model(TOKENS)[index][:, prefix_length:]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_continuations_leave_the_prefix_as_it_is() -> None:
    model = tiny_model()
    prefix = run_prefix(model, TOKENS[:, :4])
    before = [[np.array(a) for a in cache.arrays()] for cache in prefix]
    mx.eval(run_continuations(model, TOKENS[:, 4:], prefix, mx.array([0, 1])))
    for cache, arrays in zip(prefix, before, strict=True):
        assert cache.offset == 4
        for array, expected in zip(cache.arrays(), arrays, strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("window", [None, 3, 6, 7])
@pytest.mark.parametrize(("old", "new"), [(0, 5), (4, 1), (4, 3)])
def test_masks_are_mlx_lms(old: int, new: int, window: int | None) -> None:
    """Those of mlx-lm's KVCache for as many positions, written out as booleans."""
    shape = (1, 1, old, 2)
    cache = PrefixKVCache(mx.zeros(shape), mx.zeros(shape)) if old else PrefixKVCache()
    theirs = KVCache()
    if old:
        theirs.update_and_fetch(mx.zeros(shape), mx.zeros(shape))

    def as_booleans(mask: mx.array | str | None) -> np.ndarray:
        if isinstance(mask, mx.array):
            return np.array(mask)
        return np.tri(new, old + new, old, dtype=bool)

    expected = theirs.make_mask(new, return_array=False, window_size=window)
    np.testing.assert_array_equal(
        as_booleans(cache.make_mask(new, window_size=window)), as_booleans(expected)
    )
    array = cache.make_mask(new, return_array=True, window_size=window)
    np.testing.assert_array_equal(array, as_booleans(expected))


def test_a_cache_names_its_arrays() -> None:
    cache = PrefixKVCache()
    assert cache.arrays() == ()
    keys, values = cache.update_and_fetch(mx.zeros((1, 2, 3, 4)), mx.ones((1, 2, 3, 5)))
    assert cache.offset == 3
    assert cache.arrays()[0] is keys
    assert cache.arrays()[1] is values


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prefix_can_be_shared_where_layers_cache_keys_and_values(name: str) -> None:
    assert reason_not_shareable(tiny_model(name, **ARCHITECTURES[name])) is None


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_state_cannot_be_shared(name: str) -> None:
    reason = reason_not_shareable(tiny_model(name, **RECURRENT[name]))
    assert reason == "its layers keep a state that cannot be forked (ArraysCache)"


def test_a_model_without_a_trunk_of_its_own_cannot_share() -> None:
    model = tiny_model()
    del model["model"]
    object.__setattr__(model, "make_cache", lambda: [KVCache()])
    assert reason_not_shareable(model) == "mlx-lm does not separate its trunk from its head"


# --- the patch of mlx-lm's attention ---------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whose_attention_is_ours(name: str, calls: list[tuple]) -> None:
    """Every architecture's but Gemma 2's, which has a softcap in code of its own; and with no other
    cache, even while the patch is there."""
    model = architecture_with_lora(name)
    run(model, shared_prefix_engine(model), PAIRS[:1])
    assert bool(calls) == bool(attention_modules(model)) == (name != "gemma2")
    calls.clear()
    tokens = mx.arange(9)[None]
    with patched_attention(attention_modules(model)):
        mx.eval(model(tokens, cache=make_prompt_cache(model)), model(tokens))
    assert calls == []


@pytest.mark.parametrize("mask", ["additive", "by head", "sinks"])
def test_what_ours_cannot_do_is_mlx_lms(mask: str, calls: list[tuple]) -> None:
    """An additive mask (it may have a gradient), a mask per head, attention sinks."""
    queries, keys, values = (mx.random.normal((1, 2, 4, 8)) for _ in range(3))
    masks: dict[str, Any] = {
        "additive": mx.random.normal((4, 4)),
        "by head": mx.random.normal((1, 2, 4, 4)) > -1,
        "sinks": None,
    }
    sinks = mx.array([0.5, -0.5]) if mask == "sinks" else None
    arguments = (0.3, masks[mask], sinks)
    actual = prefix_cache._attention(queries, keys, values, PrefixKVCache(), *arguments)
    expected = base.scaled_dot_product_attention(queries, keys, values, None, *arguments)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert calls == []


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

    monkeypatch.setattr(prefix_cache, "attention", failing)
    with pytest.raises(error):
        train_one_step(model, checkpointing=in_recomputation)
    assert calls == (forward if in_recomputation else 1) + 1
    assert not is_patched()


def test_contexts_may_be_nested_and_overlap() -> None:
    modules = attention_modules(tiny_model())
    assert [module.__name__ for module in modules] == ["mlx_lm.models.llama"]
    first, second = patched_attention(modules), patched_attention(modules)
    with first:
        # Asked for again within a context, the modules are the same.
        assert attention_modules(tiny_model()) == modules
        with patched_attention(modules):
            assert is_patched()
        assert is_patched()
        second.__enter__()
    assert is_patched()  # the second, which began within the first, has not ended
    second.__exit__(None, None, None)
    assert not is_patched()


def test_threads_do_not_take_the_patch_from_each_other() -> None:
    modules, barrier = attention_modules(tiny_model()), Barrier(4)
    seen: list[bool] = []

    def enter_and_leave() -> None:
        barrier.wait()
        for _ in range(300):
            with patched_attention(modules):
                seen.append(
                    vars(modules[0])["scaled_dot_product_attention"] is prefix_cache._attention
                )

    threads = [Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1200
    assert all(seen)


def test_an_abandoned_context_takes_its_patch_away() -> None:
    context = patched_attention(attention_modules(tiny_model()))
    context.__enter__()
    assert is_patched()
    del context
    assert not is_patched()
