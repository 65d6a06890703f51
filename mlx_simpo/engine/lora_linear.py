"""A linear layer with LoRA, in as few operations as MLX has for it.

mlx-lm's LoRALinear computes xW + (scale · xAB) in five operations that differentiate into seven.
A GPU takes some microseconds to start each, and such layers are two thirds of a model's operations.
Here scale and sums are part of matrix products (mx.addmm): three operations, and five for

    dZ = scale · dY Bᵀ      dB = scale · Zᵀ dY      dA = Xᵀ dZ      dX = dY Wᵀ + dZ Aᵀ      (Z = XA)
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .operations import LoRA

# (rows [N, D], A, B) → the outputs of `_forward`.
_Function = Callable[[mx.array, mx.array, mx.array], tuple[mx.array, ...]]


def lora_operation() -> LoRA:
    """Return a function that computes what LoRALinear does without dropout; see `operations.LoRA`.

    It keeps a differentiable function for each base layer that it has met, for as long as it lives:
    making one takes longer than calling it.
    """
    functions: dict[tuple[int, float], tuple[nn.Module, _Function]] = {}

    def compute(
        x: mx.array, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float
    ) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        key = (id(linear), scale)
        if not linear._no_grad.issuperset(linear):  # the gradient below is not that of its weights
            out = _forward(linear, scale, rows, lora_a, lora_b)[0]
        else:
            if key not in functions:
                # With the layer itself, so that no other one can get its id.
                functions[key] = linear, _with_gradient(linear, scale)
            out = functions[key][1](rows, lora_a, lora_b)[0]
        return out.reshape(*x.shape[:-1], -1)

    return compute


def _with_gradient(linear: nn.Module, scale: float) -> _Function:
    """Return `_forward` with the gradient of the module's docstring."""

    @mx.custom_function
    def forward(rows: mx.array, lora_a: mx.array, lora_b: mx.array) -> tuple[mx.array, ...]:
        return _forward(linear, scale, rows, lora_a, lora_b)

    @forward.vjp
    def backward(
        primals: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, ...]:
        rows, lora_a, lora_b = primals
        _, z, wide_rows = outputs
        d_out = cotangents[0]
        wide_d_out = d_out.astype(z.dtype)
        d_z = _scaled_product(wide_d_out, lora_b.T, scale)
        d_rows = _sum_with_product(_input_gradient(linear, rows, d_out), d_z, lora_a.T, 1.0)
        return d_rows, wide_rows.T @ d_z, _scaled_product(z.T, wide_d_out, scale)

    return forward  # type: ignore[return-value]


def _forward(
    linear: nn.Module, scale: float, rows: mx.array, lora_a: mx.array, lora_b: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the output [N, E], and what its gradient needs: Z, and the rows in Z's dtype."""
    # LoRA's weights are float32 whatever the base model's dtype, and so are their products.
    wide_rows = rows.astype(lora_a.dtype)
    z = wide_rows @ lora_a
    return _sum_with_product(linear(rows), z, lora_b, scale), z, wide_rows


def _input_gradient(linear: nn.Module, rows: mx.array, d_out: mx.array) -> mx.array:
    """Return the gradient of a frozen layer's input."""
    if type(linear) is nn.Linear:
        return d_out @ linear.weight
    return mx.vjp(linear, [rows], [d_out])[1][0]  # quantized layers


def _sum_with_product(total: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """Return total + scale · ab in the dtype of ``total``."""
    if total.dtype == a.dtype:
        return mx.addmm(total, a, b, alpha=scale)
    return total + _scaled_product(a, b, scale).astype(total.dtype)


def _scaled_product(a: mx.array, b: mx.array, scale: float) -> mx.array:
    return a @ b if scale == 1 else mx.addmm(mx.array(0, a.dtype), a, b, alpha=scale)
