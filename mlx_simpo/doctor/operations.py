"""Whether MLX's own operations, those with a fused gradient above all, are right in a model."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ..device import is_gpu
from ..engine.agreement import Agreement
from ..engine.attention_shapes import AttentionShape, observe_attention
from ..engine.fused_attention import (
    check_forward_attention,
    check_fused_attention,
    has_fused_gradient,
)
from ..engine.fused_delta_rule import (
    DeltaShape,
    check_fused_delta_rule,
    has_fused_delta_gradient,
    observe_delta_rule,
)
from .attempts import finite

# Head sizes of common models, and (key heads, value heads) of Qwen 3.5's and Qwen3-Next's delta
# rule, whose heads have size 128; what a CPU checks is less, as it would take minutes.
HEAD_SIZES = (64, 80, 96, 128, 256)
DELTA_HEADS = ((16, 16), (16, 32), (16, 48), (16, 64))
DTYPES = (mx.float32, mx.bfloat16, mx.float16)
HEAD_SIZES_ON_CPU, DELTA_HEADS_ON_CPU, DTYPES_ON_CPU = (64, 128), ((1, 2),), (mx.float32,)
DELTA_SIZE = 128


def common_checks() -> Iterator[dict[str, Any]]:
    """Compare MLX's attention and delta rule with ours in the shapes of common models.

    Yields:
        See `checks_of_model`.
    """
    gpu = is_gpu()
    for dtype in DTYPES if gpu else DTYPES_ON_CPU:
        for size in HEAD_SIZES if gpu else HEAD_SIZES_ON_CPU:
            yield from _attention(AttentionShape(8, 2, size, size, dtype, size**-0.5))
        for key_heads, heads in DELTA_HEADS if gpu else DELTA_HEADS_ON_CPU:
            yield _delta_rule(delta_shape(key_heads, heads, dtype))


def checks_of_model(model: Any) -> Iterator[dict[str, Any]]:
    """Compare MLX's attention and delta rule with ours in the shapes that the model's layers have.

    They are compared whether or not they are used here.

    Yields:
        The fields of `agreement.Agreement`, an error that is not a number as None, and so is the
        gradient's in evaluation; "passed"; and "fused_gradient", whether MLX has a fused gradient
        for this shape on this device.
    """
    shapes = [shape.without_mask for shape in observe_attention(model) if shape.is_plain]
    for shape in dict.fromkeys(shapes):
        yield from _attention(shape)
    for shape in observe_delta_rule(model):
        yield _delta_rule(shape)


def delta_shape(key_heads: int, heads: int, dtype: mx.Dtype) -> DeltaShape:
    """Return the shape of a delta rule with heads of the usual size."""
    return DeltaShape(key_heads, heads, DELTA_SIZE, DELTA_SIZE, dtype, vector_gates=False)


def delta_heads() -> tuple[int, int]:
    """Return the smallest numbers of key heads and value heads for which MLX has a fused gradient
    of the delta rule here; small ones where it has none."""
    candidates = ((1, 2), (2, 4), (4, 8), (8, 16), (16, 16), (16, 32)) if is_gpu() else ()
    fused = (h for h in candidates if has_fused_delta_gradient(delta_shape(*h, mx.float32)))
    return next(fused, (1, 2))


def _attention(shape: AttentionShape) -> Iterator[dict[str, Any]]:
    fused, name = has_fused_gradient(shape), shape.description
    yield _as_dict(f"attention (training), {name}", check_fused_attention(shape), fused)
    evaluation = _as_dict(f"attention (evaluation), {name}", check_forward_attention(shape), fused)
    yield evaluation | {"gradient_error": None}


def _delta_rule(shape: DeltaShape) -> dict[str, Any]:
    name = f"delta rule, {shape.description}"
    return _as_dict(name, check_fused_delta_rule(shape), has_fused_delta_gradient(shape))


def _as_dict(name: str, agreement: Agreement, fused: bool) -> dict[str, Any]:
    return {
        **agreement._asdict(),
        "name": name,
        "value_error": finite(agreement.value_error),
        "gradient_error": finite(agreement.gradient_error),
        "passed": agreement.passed,
        "fused_gradient": fused,
    }
