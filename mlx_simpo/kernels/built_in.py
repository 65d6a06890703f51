"""What response_logps.metal computes, in MLX operations: for CPUs, and to check it."""

from functools import partial

import mlx.core as mx

from .two_level import reduce_in_two_levels

IGNORED = -100  # a target that is left out, as in PyTorch


def built_in(
    products: mx.array, targets: mx.array, *, scale: float, softcap: float, gradient: bool
) -> tuple[mx.array, mx.array | None]:
    """log p(targets) of rows of logits, and ∂ log p/∂products; see `kernels.choice.ResponseLogps`.

    One exp serves both.
    """
    logits = _logits(products, scale, softcap)
    ignored, exists = targets == IGNORED, (targets >= 0) & (targets < products.shape[1])
    column = mx.where(exists, targets, 0)
    greatest = logits.max(axis=-1, keepdims=True)
    exponentials = _exponentials(logits, greatest)
    sums = reduce_in_two_levels(mx.sum, exponentials, layout="strided")
    picked = mx.take_along_axis(logits, column[:, None], axis=-1)
    logps = (picked - greatest).squeeze(-1) - mx.log(sums)
    logps = mx.where(exists, logps, mx.where(ignored, 0.0, mx.nan))
    if not gradient:
        return logps, None
    weight = mx.where(exists, scale, mx.where(ignored, 0.0, mx.nan))
    slope = exponentials * (-weight / sums)[:, None]
    slope = slope.at[mx.arange(targets.size), column].add(weight)
    if softcap:
        slope = slope * (1 - mx.square(logits / softcap))
    return logps, slope.astype(products.dtype)


def _logits(products: mx.array, scale: float, softcap: float) -> mx.array:
    logits = products.astype(mx.float32)
    if scale != 1:
        logits = logits * scale
    return softcap * mx.tanh(logits / softcap) if softcap else logits


@partial(mx.compile, shapeless=True)
def _exponentials(logits: mx.array, greatest: mx.array) -> mx.array:
    """In one pass over the logits."""
    return mx.exp(logits - greatest)
