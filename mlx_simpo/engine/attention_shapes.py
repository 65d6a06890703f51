"""What a model's layers ask of attention: numbers of heads, sizes, dtype and kinds of mask."""

from typing import Any, Literal, NamedTuple

import mlx.core as mx

from ..randomness import seeded
from .agreement import dtype_name
from .operations import AttentionCall, Operations, patchable_modules, patched
from .prefix_cache import PrefixCache, PrefixCacheList, PrefixKVCache, empty_caches
from .trunk import run_trunk

OBSERVED_TOKENS = 3

MaskKind = Literal["causal", "window", "other"]


class AttentionShape(NamedTuple):
    """What one kind of a model's attention layers computes with.

    head_size: of queries and keys. value_size: of values. scale: of the scores. sinks: whether the
    layer has attention sinks. mask: "causal" (or none); "window", an array where sequences are
    longer than the layer's window; "other", an array that adds to scores or differs by head.
    """

    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    dtype: mx.Dtype
    scale: float
    sinks: bool = False
    mask: MaskKind = "causal"

    @property
    def is_plain(self) -> bool:
        """Whether masks are causal or windows, without sinks: what our attention computes too."""
        return not self.sinks and self.mask != "other"

    @property
    def without_mask(self) -> "AttentionShape":
        """The shape of a layer of these sizes whose mask is causal, without sinks."""
        return self._replace(sinks=False, mask="causal")

    @property
    def description(self) -> str:
        """The head size and dtype, for the user."""
        sizes = dict.fromkeys((self.head_size, self.value_size))
        return f"head size {'/'.join(map(str, sizes))} in {dtype_name(self.dtype)}"


class _MarkingCache(PrefixKVCache):
    """Gives a layer with a sliding window an array as its mask, however short the sequence."""

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        return super().make_mask(n, return_array or window_size is not None, window_size)


def observe_attention(model: Any) -> tuple[AttentionShape, ...]:
    """Return the shapes that the model's layers really compute attention with, each once.

    They are seen in a forward pass of which nothing is evaluated. Models that compute their scores
    themselves (Gemma 2) and those without attention (Mamba) have none.

    Raises:
        TypeError: the model's caches cannot be forked; see `prefix_cache.reason_not_shareable`.
    """
    shapes: dict[AttentionShape, None] = {}

    def observing(call: AttentionCall) -> mx.array:
        shapes[attention_shape(call)] = None
        return mx.zeros((*call.queries.shape[:3], call.values.shape[3]), call.queries.dtype)

    caches = [_marking(cache) for cache in empty_caches(model)]
    # Dropout draws random numbers, which must not be missing afterwards.
    with seeded(0), patched(patchable_modules(model), Operations(observing, None)):
        run_trunk(model, mx.zeros((1, OBSERVED_TOKENS), mx.int32), caches)
    return tuple(shapes)


def _marking(cache: PrefixCache) -> PrefixCache:
    if isinstance(cache, PrefixCacheList):
        return PrefixCacheList(*map(_marking, cache.caches))
    return _MarkingCache() if isinstance(cache, PrefixKVCache) else cache


def attention_shape(call: AttentionCall) -> AttentionShape:
    """Return the shape of one call of attention."""
    queries, keys, values = call[:3]
    sizes = (queries.shape[1], keys.shape[1], queries.shape[3], values.shape[3])
    dtype = mx.result_type(queries, keys, values)
    sinks, kind = call.sinks is not None, mask_kind(call.mask)
    return AttentionShape(*sizes, dtype, float(call.scale), sinks, kind)


def mask_kind(mask: mx.array | str | None) -> MaskKind:
    """Return which kind of mask one call of attention has; see `AttentionShape`."""
    if not isinstance(mask, mx.array):
        return "causal"
    return "window" if mask.dtype == mx.bool_ and mask.ndim == 2 else "other"
