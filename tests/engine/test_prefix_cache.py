"""A prefix's keys and values behind mlx-lm's cache interface."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.architectures import ARCHITECTURES, RECURRENT
from helpers.tiny import tiny_model
from mlx_lm.models.cache import KVCache

from mlx_simpo.engine.prefix_cache import (
    PrefixKVCache,
    reason_not_shareable,
    run_continuations,
    run_prefix,
)

TOKENS = mx.array([[5, 9, 2, 7, 1, 8], [3, 3, 6, 4, 2, 2]])


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
