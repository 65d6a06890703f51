"""What response_logps.metal computes, in MLX operations: for CPUs, and to check the kernel."""

from functools import partial

import mlx.core as mx

from .two_level import reduce_in_two_levels

IGNORE_INDEX = -100  # the target of a row that does not count; PyTorch's default ignore_index


def mlx_response_logps(
    raw_logits: mx.array, targets: mx.array, *, scale: float, softcap: float, gradient: bool
) -> tuple[mx.array, mx.array | None]:
    """Return log p(targets) and its gradient with respect to the raw logits, in MLX operations.

    See `kernels.choice.ResponseLogps` for arguments and results; docs/kernel.md derives the
    gradient. Exponentials are computed once and serve both.
    """
    logits = _logits(raw_logits, scale, softcap)
    is_ignored = targets == IGNORE_INDEX
    is_token = (targets >= 0) & (targets < raw_logits.shape[1])
    # Gathering with an invalid index would read another token's logit: take column 0 instead, and
    # overwrite the result below.
    rows, column = mx.arange(targets.size), mx.where(is_token, targets, 0)
    row_max = logits.max(axis=1, keepdims=True)
    exponentials = _exponentials(logits, row_max)
    # In blocks: MLX on the CPU adds up a row from left to right, which at V = 49152 is off by up to
    # 2e-4 and low by 8e-5 on average (mlx 0.32.4).
    sums = reduce_in_two_levels(mx.sum, exponentials, layout="strided")
    logps = (logits[rows, column] - row_max.squeeze(1)) - mx.log(sums)
    logps = mx.where(is_token, logps, mx.where(is_ignored, 0.0, mx.nan))
    if not gradient:
        return logps, None
    # ∂ log p/∂logits is one_hot − softmax; the softmax is already here but for its denominator.
    weight = mx.where(is_token, scale, mx.where(is_ignored, 0.0, mx.nan))
    d_raw_logits = exponentials * (-weight / sums)[:, None]
    d_raw_logits = d_raw_logits.at[rows, column].add(weight)
    if softcap:
        d_raw_logits = d_raw_logits * (1 - mx.square(logits / softcap))
    return logps, d_raw_logits.astype(raw_logits.dtype)


def _logits(raw_logits: mx.array, scale: float, softcap: float) -> mx.array:
    logits = raw_logits.astype(mx.float32)
    if scale != 1:
        logits = logits * scale
    return softcap * mx.tanh(logits / softcap) if softcap else logits


@partial(mx.compile, shapeless=True)
def _exponentials(logits: mx.array, row_max: mx.array) -> mx.array:
    """Return exp(logits − row_max); compiled, so that it takes one pass over the logits."""
    return mx.exp(logits - row_max)
