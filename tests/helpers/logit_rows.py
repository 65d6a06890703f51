"""Rows of logits of every awkward kind, and what float64 makes of them."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

SIZES = (2, 31, 33, 1027, 32_000, 151_936, 262_144)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# Of a stored value, relative; and of a log-probability, in nats, beside its own size.
ROUNDING = {mx.float32: 2**-23, mx.float16: 2**-10, mx.bfloat16: 2**-7}


class Case(NamedTuple):
    """products: [C, V], as an implementation gets them; targets: [C]."""

    products: mx.array
    targets: mx.array
    scale: float
    softcap: float


class Truth(NamedTuple):
    """log p [C] and its gradient [C, V], in float64."""

    logps: np.ndarray
    slope: np.ndarray


def case(
    size: int, rows: int = 7, dtype: mx.Dtype = mx.float32, scale: float = 1.0, softcap: float = 0.0
) -> Case:
    """Ordinary rows; targets: the first and last token, some between, one left out, two that are
    none."""
    rng = np.random.default_rng(size + rows)
    targets = rng.integers(0, size, rows)
    for place, target in enumerate((0, size - 1, -100, -1, size)):
        if place < rows - 1:
            targets[place] = target
    products = mx.array(4 * rng.normal(size=(rows, size)), mx.float32).astype(dtype)
    return Case(products, mx.array(targets.astype(np.int32)), scale, softcap)


def hard_rows(size: int, dtype: mx.Dtype) -> Case:
    """All equal; far from 0; −∞ everywhere but at the target; −∞ at the target; +∞; NaN; −∞ alone;
    one that towers over the rest."""
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


def truth(given: Case) -> Truth:
    """From the definition, a row at a time."""
    products = np.array(given.products.astype(mx.float32), np.float64)
    logps, slopes = np.zeros(len(products)), np.zeros(products.shape)
    for row, target in enumerate(given.targets.tolist()):
        if target == -100:
            continue
        if not 0 <= target < products.shape[1]:
            logps[row] = slopes[row] = np.nan
            continue
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            z = given.scale * products[row]
            z = given.softcap * np.tanh(z / given.softcap) if given.softcap else z
            log_total = z.max() + np.log(np.exp(z - z.max()).sum())
            logps[row] = z[target] - log_total
            one_hot = np.arange(z.size) == target
            bend = 1 - (z / given.softcap) ** 2 if given.softcap else 1.0
            slopes[row] = (one_hot - np.exp(z - log_total)) * given.scale * bend
    return Truth(logps, slopes)


def plain(given: Case) -> Truth:
    """What MLX's log-softmax and its autodiff make of the same, in the products' dtype (of rows
    whose target is a token; the others are 0)."""
    size = given.products.shape[1]
    column = mx.clip(given.targets, 0, size - 1)

    def logps(products: mx.array) -> mx.array:
        z = given.scale * products
        z = given.softcap * mx.tanh(z / given.softcap) if given.softcap else z
        picked = mx.take_along_axis(z, column[:, None], axis=-1).squeeze(-1)
        return picked - mx.logsumexp(z, axis=-1)

    slope = mx.grad(lambda products: logps(products).astype(mx.float32).sum())(given.products)
    is_token = np.array((given.targets >= 0) & (given.targets < size))
    found = (np.array(a.astype(mx.float32), np.float64) for a in (logps(given.products), slope))
    return Truth(*(np.where(is_token.reshape(-1, *[1] * (a.ndim - 1)), a, 0.0) for a in found))


# (size, rows): the widest with few.
SHAPES = [(size, n) for size in SIZES for n in ((1, 7) if size > 2000 else (1, 7, 63, 64, 65))]


def assert_right(found: tuple[mx.array, mx.array | None], given: Case) -> None:
    """No further from float64 than plain operations are in that dtype, but for rounding; NaN and 0
    where they belong."""
    exact, other = truth(given), plain(given)
    usual = np.isfinite(exact.logps)
    rounding = ROUNDING[given.products.dtype]
    for one, two, three, per_value in (
        (found[0], exact.logps, other.logps, ROUNDING[mx.float32]),
        (found[1], exact.slope, other.slope, rounding),
    ):
        if one is None:
            continue
        values = np.array(one.astype(mx.float32), np.float64)
        np.testing.assert_array_equal(np.isnan(values[~usual]), np.isnan(two[~usual]))
        size = np.abs(two[usual])
        limit = np.abs(three[usual] - two[usual]).max(initial=0) + 4 * per_value * (1 + size)
        assert (np.abs(values[usual] - two[usual]) <= limit).all()
    quarantined = np.array(given.targets) == -100
    assert not np.array(found[0])[quarantined].any()
    if found[1] is not None:
        assert not np.array(found[1].astype(mx.float32))[quarantined].any()
