"""Rows of logits of every awkward kind, and their log-probabilities and gradients in float64."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

IGNORE_INDEX = -100
SIZES = (2, 31, 33, 1027, 32_000, 151_936, 262_144)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# The spacing of numbers near 1: what rounding costs, relative to a value above 1.
ROUNDING = {mx.float32: 2**-23, mx.float16: 2**-10, mx.bfloat16: 2**-7}
# (size, rows): the widest with few rows only.
SHAPES = [(size, n) for size in SIZES for n in ((1, 7) if size > 2000 else (1, 7, 63, 64, 65))]


class Case(NamedTuple):
    """Arguments of an implementation: raw_logits [C, V], targets [C]."""

    raw_logits: mx.array
    targets: mx.array
    scale: float
    softcap: float


class Expected(NamedTuple):
    """log p [C] and its gradient [C, V], in float64."""

    logps: np.ndarray
    d_raw_logits: np.ndarray


def case(
    size: int, rows: int = 7, dtype: mx.Dtype = mx.float32, scale: float = 1.0, softcap: float = 0.0
) -> Case:
    """Return ordinary rows whose targets are the first and the last token, an ignored one, two
    invalid ones and random tokens (the last row always has a random token)."""
    rng = np.random.default_rng(size + rows)
    targets = rng.integers(0, size, rows)
    special = (0, size - 1, IGNORE_INDEX, -1, size)[: rows - 1]
    targets[: len(special)] = special
    raw_logits = mx.array(4 * rng.normal(size=(rows, size)), mx.float32).astype(dtype)
    return Case(raw_logits, mx.array(targets.astype(np.int32)), scale, softcap)


def hard_rows(size: int, dtype: mx.Dtype) -> Case:
    """Return eight rows that are hard on a softmax, all with target 1: all equal; far from 0; −∞
    everywhere but at the target; −∞ at the target; +∞; NaN; −∞ everywhere; a target that towers
    over the rest."""
    rows = np.random.default_rng(size).normal(size=(8, size))
    rows[0] = 3.0
    rows[1] += 1e4
    rows[2], rows[2, 1] = -np.inf, 0.5
    rows[3, 1] = -np.inf
    rows[4, 0] = np.inf
    rows[5, 0] = np.nan
    rows[6] = -np.inf
    rows[7, 1] += 60.0
    return Case(mx.array(rows.astype(np.float32)).astype(dtype), mx.full((8,), 1, mx.int32), 1, 0.0)


def in_float64(inputs: Case) -> Expected:
    """Return log p and its gradient from the definition, row by row."""
    raw_logits = np.array(inputs.raw_logits.astype(mx.float32), np.float64)
    logps, gradients = np.zeros(len(raw_logits)), np.zeros(raw_logits.shape)
    for row, target in enumerate(np.array(inputs.targets).tolist()):
        if target == IGNORE_INDEX:
            continue
        if not 0 <= target < raw_logits.shape[1]:
            logps[row] = gradients[row] = np.nan
            continue
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            z = inputs.scale * raw_logits[row]
            z = inputs.softcap * np.tanh(z / inputs.softcap) if inputs.softcap else z
            log_sum = z.max() + np.log(np.exp(z - z.max()).sum())
            logps[row] = z[target] - log_sum
            one_hot = np.arange(z.size) == target
            d_softcap = 1 - (z / inputs.softcap) ** 2 if inputs.softcap else 1.0
            gradients[row] = (one_hot - np.exp(z - log_sum)) * inputs.scale * d_softcap
    return Expected(logps, gradients)


def in_plain_operations(inputs: Case) -> Expected:
    """Return the same from MLX's logsumexp and autodiff, in the dtype of the raw logits; 0 for
    rows whose target is no token."""
    size = inputs.raw_logits.shape[1]
    column = mx.clip(inputs.targets, 0, size - 1)

    def logps(raw_logits: mx.array) -> mx.array:
        z = inputs.scale * raw_logits
        z = inputs.softcap * mx.tanh(z / inputs.softcap) if inputs.softcap else z
        target_logits = mx.take_along_axis(z, column[:, None], axis=-1).squeeze(-1)
        return target_logits - mx.logsumexp(z, axis=-1)

    gradient = mx.grad(lambda x: logps(x).astype(mx.float32).sum())(inputs.raw_logits)
    is_token = np.array((inputs.targets >= 0) & (inputs.targets < size))
    outputs = [np.array(a.astype(mx.float32)) for a in (logps(inputs.raw_logits), gradient)]
    return Expected(
        np.where(is_token, outputs[0], 0.0), np.where(is_token[:, None], outputs[1], 0.0)
    )


def assert_correct(outputs: tuple[mx.array, mx.array | None], inputs: Case) -> None:
    """Assert that values are no further from float64 than those of plain operations in the same
    dtype, but for rounding, and that NaN and 0 are where they belong."""
    expected, plain = in_float64(inputs), in_plain_operations(inputs)
    is_finite = np.isfinite(expected.logps)
    for output, exact, other, dtype in (
        (outputs[0], expected.logps, plain.logps, mx.float32),
        (outputs[1], expected.d_raw_logits, plain.d_raw_logits, inputs.raw_logits.dtype),
    ):
        if output is None:
            continue
        values = np.array(output.astype(mx.float32), np.float64)
        np.testing.assert_array_equal(np.isnan(values[~is_finite]), np.isnan(exact[~is_finite]))
        exact, values, other = exact[is_finite], values[is_finite], other[is_finite]
        limit = np.abs(other - exact).max(initial=0) + 4 * ROUNDING[dtype] * (1 + np.abs(exact))
        assert (np.abs(values - exact) <= limit).all()
    is_ignored = np.array(inputs.targets) == IGNORE_INDEX
    assert not np.array(outputs[0])[is_ignored].any()
    if outputs[1] is not None:
        assert not np.array(outputs[1].astype(mx.float32))[is_ignored].any()
