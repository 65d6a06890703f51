"""MLX's own attention, mx.fast.scaled_dot_product_attention: whether its gradient is fused on this
device, and whether it is right.

On a GPU, MLX may compute the gradient of attention in kernels that never store the scores. Which
head sizes, dtypes and lengths they take differs between devices and versions, so MLX itself is
asked; and since they are young, value and gradient are compared with our own attention before they
are trusted.
"""

import io
import math
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import product
from typing import Literal

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from .agreement import Agreement, Difference, relative_difference, summarize
from .attention import attention
from .attention_shapes import AttentionShape
from .operations import Attention, AttentionCall

# The primitive of the fused gradient in MLX's graphs (mlx 0.32.4, mlx/fast_primitives.h).
FUSED_GRADIENT = "ScaledDotProductAttentionVJP"

# The largest error, relative to the largest entry, against our attention in float32 on the same
# inputs. float32: GPUs multiply in TF32, whose 10 bits of mantissa round each product by up to
# 5e-4 (MLX_ENABLE_TF32); both sides do. Half precision: each rounding is up to 5e-4 (float16) or
# 4e-3 (bfloat16), and scores, probabilities and results are each rounded: MLX's unfused attention
# on a CPU is off by up to 1.8e-3 and 1.4e-2 here. A wrong index or mask is off by 0.1 and more.
TOLERANCES = {mx.float32: 2e-3, mx.float16: 5e-3, mx.bfloat16: 4e-2}
# Queries and keys of the comparisons: as many, and fewer, as behind a shared prefix. Kernels work
# on tiles of 16 to 128 rows: once with whole tiles, once with rests.
GRADIENT_LENGTHS = ((75, 75), (41, 107), (128, 128), (128, 200))
# In evaluation also with few queries, for which Metal has kernels of their own.
FORWARD_LENGTHS = (*GRADIENT_LENGTHS, (1, 60), (5, 60))
WINDOW = 24  # positions that a query of the comparisons with a sliding window sees

_Mask = Literal["causal", "window"] | None
_MASKS: dict[_Mask, str] = {
    None: "no mask",
    "causal": "the causal mask",
    "window": "a sliding window",
}
_NAMES = ("the value", *(f"the gradient of {name}" for name in ("queries", "keys", "values")))


def mlx_attention(call: AttentionCall) -> mx.array:
    """Compute attention [n, H, T, E] with MLX's own operation."""
    return mx.fast.scaled_dot_product_attention(
        *call[:3], scale=call.scale, mask=call.mask, sinks=call.sinks
    )


def _our_attention(call: AttentionCall) -> mx.array:
    return attention(*call[:5])


def has_fused_gradient(
    shape: AttentionShape,
    lengths: tuple[int, int] | None = None,
    mask: str | None = "causal",
) -> bool:
    """Return whether MLX has a fused gradient for this shape on its default device.

    Args:
        lengths: numbers of queries and of keys, on which it may depend (Metal's kernels take 9
            queries or more); None: whether it has one for any of GRADIENT_LENGTHS.
        mask: "causal" or None.
    """
    if shape.sinks or shape.mask == "other":
        return False  # the kernels take neither sinks nor arrays
    device = str(mx.default_device())
    candidates = GRADIENT_LENGTHS if lengths is None else (lengths,)
    # What is remembered must not hold on to a mask's own arrays.
    kind = None if mask is None else "causal"
    return any(_graph_is_fused(shape.without_mask, pair, kind, device) for pair in candidates)


@lru_cache(maxsize=4096)
def _graph_is_fused(
    shape: AttentionShape, lengths: tuple[int, int], mask: str | None, device: str
) -> bool:
    """Return whether the graph of a gradient, which is not evaluated, has the fused primitive.

    MLX decides while it builds the graph, by device, dtype, head sizes and lengths. The wheel for
    CPUs has the primitive's name but never puts it into a graph: there, attention becomes a
    sequence of matrix products before it is differentiated.
    """
    queries, keys = lengths
    arrays = [
        mx.zeros((1, heads, length, size), shape.dtype)
        for heads, length, size in (
            (shape.heads, queries, shape.head_size),
            (shape.kv_heads, keys, shape.head_size),
            (shape.kv_heads, keys, shape.value_size),
        )
    ]
    cotangent = mx.zeros((1, shape.heads, queries, shape.value_size), shape.dtype)

    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mlx_attention(AttentionCall(q, k, v, shape.scale, mask))

    try:
        _, gradients = mx.vjp(forward, arrays, [cotangent])
    except (RuntimeError, ValueError):
        return False  # what MLX does not take at all it has no gradient of
    return primitive_count(FUSED_GRADIENT, *gradients) > 0


def primitive_count(name: str, *arrays: mx.array) -> int:
    """Return how many primitives of that name the graph of these arrays has before it runs."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue().count(f'[label ="{name}"')


def check_fused_attention(shape: AttentionShape) -> Agreement:
    """Compare value and gradients of MLX's attention with ours, on small inputs of these head
    sizes, on the default device; once per process, shape and device.

    The masks are None and "causal", with as many queries as keys and with fewer. Sinks are not
    compared: ours has none.
    """
    return _check(shape.without_mask, str(mx.default_device()), gradient=True)


def check_forward_attention(shape: AttentionShape) -> Agreement:
    """Compare the value of MLX's attention outside of a gradient, where it may run other kernels;
    as `check_fused_attention`, and with sliding windows and few queries too."""
    return _check(shape.without_mask, str(mx.default_device()), gradient=False)


def forget_checks() -> None:
    """Forget what MLX was asked and what was compared, as a new process would."""
    _graph_is_fused.cache_clear()
    _check.cache_clear()


@cache
def _check(shape: AttentionShape, device: str, *, gradient: bool) -> Agreement:
    name = f"MLX's attention with head size {shape.head_size}"
    differences = _differences(shape, gradient=gradient)
    return summarize(name, shape.dtype, TOLERANCES[shape.dtype], differences)


def _differences(shape: AttentionShape, *, gradient: bool) -> Iterator[Difference]:
    """Yield how far each array of MLX's attention is from ours in float32, for all lengths and
    masks to compare with."""
    masks: tuple[_Mask, ...] = (None, "causal") if gradient else (None, "causal", "window")
    for lengths, kind in product(GRADIENT_LENGTHS if gradient else FORWARD_LENGTHS, masks):
        new, total = lengths
        is_window = kind == "window"
        mask = create_causal_mask(new, total - new, window_size=WINDOW) if is_window else kind
        inputs = _inputs(shape, lengths)
        exact = [array.astype(mx.float32) for array in inputs]
        actual, expected = (
            _outputs(run, arrays, shape.scale, mask, gradient=gradient)
            for run, arrays in ((mlx_attention, inputs), (_our_attention, exact))
        )
        for name, one, two in zip(_NAMES, actual, expected, strict=False):
            where = f"{name} with {new} queries, {total} keys and {_MASKS[kind]}"
            yield Difference(relative_difference(one, two), where, name != _NAMES[0])


def _inputs(shape: AttentionShape, lengths: tuple[int, int]) -> list[mx.array]:
    """Return queries, keys, values and a cotangent [n, T, H, E] of both signs, laid out in memory
    as in a model: what comes out of a projection is [n, T, H, D]."""
    new, total = lengths
    kv_heads = min(shape.kv_heads, 2)
    heads = kv_heads * shape.heads // shape.kv_heads
    sizes = (
        (new, heads, shape.head_size),
        (total, kv_heads, shape.head_size),
        (total, kv_heads, shape.value_size),
        (new, heads, shape.value_size),
    )
    arrays = [mx.random.normal((2, *size), key=mx.random.key(i)) for i, size in enumerate(sizes)]
    # Scores of standard deviation 1.5, whatever the scale: neither uniform nor all on one key.
    arrays[0] = arrays[0] * (1.5 / (abs(shape.scale) * math.sqrt(shape.head_size)))
    queries, keys, values, cotangent = (array.astype(shape.dtype) for array in arrays)
    return [*(array.swapaxes(1, 2) for array in (queries, keys, values)), cotangent]


def _outputs(
    run: Attention,
    inputs: list[mx.array],
    scale: float,
    mask: mx.array | str | None,
    *,
    gradient: bool,
) -> list[mx.array]:
    """Return the value of one attention, and its three gradients if they are asked for."""
    *primals, cotangent = inputs

    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return run(AttentionCall(q, k, v, scale, mask)).swapaxes(1, 2)

    if not gradient:
        return [forward(*primals)]
    values, gradients = mx.vjp(forward, primals, [cotangent])
    return [*values, *gradients]
