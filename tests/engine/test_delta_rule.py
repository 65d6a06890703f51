"""The gated delta rule in chunks, against the recurrence and its gradient in float64."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.gated_delta import gated_delta_ops

from mlx_simpo.engine.delta_rule import CHUNK, chunked_delta_rule, inverse

NAMES = ("outputs", "state", "d q", "d k", "d v", "d g", "d beta", "d state")
HEADS = {"equal heads": (2, 2), "grouped heads": (2, 6)}
Case = tuple[list[np.ndarray], list[np.ndarray]]


def make_case(
    tokens: int,
    heads: tuple[int, int] = (2, 4),
    *,
    vector: bool = False,
    decay: tuple[float, float] = (0.0, 1.0),
    most_beta: float = 1.0,
    batch: int = 2,
    sizes: tuple[int, int] = (16, 12),
    seed: int = 0,
) -> Case:
    """Inputs in float32 with keys and queries normalized as the models do, and cotangents."""
    rng = np.random.default_rng(seed)
    (key_heads, value_heads), (dk, dv) = heads, sizes
    q, k = rng.normal(size=(2, batch, tokens, key_heads, dk))
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    g = rng.uniform(*decay, size=(batch, tokens, value_heads, *([dk] if vector else [])))
    inputs = [
        q / np.sqrt(dk),
        k,
        rng.normal(size=(batch, tokens, value_heads, dv)),
        g,
        rng.uniform(0, most_beta, size=(batch, tokens, value_heads)),
        rng.normal(size=(batch, value_heads, dv, dk)),
    ]
    cotangents = [rng.normal(size=inputs[2].shape), rng.normal(size=inputs[5].shape)]
    return tuple([a.astype(np.float32) for a in arrays] for arrays in (inputs, cotangents))  # type: ignore


def recurrence(inputs: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Outputs, last state and the gradients of the six inputs, in float64, token by token."""
    q, k, v, g, beta, state = (a.astype(np.float64) for a in inputs)
    d_out, d_state = (a.astype(np.float64) for a in cotangents)
    group = v.shape[2] // k.shape[2]
    wide_q, wide_k = (np.repeat(a, group, axis=2) for a in (q, k))
    decay = g[..., None, None] if g.ndim == 3 else g[..., None, :]
    saved, out = [], np.zeros(v.shape)
    for t in range(v.shape[1]):
        faded = state * decay[:, t]
        error = v[:, t] - np.einsum("bhvk,bhk->bhv", faded, wide_k[:, t])
        saved.append((state, faded, error))
        state = faded + np.einsum("bh,bhv,bhk->bhvk", beta[:, t], error, wide_k[:, t])
        out[:, t] = np.einsum("bhvk,bhk->bhv", state, wide_q[:, t])
    last, after = state, state
    d_q, d_k, d_v, d_beta = (np.zeros(a.shape) for a in (wide_q, wide_k, v, beta))
    d_g = np.zeros(g.shape)
    for t in reversed(range(v.shape[1])):
        before, faded, error = saved[t]
        d_state = d_state + np.einsum("bhv,bhk->bhvk", d_out[:, t], wide_q[:, t])
        d_q[:, t] = np.einsum("bhvk,bhv->bhk", after, d_out[:, t])
        d_update = np.einsum("bhvk,bhk->bhv", d_state, wide_k[:, t])
        d_error = beta[:, t, :, None] * d_update
        d_beta[:, t] = (d_update * error).sum(-1)
        d_v[:, t] = d_error
        d_k[:, t] = np.einsum("bhvk,bh,bhv->bhk", d_state, beta[:, t], error)
        d_k[:, t] -= np.einsum("bhvk,bhv->bhk", faded, d_error)
        d_faded = d_state - np.einsum("bhv,bhk->bhvk", d_error, wide_k[:, t])
        d_g[:, t] = (d_faded * before).sum(axis=(-1, -2) if g.ndim == 3 else -2)
        d_state, after = d_faded * decay[:, t], before
    d_q, d_k = (a.reshape(*k.shape[:3], group, -1).sum(axis=3) for a in (d_q, d_k))
    return [out, last, d_q, d_k, d_v, d_g, d_beta, d_state]


def results(rule: Callable, inputs: Sequence, cotangents: Sequence) -> list[mx.array]:
    values, gradients = mx.vjp(
        rule, [mx.array(a) for a in inputs], [mx.array(a) for a in cotangents]
    )
    return [*values, *gradients]


def errors(rule: Callable, case: Case) -> dict[str, float]:
    """The largest difference from the recurrence, relative to the largest entry, by name."""
    pairs = zip(NAMES, results(rule, *case), recurrence(*case), strict=True)
    return {name: float(np.abs(a - b).max() / np.abs(b).max()) for name, a, b in pairs}


def assert_exact(case: Case) -> None:
    assert max(errors(chunked_delta_rule, case).values()) < 1e-5


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("tokens", [1, 2, 20, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 8])
def test_equals_the_recurrence(tokens: int, heads: tuple[int, int], *, vector: bool) -> None:
    assert_exact(make_case(tokens, heads, vector=vector))


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("most_beta", [1.0, 2.0])
@pytest.mark.parametrize("decay", [(1.0, 1.0), (0.97, 1.0), (0.3, 0.5), (0.0, 1e-3)])
def test_under_strong_and_weak_decay(
    decay: tuple[float, float], most_beta: float, *, vector: bool
) -> None:
    assert_exact(make_case(150, decay=decay, most_beta=most_beta, vector=vector))


@pytest.mark.parametrize("vector", [False, True])
def test_over_2000_tokens(*, vector: bool) -> None:
    assert_exact(make_case(2000, (1, 2), batch=1, decay=(0.9, 1.0), vector=vector))


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("least", [0.0, 1e-45, 1e-38, 1e-20])
def test_decays_that_are_or_become_zero(least: float, *, vector: bool) -> None:
    """Neither a quotient nor a logarithm: the gradient of a decay of 0 is not 0."""
    case = make_case(100, vector=vector)
    decays = case[0][3]
    decays[np.random.default_rng(1).random(decays.shape) < 0.3] = least
    decays[:, 40:44] = least  # products that underflow
    assert_exact(case)
    d_g = results(chunked_delta_rule, *case)[5]
    assert np.abs(np.array(d_g)[decays == np.float32(least)]).max() > 0.1


@pytest.mark.parametrize("vector", [False, True])
def test_keys_that_are_all_the_same(*, vector: bool) -> None:
    """As of a token that is repeated: powers of the triangular matrix would reach 1e17."""
    case = make_case(3 * CHUNK, vector=vector, decay=(1.0, 1.0))
    case[0][1][:] = case[0][1][:, :1]
    case[0][4][:] = 1.0
    assert_exact(case)


@settings(max_examples=15)
@given(st.integers(1, 150), st.integers(1, 150), st.booleans())
def test_a_sequence_may_be_cut_anywhere(first: int, second: int, vector: bool) -> None:
    """The state after some tokens is all that the others need: how a prefix is shared."""
    inputs, _ = make_case(first + second, (1, 2), vector=vector, batch=1, sizes=(8, 4))
    whole = chunked_delta_rule(*map(mx.array, inputs))  # type: ignore[call-arg]

    def part(some: slice, state: mx.array) -> tuple[mx.array, mx.array]:
        q, k, v, g, beta = (mx.array(a[:, some]) for a in inputs[:5])
        return chunked_delta_rule(q, k, v, g, beta, state)

    one, state = part(slice(first), mx.array(inputs[5]))
    two, state = part(slice(first, None), state)
    np.testing.assert_allclose(mx.concatenate([one, two], axis=1), whole[0], atol=2e-6)
    np.testing.assert_allclose(state, whole[1], atol=2e-6)


def test_a_token_does_not_see_those_after_it() -> None:
    (q, k, v, g, beta, state), (d_out, d_state) = make_case(CHUNK)
    d_out[:, 20:], d_state[:] = 0.0, 0.0
    case = [q, k, v, g, beta, state], [d_out, d_state]
    for gradient in results(chunked_delta_rule, *case)[2:7]:
        assert np.abs(np.array(gradient)[:, :20]).max() > 0
        assert (np.array(gradient)[:, 20:] == 0).all()


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_dtypes_are_the_loops_and_rounding_is_no_worse(dtype: mx.Dtype, *, vector: bool) -> None:
    inputs, cotangents = make_case(70, vector=vector)
    q, k, v, g, beta, state = map(mx.array, inputs)
    rounded = [*(a.astype(dtype) for a in (q, k, v)), g, beta.astype(dtype), state]
    d_out, d_state = map(mx.array, cotangents)
    weights = [d_out.astype(dtype), d_state]
    wide = [[np.array(a.astype(mx.float32)) for a in arrays] for arrays in (rounded, weights)]
    expected = recurrence(*wide)
    ours, loop = (results(rule, rounded, weights) for rule in (chunked_delta_rule, gated_delta_ops))
    for name, one, two, exact in zip(NAMES, ours, loop, expected, strict=True):
        assert one.dtype == two.dtype, name
        off, off_loop = (np.abs(np.array(a.astype(mx.float32)) - exact).max() for a in (one, two))
        assert off < 1.1 * off_loop + 1e-5 * np.abs(exact).max(), name


@pytest.mark.parametrize("transform", [mx.checkpoint, mx.compile])
def test_within_a_transformed_function(transform: Callable) -> None:
    case = make_case(100)
    expected = results(chunked_delta_rule, *case)
    for one, two in zip(results(transform(chunked_delta_rule), *case), expected, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_memory_grows_with_the_length_and_is_far_less_than_the_loops() -> None:
    def peak(rule: Callable, tokens: int) -> int:
        case = [list(map(mx.array, part)) for part in make_case(tokens, (2, 2), sizes=(64, 64))]
        mx.eval(case)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(results(rule, *case))
        return mx.get_peak_memory() - before

    assert peak(chunked_delta_rule, 4096) < 4.4 * peak(chunked_delta_rule, 1024)
    assert 5 * peak(chunked_delta_rule, 256) < peak(gated_delta_ops, 256)


@settings(max_examples=20)
@given(st.integers(0, 6), st.floats(0, 2), st.integers(0, 99))
def test_the_inverse_and_its_gradient(power: int, scale: float, seed: int) -> None:
    size = 2**power
    rng = np.random.default_rng(seed)
    lower = np.tril(rng.uniform(-1, 1, size=(3, size, size)), -1) * scale / np.sqrt(size)
    exact = np.linalg.inv(np.eye(size) + lower)
    cotangent = rng.normal(size=lower.shape)
    (actual,), (gradient,) = mx.vjp(
        inverse, [mx.array(lower, mx.float32)], [mx.array(cotangent, mx.float32)]
    )
    np.testing.assert_allclose(actual, exact, atol=1e-5)
    expected = -exact.swapaxes(-1, -2) @ cotangent @ exact.swapaxes(-1, -2)
    np.testing.assert_allclose(np.tril(gradient, -1), np.tril(expected, -1), atol=2e-4)
