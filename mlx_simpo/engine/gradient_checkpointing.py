"""Gradient checkpointing: a layer's activations are recomputed in the backward pass.

Unlike mlx-lm's, it changes the given model alone (not every instance of the class), leaves no
traced arrays behind, and repeats the forward pass's dropout mask when it recomputes. mx.checkpoint
runs the function a second time, which draws new random numbers: the gradient would belong to
another mask than the loss (mlx 0.32.4; tests/engine/test_gradient_checkpointing.py shows it).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from .operations import Patchable, current_operations, patchable_modules, patched
from .prefix_cache import cache_arrays, is_prefix_cache, set_arrays, with_arrays, without_arrays

_CACHE = "the cache"  # replaces the cache among a layer's arguments


class _Recomputing:
    """What the class of a layer has that recomputes itself."""


class _DropoutKeys:
    """Where the dropout layers within one layer of the model take their random keys from.

    key: from which the next ones are split; it is set before each run of the layer.
    """

    key: mx.array

    def next(self) -> mx.array:
        self.key, key = mx.random.split(self.key)
        return key


class _KeyedDropout(nn.Module):
    """nn.Dropout with the mask's key as an input, so that the same mask can be drawn again."""

    def __init__(self, keep: float, keys: _DropoutKeys) -> None:
        super().__init__()
        self._keep, self._keys = keep, keys

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        mask = mx.random.bernoulli(self._keep, x.shape, key=self._keys.next())
        return mask * x * (1 / self._keep)


@contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Within the context, each of ``model.layers`` recomputes itself in the backward pass."""
    modules = patchable_modules(model)
    originals = []
    for layer in model.layers:  # type: ignore[union-attr]
        keys = _DropoutKeys()
        dropouts = [(p, m) for p, m in layer.named_modules() if isinstance(m, nn.Dropout)]
        active = [(p, m) for p, m in dropouts if m._p_1 < 1]
        keyed = [(p, _KeyedDropout(m._p_1, keys)) for p, m in active]
        layer.update_modules(tree_unflatten(keyed))
        originals.append((layer, type(layer), active))
        layer.__class__ = _recomputing(type(layer), keys, modules)
    try:
        yield
    finally:
        for layer, original, dropouts in originals:
            layer.__class__ = original
            layer.update_modules(tree_unflatten(dropouts))


def is_checkpointed(model: nn.Module) -> bool:
    """Return whether ``model`` is within `gradient_checkpointing`."""
    layers: Any = model.layers
    return any(isinstance(layer, _Recomputing) for layer in layers)


def _recomputing(layer_class: type, keys: _DropoutKeys, modules: Sequence[Patchable]) -> type:
    """Return a subclass of ``layer_class`` whose call goes through mx.checkpoint."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = next((a for a in (*args, *kwargs.values()) if is_prefix_cache(a)), None)
        # MLX holds `run` as long as its results are not computed, which some never are. A cache in
        # its closure would hold these results: a circle that no garbage collector sees.
        kind = None if cache is None else without_arrays(cache)
        operations = current_operations()

        def run(parameters: dict, key: mx.array, prefix: Any, args: tuple, kwargs: dict) -> Any:
            self.update(parameters)
            keys.key = mx.stop_gradient(key)  # vjp is not defined for random bits
            own_cache = None if kind is None else with_arrays(kind, prefix)
            args, kwargs = tree_map(lambda a: own_cache if a is _CACHE else a, (args, kwargs))
            # The second run comes with the backward pass, when the engine's own context has ended.
            with patched(modules, operations):
                out = layer_class.__call__(self, *args, **kwargs)
            arrays = {} if own_cache is None else cache_arrays(own_cache)
            # Of an array that is returned twice, as Gemma 4's keys are (they serve other layers
            # too), mx.checkpoint loses one gradient: new arrays of the same values.
            return out, tree_map(lambda array: mx.depends(array, array), arrays)

        parameters = self.trainable_parameters()
        # An input of the checkpointed function, hence the same in both of its runs.
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
        # A cache's arrays are passed in and returned: a cache that the function changed itself
        # would be changed twice, and its arrays would get no gradient.
        prefix = {} if cache is None else cache_arrays(cache)
        inputs = tree_map(lambda a: _CACHE if is_prefix_cache(a) else a, (args, kwargs))
        out, arrays = mx.checkpoint(run)(parameters, key, prefix, *inputs)
        if cache is not None:
            set_arrays(cache, arrays)
        return out

    return type(layer_class.__name__, (layer_class, _Recomputing), {"__call__": call})
