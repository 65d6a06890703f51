"""MLX's attention as on a GPU that has a fused gradient, and what may be wrong with one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from helpers.devices import forget_kernels

from mlx_simpo.engine import fused_attention

# An operation that nothing else here computes. It stands for the fused gradient's primitive, which
# MLX's wheel for CPUs never puts into a graph.
MARK = "ArcTanh"
LEAST_QUERIES = 9  # as Metal's

# (gradients of queries, keys and values; queries, keys; mask) → gradients
Defect = Callable[[list[mx.array], mx.array, mx.array, Any], list[mx.array]]


class FusedAttention:
    """Takes the place of mx.fast.scaled_dot_product_attention.

    Its value is MLX's. Its gradient is one function with MARK in it where a GPU's would be fused
    (causal or no mask, no sinks, at least LEAST_QUERIES queries, ``head_sizes``), MLX's elsewhere.

    defect: of the gradient. value_defect: (value, mask) → value.
    forward, backward: (queries, keys, mask) of the calls so far.
    """

    def __init__(
        self,
        defect: Defect | None,
        value_defect: Callable[[mx.array, Any], mx.array] | None,
        head_sizes: Sequence[int],
    ) -> None:
        self.original: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention
        self.defect, self.value_defect, self.head_sizes = defect, value_defect, head_sizes
        self.forward: list[tuple[int, int, Any]] = []
        self.backward: list[tuple[int, int, Any]] = []

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **more: Any
    ) -> mx.array:
        call = (q.shape[2], k.shape[2], mask)
        self.forward.append(call)

        def compute(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            value = self.original(q, k, v, scale=scale, mask=mask, **more)
            return self.value_defect(value, mask) if self.value_defect else value

        is_fused = not isinstance(mask, mx.array) and more.get("sinks") is None
        if not (is_fused and call[0] >= LEAST_QUERIES and q.shape[3] in self.head_sizes):
            return compute(q, k, v)
        function = mx.custom_function(compute)

        @function.vjp
        def backward(primals: Any, cotangent: Any, output: Any) -> list[mx.array]:
            self.backward.append(call)
            _, gradients = mx.vjp(compute, list(primals), [cotangent])
            if self.defect is not None:
                queries, keys, _ = primals
                gradients = self.defect(gradients, queries, keys, mask)
            return mx.depends(gradients, [mx.arctanh(mx.zeros(1))])  # type: ignore[return-value]

        return function(q, k, v)  # type: ignore[return-value]


@contextmanager
def fused_attention_stand_in(
    defect: Defect | None = None,
    value_defect: Callable[[mx.array, Any], mx.array] | None = None,
    *,
    head_sizes: Sequence[int] = (8, 16),
    gpu: bool = True,
) -> Iterator[FusedAttention]:
    """Let MLX's attention have a fused gradient, and MLX report a GPU unless ``gpu`` is False."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in = FusedAttention(defect, value_defect, head_sizes)
        patch.setattr(mx.fast, "scaled_dot_product_attention", stand_in)
        patch.setattr(fused_attention, "FUSED_GRADIENT", MARK)
        if gpu:
            patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
            patch.setattr(mx.metal, "is_available", lambda: True)
        forget_kernels()
        try:
            yield stand_in
        finally:
            forget_kernels()


# --- what may be wrong -------------------------------------------------------------------------


def wrong_keys(gradients: list[mx.array], *_: Any) -> list[mx.array]:
    """The gradient of keys is a tenth too large, everything else is right."""
    return [gradients[0], gradients[1] * 1.1, gradients[2]]


def wrong_with_fewer_queries(
    gradients: list[mx.array], queries: mx.array, keys: mx.array, mask: Any
) -> list[mx.array]:
    """The gradients belong to other positions where there are fewer queries than keys: as of a mask
    that is aligned to the upper left."""
    if queries.shape[2] == keys.shape[2]:
        return gradients
    return [gradients[0], *(mx.roll(g, 1, 2) for g in gradients[1:])]


def wrong_in_bfloat16(gradients: list[mx.array], queries: mx.array, *rest: Any) -> list[mx.array]:
    """As `wrong_keys`, in bfloat16 alone."""
    return wrong_keys(gradients) if queries.dtype == mx.bfloat16 else gradients


def not_a_number(gradients: list[mx.array], *_: Any) -> list[mx.array]:
    """One entry of the gradient of values is NaN."""
    return [*gradients[:2], gradients[2].at[0, 0, 3, 0].multiply(mx.nan)]


def failing(gradients: list[mx.array], queries: mx.array, keys: mx.array, mask: Any) -> Any:
    """A kernel that cannot be compiled."""
    if keys.shape[2] == 107:
        raise RuntimeError("[metal::Device] Unable to load kernel\n sdpa_vjp_ds_64")
    return gradients
