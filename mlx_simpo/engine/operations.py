"""The patch of mlx-lm's operations: what the layers compute attention, delta rule and LoRA with.

mlx-lm's model files import two functions by name, ``scaled_dot_product_attention`` and
``gated_delta_update``. Within `patched` those names, and LoRALinear's ``__call__``, lead to
functions that compute with the operations of that context; afterwards to mlx-lm's own again.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.tuner.lora import LoRALinear

from ..device import is_gpu
from .prefix_cache import PrefixKVCache


class AttentionCall(NamedTuple):
    """What a layer passes to attention; for models of mlx-lm's with a cache of ours.

    queries: [n, H, T, D], of the last T of S positions. keys, values: [n, K, S, D] and
    [n, K, S, E], where K divides H. scale: of the scores. mask: "causal", None, booleans (True
    where a query sees a key) or numbers to be added to the scores, of a shape that broadcasts to
    [n, H, T, S]. sinks: [H], a score of each head that no value belongs to.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None = None


Attention = Callable[[AttentionCall], mx.array]  # → [n, H, T, E]
# (q, k [B, T, Hk, Dk], v [B, T, Hv, Dv], g [B, T, Hv] or [B, T, Hv, Dk], beta [B, T, Hv],
# state [B, Hv, Dv, Dk]) → (outputs [B, T, Hv, Dv], state after the last token).
DeltaRule = Callable[
    [mx.array, mx.array, mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]
]


# mlx-lm's LoRALinear without dropout: (x [..., D], base layer, A [D, r], B [r, E], scale)
# → [..., E].
LoRA = Callable[[mx.array, nn.Module, mx.array, mx.array, float], mx.array]


# A module of mlx-lm's, or its class LoRALinear, whose name is __call__.
Patchable = ModuleType | type


class Operations(NamedTuple):
    """What the layers compute with; None: mlx-lm's own."""

    attention: Attention | None
    delta_rule: DeltaRule | None
    lora: LoRA | None = None


MLX_LM = Operations(None, None)


class _Patch:
    """One `patched`, from its beginning to its end."""

    def __init__(self, operations: Operations) -> None:
        self.operations, self.is_active = operations, True


# The contexts of this thread (or task), outermost first. An abandoned context may be ended by the
# garbage collector in another thread, where this variable has another value, so one that has ended
# may still be listed: it is not active any more. (ContextVar.reset would raise there; and where
# contexts overlap, it would bring back operations whose context has ended.)
_patches: ContextVar[tuple[_Patch, ...]] = ContextVar("patches", default=())
# The contexts that hold the patch of a module; without any, it is as mlx-lm wrote it.
_holders: dict[Patchable, set[_Patch]] = defaultdict(set)
# Re-entrant: garbage collection may end an abandoned context while this thread holds the lock.
_lock = RLock()


def current_operations() -> Operations:
    """Return the operations of the last `patched` that this thread has entered and not left;
    MLX_LM without any."""
    active = (patch.operations for patch in reversed(_patches.get()) if patch.is_active)
    return next(active, MLX_LM)


def patchable_modules(model: nn.Module) -> tuple[Patchable, ...]:
    """Return the modules that define ``model``'s layers and call one of the two by its name, and
    LoRALinear if the model has such layers.

    Models that compute their scores themselves (Gemma 2, for its softcap) have no such module.
    """
    layers: Any = model.layers
    classes = {type(module) for layer in layers for module in layer.modules()}
    modules = [sys.modules[name] for name in sorted({c.__module__ for c in classes})]
    patchable = [*modules, *([LoRALinear] if LoRALinear in classes else [])]
    return tuple(o for o in patchable if any(_is_patchable(o, name) for name in _PATCHES))


@contextmanager
def patched(modules: Sequence[Patchable], operations: Operations) -> Iterator[None]:
    """Within the context, let ``modules`` compute with ``operations``.

    Everything else, and every other thread, computes with mlx-lm's own. Contexts may be nested,
    overlap, and run in several threads: the last one to end takes the patch away, also after an
    exception or Ctrl-C.

    MLX calls Python only while it builds a graph, so the context has to be entered for that and not
    for mx.eval. A function in mx.checkpoint is called again when its gradient's graph is built,
    which is after the forward pass: it has to enter the context itself.

    Args:
        modules: of `patchable_modules`.
    """
    patch = _Patch(operations)
    try:
        _patches.set((*_patches.get(), patch))
        with _lock:
            for module in modules:
                _holders[module].add(patch)
                for name, (_, ours) in _PATCHES.items():
                    if _is_patchable(module, name):
                        setattr(module, name, ours)
        yield
    finally:
        patch.is_active = False
        _patches.set(tuple(other for other in _patches.get() if other.is_active))
        with _lock:
            for module in modules:
                _holders[module].discard(patch)
                if not _holders[module]:
                    for name, (original, _) in _PATCHES.items():
                        if _is_patchable(module, name):
                            setattr(module, name, original)


def _is_patchable(module: Patchable, name: str) -> bool:
    return vars(module).get(name) in _PATCHES[name]


def _attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Compute the context's attention on a `PrefixKVCache`, mlx-lm's own with any other cache."""
    ours = current_operations().attention
    if ours is not None and isinstance(cache, PrefixKVCache):
        return ours(AttentionCall(queries, keys, values, scale, mask, sinks))
    return scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)  # type: ignore


def _gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """Compute the context's delta rule, and mlx-lm's own with a mask, and for inference on a GPU,
    where mlx-lm has a kernel (without a gradient)."""
    ours = current_operations().delta_rule
    if ours is None or mask is not None or (use_kernel and is_gpu()):
        return _ORIGINAL_DELTA(
            *(q, k, v, a, b, A_log, dt_bias, state, mask),
            use_kernel=use_kernel,
            lower_bound=lower_bound,
            allow_neg_eigval=allow_neg_eigval,
        )
    beta = mx.sigmoid(b)
    if allow_neg_eigval:
        beta = beta * 2.0
    if lower_bound is None:
        g = gated_delta.compute_g(A_log, a, dt_bias)
    else:
        g = gated_delta.compute_lower_bound_g(A_log, a, dt_bias, lower_bound)
    if state is None:
        state = mx.zeros((q.shape[0], *v.shape[2:], k.shape[3]), mx.float32)
    return ours(q, k, v, g, beta, state)


def _lora_linear(self: LoRALinear, x: mx.array) -> mx.array:
    """Compute the context's LoRA, mlx-lm's own while it drops inputs."""
    ours = current_operations().lora
    dropout = self.dropout
    drops = type(dropout) is not nn.Dropout or (dropout.training and dropout._p_1 < 1)
    if ours is None or drops:
        return _ORIGINAL_LORA(self, x)
    return ours(x, self.linear, self.lora_a, self.lora_b, self.scale)


_ORIGINAL_LORA = LoRALinear.__call__
_ORIGINAL_DELTA = gated_delta.gated_delta_update
# The name in mlx-lm's model files: mlx-lm's function and ours.
_PATCHES: dict[str, tuple[Callable, Callable]] = {
    "scaled_dot_product_attention": (scaled_dot_product_attention, _attention),
    "gated_delta_update": (_ORIGINAL_DELTA, _gated_delta_update),
    "__call__": (_ORIGINAL_LORA, _lora_linear),
}
