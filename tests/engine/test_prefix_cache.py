"""What layers keep of a prefix behind mlx-lm's cache interface: keys and values, states, both."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.architectures import ARCHITECTURES, architecture
from helpers.graphs import primitives
from helpers.tiny import tiny_model
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import ssm
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache

from mlx_simpo.engine.prefix_cache import (
    PrefixCacheList,
    PrefixKVCache,
    PrefixStates,
    cache_arrays,
    can_extend_prefix,
    empty_caches,
    is_prefix_cache,
    reason_not_shareable,
    run_continuations,
    run_first,
    run_prefix,
    set_arrays,
    with_arrays,
)
from mlx_simpo.engine.trunk import trunk_of

TOKENS = mx.array([[5, 9, 2, 7, 1, 8], [3, 3, 6, 4, 2, 2]])
# Keys and values; convolution and recurrence; both in one layer.
KINDS = ["llama", "mamba", "qwen3_5", "falcon_h1"]


def arrays_of(caches: list) -> dict[str, np.ndarray]:
    flat: Any = tree_flatten([cache_arrays(cache) for cache in caches])
    return {name: np.array(array) for name, array in flat}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("prefix_length", [0, 1, 2, 4, 5])
def test_continuations_see_their_own_prefix(prefix_length: int, name: str) -> None:
    """Hidden states as of the whole sequences at once, with the prefixes in another order."""
    model = architecture(name)
    prefix = run_prefix(model, TOKENS[:, :prefix_length])
    index = mx.array([1, 0, 1])
    continuations = TOKENS[index][:, prefix_length:]
    actual = run_continuations(model, continuations, prefix, index)
    expected = trunk_of(model)(TOKENS, cache=None)[index][:, prefix_length:]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("repeats", [1, 3])
def test_all_prefixes_in_their_order_need_no_index(repeats: int, name: str) -> None:
    """The same hidden states, without a gather for each layer's arrays."""
    model = architecture(name)
    prefix = run_prefix(model, TOKENS[:, :4])
    index = mx.array([0, 1] * repeats)
    mx.eval([cache_arrays(cache) for cache in prefix], index)
    tokens = TOKENS[index][:, 4:]
    with_index, without = (run_continuations(model, tokens, prefix, i) for i in (index, None))
    gathers = [primitives(hidden)["Gather"] for hidden in (with_index, without)]
    arrays: Any = tree_flatten([cache_arrays(cache) for cache in prefix])
    assert gathers[0] - gathers[1] == len(arrays)
    np.testing.assert_array_equal(with_index, without)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("prefix_length", [1, 3, 5])
def test_a_prefix_in_one_pass_with_what_follows_it(prefix_length: int, name: str) -> None:
    model = architecture(name)
    assert can_extend_prefix(model)
    hidden, prefix = run_first(model, TOKENS, prefix_length)
    np.testing.assert_allclose(hidden, trunk_of(model)(TOKENS, cache=None), atol=1e-5)
    actual, expected = arrays_of(prefix), arrays_of(run_prefix(model, TOKENS[:, :prefix_length]))
    assert actual.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_allclose(actual[key], array, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "qwen3_5", "falcon_h1"])
def test_a_recurrent_state_is_not_within_that_of_a_longer_sequence(name: str) -> None:
    assert not can_extend_prefix(architecture(name))


@pytest.mark.parametrize("name", KINDS)
def test_continuations_leave_the_prefix_as_it_is(name: str) -> None:
    model = architecture(name)
    prefix = run_prefix(model, TOKENS[:, :4])
    before = arrays_of(prefix)
    mx.eval(run_continuations(model, TOKENS[:, 4:], prefix, mx.array([0, 1])))
    after = arrays_of(prefix)
    assert before.keys() == after.keys()
    for array, expected in zip(after.values(), before.values(), strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "granitemoehybrid"])
def test_no_recurrent_layer_runs_a_single_token_from_a_state(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Mac mlx-lm computes that step by a kernel without a gradient."""
    model, one_token = architecture(name), (TOKENS[:, 5:], mx.array([0, 1]))
    prefix = run_prefix(model, TOKENS[:, :5])
    expected = run_continuations(model, one_token[0], prefix, one_token[1])

    def kernel(*args: Any) -> None:
        raise AssertionError("the kernel")

    monkeypatch.setattr(ssm, "ssm_update_kernel", kernel)
    with monkeypatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: mx.gpu)
        patch.setattr(mx.metal, "is_available", lambda: True)
        actual = run_continuations(model, one_token[0], prefix, one_token[1])
        with pytest.raises(AssertionError, match="the kernel"):
            trunk_of(model)(TOKENS[:, 5:], cache=prefix)
    np.testing.assert_array_equal(actual, expected)
    assert actual.shape == (2, 1, 32)


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


def test_arrays_of_a_cache_are_those_that_it_holds() -> None:
    both = PrefixCacheList(PrefixStates([None, None]), PrefixKVCache())
    assert cache_arrays(both) == [{}, {}]
    states, keys_and_values = both.caches
    states[1] = mx.zeros((1, 2))
    keys, values = keys_and_values.update_and_fetch(mx.zeros((1, 2, 3, 4)), mx.ones((1, 2, 3, 5)))
    assert keys_and_values.offset == 3
    held = cache_arrays(both)
    assert held == [{"1": states[1]}, {"keys": keys, "values": values}]
    assert held[0]["1"] is states[1]
    assert held[1]["keys"] is keys


@pytest.mark.parametrize("filled", [True, False])
def test_a_cache_with_other_arrays_is_another_cache(filled: bool) -> None:
    both = PrefixCacheList(PrefixStates([None, None]), PrefixKVCache())
    if filled:
        both[0][1] = mx.zeros((1, 2))
        both[1].update_and_fetch(mx.zeros((1, 2, 3, 4)), mx.zeros((1, 2, 3, 5)))
    before = cache_arrays(both)
    ones = tree_map(mx.ones_like, before)
    other = with_arrays(both, ones)
    assert is_prefix_cache(other)
    assert type(other) is PrefixCacheList
    other[0][0] = mx.ones((1, 4))
    other[1].update_and_fetch(mx.ones((1, 2, 1, 4)), mx.ones((1, 2, 1, 5)))
    assert cache_arrays(both) == before
    assert both[1].offset == (3 if filled else 0)
    set_arrays(both, ones)
    assert cache_arrays(both) == ones


def test_there_is_a_cache_of_ours_for_each_of_mlx_lms() -> None:
    kinds = {
        name: [type(cache) for cache in empty_caches(architecture(name))]
        for name in ("llama", "qwen3_5", "falcon_h1", "nemotron_h", "llama4", "longcat_flash")
    }
    assert kinds == {
        "llama": [PrefixKVCache] * 2,
        "qwen3_5": [PrefixStates, PrefixKVCache, PrefixStates],
        "falcon_h1": [PrefixCacheList] * 2,
        "nemotron_h": [PrefixStates, PrefixKVCache, PrefixStates],  # two layers keep nothing
        "llama4": [PrefixKVCache] * 4,
        "longcat_flash": [PrefixCacheList] * 2,
    }
    both: Any = empty_caches(architecture("falcon_h1"))[0]
    assert [type(cache) for cache in both.caches] == [PrefixStates, PrefixKVCache]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prefix_can_be_shared_in_every_architecture(name: str) -> None:
    assert reason_not_shareable(architecture(name)) is None


@pytest.mark.parametrize(
    "cache", [QuantizedKVCache(), CacheList(ArraysCache(1), QuantizedKVCache())]
)
def test_another_kind_of_state_cannot_be_shared(cache: Any) -> None:
    model = tiny_model()
    object.__setattr__(model, "make_cache", lambda: [KVCache(), cache])
    assert reason_not_shareable(model) == (
        "its layers keep a state that this engine does not know how to fork (QuantizedKVCache)"
    )


def test_a_model_without_a_trunk_of_its_own_cannot_share() -> None:
    model = tiny_model()
    del model["model"]
    object.__setattr__(model, "make_cache", lambda: [KVCache()])
    assert reason_not_shareable(model) == "mlx-lm does not separate its trunk from its head"
