"""A linear layer with LoRA, in as few operations as MLX has for it.

mlx-lm's LoRALinear computes xW + (scale · xAB) in five operations that differentiate into seven.
A GPU takes some microseconds to start each, and such layers are two thirds of a model's operations.
Here scale and sums are part of matrix products (mx.addmm): three operations, and five for

    dZ = scale · dY Bᵀ      dB = scale · Zᵀ dY      dA = Xᵀ dZ      dX = dY Wᵀ + dZ Aᵀ      (Z = XA)

A and B are float32 while they train, whatever the base model's dtype, and so are their products. In
half precision X becomes float32 first: once for all layers that read the same X, within a
`SharedWork`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
import mlx.nn as nn

from .operations import LoRA

_Arrays = tuple[mx.array, ...]
# (rows [N, D], the same in LoRA's dtype, A, B) → the outputs of `_forward`, and A and B.
_Function = Callable[[mx.array, mx.array, mx.array, mx.array], _Arrays]


class SharedWork:
    """What layers share within the passes of one micro-batch, which are all differentiated at once.

    A weight's gradient is a sum over the passes. So that each pass adds its part within a matrix
    product, it returns the weights it was called with to the next pass: the gradient of what it
    returned is the sum so far.
    """

    def __init__(self) -> None:
        # By the ids of the base layer and of A: several adapters may have the same base layer.
        self.weights: dict[tuple[int, int], tuple[mx.array, mx.array]] = {}
        self.is_last = False
        self._rows: tuple[mx.array, mx.array, mx.array] | None = None

    def rows(self, x: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Return `_rows` of x; the same arrays if the layer before this one read the same x."""
        if self._rows is None or self._rows[0] is not x or self._rows[2].dtype != dtype:
            self._rows = (x, *_rows(x, dtype))
        return self._rows[1:]

    @contextmanager
    def in_pass(self, *, is_last: bool) -> Iterator[None]:
        """Within the context, let the layers of one pass share their work.

        is_last: no later pass returns its part of a gradient to this one.
        """
        self.is_last = is_last
        token = _shared.set(self)
        try:
            yield
        finally:
            _shared.reset(token)


_shared: ContextVar[SharedWork | None] = ContextVar("shared work", default=None)


def lora_operation() -> LoRA:
    """Return a function that computes what LoRALinear does without dropout; see `operations.LoRA`.

    It keeps the differentiable functions of the base layers that it has met, for as long as it
    lives: making one takes longer than calling it.
    """
    functions: dict[tuple[int, float, bool], tuple[nn.Module, _Function]] = {}

    def compute(
        x: mx.array, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float
    ) -> mx.array:
        shared = _shared.get()
        is_summed = False
        dtype = mx.result_type(x, lora_a, lora_b)
        name = id(linear), id(lora_a)
        if shared is None:
            rows, wide_rows = _rows(x, dtype)
        else:
            rows, wide_rows = shared.rows(x, dtype)
            lora_a, lora_b = shared.weights.get(name, (lora_a, lora_b))
            is_summed = not shared.is_last
        lora_a, lora_b = lora_a.astype(dtype), lora_b.astype(dtype)
        if not linear._no_grad.issuperset(linear):  # ours would be without its weights' gradient
            out = _forward(linear, scale, rows, rows.astype(dtype), lora_a, lora_b)[0]
        else:
            key = (id(linear), scale, is_summed)
            if key not in functions:
                # With the layer itself, so that no other one can get its id.
                functions[key] = linear, _with_gradient(linear, scale, is_summed=is_summed)
            out, _, *weights = functions[key][1](rows, wide_rows, lora_a, lora_b)
            if is_summed:
                shared.weights[name] = tuple(weights)  # type: ignore[union-attr]
        return out.reshape(*x.shape[:-1], -1)

    return compute


def _rows(x: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Return x [..., D] as rows [N, D], in its own dtype and in LoRA's; if they are the same, the
    first get the whole gradient."""
    rows = x.reshape(-1, x.shape[-1])
    return rows, mx.stop_gradient(rows) if rows.dtype == dtype else rows.astype(dtype)


def _with_gradient(linear: nn.Module, scale: float, *, is_summed: bool) -> _Function:
    """Return `_forward` with the gradient of the module's docstring.

    is_summed: the gradients of A and B that it returns are added to its own; see `SharedWork`.
    """

    @mx.custom_function
    def forward(rows: mx.array, wide_rows: mx.array, lora_a: mx.array, lora_b: mx.array) -> _Arrays:
        outputs = _forward(linear, scale, rows, wide_rows, lora_a, lora_b)
        return (*outputs, lora_a, lora_b) if is_summed else outputs

    @forward.vjp
    def backward(primals: _Arrays, cotangents: _Arrays, outputs: _Arrays) -> _Arrays:
        rows, wide_rows, lora_a, lora_b = primals
        d_out, z, zero = cotangents[0], outputs[1], mx.array(0, outputs[1].dtype)
        wide_d_out = d_out.astype(z.dtype)
        d_z = mx.addmm(zero, wide_d_out, lora_b.T, alpha=scale)
        later_a, later_b = cotangents[2:] if is_summed else (None, zero)
        d_a = wide_rows.T @ d_z if later_a is None else mx.addmm(later_a, wide_rows.T, d_z)
        d_b = mx.addmm(later_b, z.T, wide_d_out, alpha=scale)
        d_rows = _input_gradient(linear, rows, d_out)
        # Of a base layer in another dtype than its input, d_rows is in that dtype.
        if rows.dtype == wide_rows.dtype:
            return mx.addmm(d_rows.astype(z.dtype), d_z, lora_a.T), wide_rows, d_a, d_b
        return d_rows.astype(rows.dtype), d_z @ lora_a.T, d_a, d_b

    return forward  # type: ignore[return-value]


def _forward(
    linear: nn.Module,
    scale: float,
    rows: mx.array,
    wide_rows: mx.array,
    lora_a: mx.array,
    lora_b: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return the output [N, E] in the base layer's dtype, and Z, which its gradient needs."""
    z = wide_rows @ lora_a
    out = linear(rows)
    if out.dtype == z.dtype:
        return mx.addmm(out, z, lora_b, alpha=scale), z
    delta = mx.addmm(mx.array(0, z.dtype), z, lora_b, alpha=scale)
    return out + delta.astype(out.dtype), z


def _input_gradient(linear: nn.Module, rows: mx.array, d_out: mx.array) -> mx.array:
    """Return the gradient of a frozen layer's input."""
    if type(linear) is nn.Linear:
        return d_out @ linear.weight
    return mx.vjp(linear, [rows], [d_out])[1][0]  # quantized layers
