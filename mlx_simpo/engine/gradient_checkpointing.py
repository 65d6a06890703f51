"""Gradient checkpointing: a block's activations are recomputed in the backward pass.

Unlike mlx-lm's, it changes the given model alone (not every instance of the class), leaves no
traced arrays behind, and repeats the forward pass's dropout mask when it recomputes. mx.checkpoint
runs the function a second time, which draws new random numbers: the gradient would belong to
another mask than the loss (mlx 0.32.4; tests/model/test_checkpointing.py shows it).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from .prefix_cache import Layer

_CACHE = "the cache"


class _Keys:
    """Where the dropout layers of one block take their random keys from."""

    def __init__(self) -> None:
        self.key = mx.random.key(0)

    def next(self) -> mx.array:
        self.key, key = mx.random.split(self.key)
        return key


class _KeyedDropout(nn.Module):
    """nn.Dropout with the mask's key as an input, so that the same mask can be drawn again."""

    def __init__(self, keep: float, keys: _Keys) -> None:
        super().__init__()
        self._keep, self._keys = keep, keys

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        mask = mx.random.bernoulli(self._keep, x.shape, key=self._keys.next())
        return mask * x * (1 / self._keep)


@contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Within the context, each block of ``model.layers`` recomputes itself in the backward pass."""
    originals = []
    for block in model.layers:  # type: ignore[union-attr]
        keys = _Keys()
        dropouts = [(p, m) for p, m in block.named_modules() if isinstance(m, nn.Dropout)]
        active = [(p, m) for p, m in dropouts if m._p_1 < 1]
        keyed = [(p, _KeyedDropout(m._p_1, keys)) for p, m in active]
        block.update_modules(tree_unflatten(keyed))
        originals.append((block, type(block), active))
        block.__class__ = _recomputing(type(block), keys)
    try:
        yield
    finally:
        for block, original, dropouts in originals:
            block.__class__ = original
            block.update_modules(tree_unflatten(dropouts))


def _recomputing(block_class: type, keys: _Keys) -> type:
    """A subclass of ``block_class`` whose call goes through mx.checkpoint."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = next((a for a in (*args, *kwargs.values()) if isinstance(a, Layer)), None)

        def run(parameters: dict, key: mx.array, held: tuple, args: tuple, kwargs: dict) -> Any:
            self.update(parameters)
            keys.key = mx.stop_gradient(key)  # vjp is not defined for random bits
            own = None if cache is None else type(cache)(*held)
            args, kwargs = tree_map(lambda a: own if a is _CACHE else a, (args, kwargs))
            out = block_class.__call__(self, *args, **kwargs)
            return out, () if own is None else own.arrays()

        parameters = self.trainable_parameters()
        # An input of the checkpointed function, hence the same in both of its runs.
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
        # A cache's arrays go in and come out by name: what a block leaves in it is of one run only.
        held = () if cache is None else cache.arrays()
        given = tree_map(lambda a: _CACHE if isinstance(a, Layer) else a, (args, kwargs))
        out, made = mx.checkpoint(run)(parameters, key, held, *given)
        if cache is not None and made:
            cache.keys, cache.values = made
        self.update(parameters)
        return out

    return type(block_class.__name__, (block_class,), {"__call__": call})
