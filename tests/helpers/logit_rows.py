"""Rows of logits of every awkward kind, and their log-probabilities and gradients in float64."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

IGNORE_INDEX = -100
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# (vocabulary, rows): less than one read of 16 bytes; odd; no multiple of what a simdgroup reads
# (1030); more than a threadgroup reads at once; GPT-2's, which is odd, and the widest there is.
SHAPES = [(2, 1), (2, 7), (31, 7), (33, 65), (1027, 7), (1030, 7), (9001, 7), (50_257, 2)]
SHAPES += [(262_144, 1)]
SETTINGS = [(1.0, 0.0), (2.0, 0.0), (1.0, 30.0), (0.3, 5.0)]  # scale and softcap


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
    """Return ordinary rows whose targets are the first and the last token, an ignored one, three
    invalid ones and random tokens (the last row always has a random token)."""
    rng = np.random.default_rng(size + rows)
    targets = rng.integers(0, size, rows)
    special = (0, size - 1, IGNORE_INDEX, -1, size, IGNORE_INDEX - 1)[: rows - 1]
    targets[: len(special)] = special
    raw_logits = mx.array(4 * rng.normal(size=(rows, size)), mx.float32).astype(dtype)
    return Case(raw_logits, mx.array(targets.astype(np.int32)), scale, softcap)


def hard_rows(size: int, dtype: mx.Dtype, scale: float = 1.0, softcap: float = 0.0) -> Case:
    """Return ten rows that are hard on a softmax, all with target 1: all equal; far from 0 (three);
    −∞ everywhere but at the target; −∞ at the target; +∞; NaN; −∞ everywhere; a target that towers
    over the rest."""
    rows = np.random.default_rng(size).normal(size=(10, size))
    rows[0] = 3.0
    rows[1:4] += np.array([[1e4], [-200], [-1e4]])
    rows[4], rows[4, 1] = -np.inf, 0.5
    rows[5, 1] = -np.inf
    rows[6, 0] = np.inf
    rows[7, 0] = np.nan
    rows[8] = -np.inf
    rows[9, 1] += 60.0
    raw_logits = mx.array(rows.astype(np.float32)).astype(dtype)
    return Case(raw_logits, mx.full((10,), 1, mx.int32), scale, softcap)


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


def assert_correct(outputs: tuple[mx.array, mx.array | None], inputs: Case) -> None:
    """Assert that log p and gradient are those of float64, but for some roundings of float32 and
    the one of storing the gradient, and that NaN and 0 are where they belong.

    Rounding does not depend on how far a row is from 0: its max is subtracted first. tanh and exp
    of a GPU are off by up to five units in the last place, which a softcap multiplies.
    """
    rounding = 16 * mx.finfo(mx.float32).eps * (1 + inputs.softcap)
    is_ignored = np.array(inputs.targets) == IGNORE_INDEX
    for output, exact in zip(outputs, in_float64(inputs), strict=True):
        if output is None:
            continue
        values = np.array(output.astype(mx.float32), np.float64)
        assert not values[is_ignored].any()
        is_finite = np.isfinite(exact)
        np.testing.assert_array_equal(values[~is_finite], exact[~is_finite])
        exact, values = exact[is_finite], values[is_finite]
        limits = rounding * (1 + np.abs(exact)) + mx.finfo(output.dtype).eps / 2 * np.abs(exact)
        np.testing.assert_array_less(np.abs(values - exact), limits)
