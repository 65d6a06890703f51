"""Whether MLX has a fused gradient here, and the comparison of its attention with ours."""

import io
import math
import re

import mlx.core as mx
import numpy as np
import pytest
from helpers import fused
from helpers.devices import on_cpu
from helpers.fused import MARK, Defect, fused_attention_stand_in

from mlx_simpo.engine import fused_attention
from mlx_simpo.engine.attention_shapes import AttentionShape
from mlx_simpo.engine.fused_attention import (
    GRADIENT_LENGTHS,
    TOLERANCES,
    check_forward_attention,
    check_fused_attention,
    has_fused_gradient,
    primitive_count,
)

DTYPES = list(TOLERANCES)
SHAPE = AttentionShape(heads=4, kv_heads=2, head_size=8, value_size=8, dtype=mx.float32, scale=0.3)


# --- whether there is one ----------------------------------------------------------------------


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_has_none(dtype: mx.Dtype, head_size: int) -> None:
    with on_cpu():
        shape = SHAPE._replace(head_size=head_size, value_size=head_size, dtype=dtype)
        assert not has_fused_gradient(shape)
        assert not has_fused_gradient(shape, (64, 96), None)


def test_it_is_seen_in_the_graph() -> None:
    with fused_attention_stand_in(head_sizes=(8,)) as stand_in:
        assert has_fused_gradient(SHAPE)
        assert set(stand_in.forward) == {(*GRADIENT_LENGTHS[0], "causal")}  # one length is enough
        assert has_fused_gradient(SHAPE, (9, 40), None)
        assert not has_fused_gradient(SHAPE, (8, 40), None)  # too few queries
        assert not has_fused_gradient(SHAPE._replace(head_size=7))
        assert not has_fused_gradient(SHAPE._replace(sinks=True))
        assert not has_fused_gradient(SHAPE._replace(mask="other"))
        assert has_fused_gradient(SHAPE._replace(mask="window"))  # its masks are causal if short
        asked = len(stand_in.forward)
        assert has_fused_gradient(SHAPE, (9, 40), None)
        assert len(stand_in.forward) == asked  # remembered


def test_any_of_the_lengths_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX may take more queries only, or as many as keys."""
    fewest = {queries for queries, _ in GRADIENT_LENGTHS}
    for least, expected in ((max(fewest), True), (max(fewest) + 1, False)):
        monkeypatch.setattr(fused, "LEAST_QUERIES", least)
        with fused_attention_stand_in():
            assert has_fused_gradient(SHAPE) == expected


def test_what_mlx_refuses_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of another number of heads than keys, for instance."""
    monkeypatch.setattr(fused_attention, "FUSED_GRADIENT", "Matmul")
    fused_attention.forget_checks()
    assert has_fused_gradient(SHAPE)
    assert not has_fused_gradient(SHAPE._replace(heads=3))  # not a multiple of 2
    fused_attention.forget_checks()


def test_asking_within_a_gradient_and_a_compiled_function_leaves_both_alone() -> None:
    def cubes(x: mx.array) -> mx.array:
        assert has_fused_gradient(SHAPE)
        assert check_fused_attention(SHAPE).passed
        return (x**3).sum()

    for function in (mx.grad(cubes), mx.compile(mx.grad(cubes))):
        with fused_attention_stand_in():
            np.testing.assert_allclose(function(mx.array([1.0, 2.0])), [3, 12])


def test_primitives_are_counted_by_their_whole_name() -> None:
    x = mx.ones(3)
    graph = mx.exp(mx.exp(x)) + mx.log(x)
    assert primitive_count("Exp", graph) == 2
    assert primitive_count("Ex", graph) == 0
    assert primitive_count("Exp", graph, mx.exp(x)) == 3
    text = io.StringIO()
    mx.export_to_dot(text, mx.arctanh(x))
    assert f'label ="{MARK}"' in text.getvalue()


# --- whether it is right -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes", "scale"),
    [(4, 2, (8, 8), 0.3), (9, 3, (64, 64), 0.125), (6, 1, (24, 16), 1.0), (2, 2, (80, 80), 0.01)],
)
def test_mlx_on_the_cpu_agrees(
    heads: int, kv_heads: int, sizes: tuple[int, int], scale: float, dtype: mx.Dtype
) -> None:
    """Values and gradients; far within the tolerance, which must leave room for a GPU."""
    with on_cpu():
        shape = AttentionShape(heads, kv_heads, *sizes, dtype, scale)
        for agreement in (check_fused_attention(shape), check_forward_attention(shape)):
            assert agreement.passed
            assert agreement.failure is None
            least = 2e-8 if dtype == mx.float32 else TOLERANCES[dtype] / 20
            error = max(agreement.value_error, agreement.gradient_error)
            assert least < error < TOLERANCES[dtype] / 2 or error == 0
            assert agreement.name == f"MLX's attention with head size {sizes[0]}"
            assert agreement.dtype == str(dtype).removeprefix("mlx.core.")
        assert check_fused_attention(shape).gradient_error > least  # two ways to compute it


@pytest.mark.parametrize(
    ("defect", "where"),
    [
        (fused.wrong_keys, "^the gradient of keys with "),
        (fused.wrong_with_fewer_queries, "41 queries, 107 keys and |128 queries, 200 keys and "),
        (fused.not_a_number, "^the gradient of values with "),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_gradient_is_noticed(defect: Defect, where: str, dtype: mx.Dtype) -> None:
    with fused_attention_stand_in(defect):
        agreement = check_fused_attention(SHAPE._replace(dtype=dtype))
        assert not agreement.passed
        assert agreement.value_error <= TOLERANCES[dtype]
        assert not agreement.gradient_error <= 0.05
        assert re.search(where, agreement.where)
        # In evaluation nobody asks for a gradient.
        assert check_forward_attention(SHAPE._replace(dtype=dtype)).passed


def test_a_gradient_that_is_wrong_in_one_dtype() -> None:
    with fused_attention_stand_in(fused.wrong_in_bfloat16):
        passed = [check_fused_attention(SHAPE._replace(dtype=dtype)).passed for dtype in DTYPES]
    assert dict(zip(DTYPES, passed, strict=True)) == {
        mx.float32: True,
        mx.float16: True,
        mx.bfloat16: False,
    }


def test_a_kernel_that_does_not_run() -> None:
    with fused_attention_stand_in(fused.failing):
        agreement = check_fused_attention(SHAPE)
    assert not agreement.passed
    assert agreement.failure == (
        "does not run here ([metal::Device] Unable to load kernel sdpa_vjp_ds_64)"
    )


@pytest.mark.parametrize("kind", [None, "causal", "window"])
def test_a_wrong_value_is_noticed(kind: str | None) -> None:
    """With each kind of mask alone."""

    def wrong(value: mx.array, mask: object) -> mx.array:
        is_kind = isinstance(mask, mx.array) if kind == "window" else mask is kind
        return value * 1.1 if is_kind else value

    with fused_attention_stand_in(value_defect=wrong):
        agreement = check_forward_attention(SHAPE)
        assert agreement.value_error == pytest.approx(0.1, rel=1e-3)
        masks = {None: "no mask", "causal": "the causal mask", "window": "a sliding window"}
        assert agreement.where.startswith("the value with ")
        assert agreement.where.endswith(f" and {masks[kind]}")
        # While training, sliding windows take the blocks.
        assert check_fused_attention(SHAPE).passed == (kind == "window")


def test_few_queries_are_compared_in_evaluation() -> None:
    """Metal has other kernels for them."""

    def wrong(value: mx.array, mask: object) -> mx.array:
        return value * 1.1 if value.shape[2] == 1 else value

    with fused_attention_stand_in(value_defect=wrong):
        assert "1 queries, 60 keys" in check_forward_attention(SHAPE).where


def test_what_is_compared() -> None:
    """As many queries as keys and fewer, no mask and a causal one; inputs of both signs in the
    shape's dtype, laid out as a projection leaves them; queries that share keys as the model's."""
    assert {new == total for new, total in GRADIENT_LENGTHS} == {True, False}
    seen: list[tuple] = []

    def spying(gradients: list, queries: mx.array, keys: mx.array, mask: object) -> list:
        seen.append((queries, keys, mask))
        return gradients

    shape = SHAPE._replace(heads=32, kv_heads=8, dtype=mx.bfloat16)
    with fused_attention_stand_in(spying):
        assert check_fused_attention(shape).passed
    lengths = {(q.shape[2], k.shape[2], mask) for q, k, mask in seen}
    assert lengths == {(*pair, mask) for pair in GRADIENT_LENGTHS for mask in (None, "causal")}
    for queries, keys, _ in seen:
        assert queries.dtype == keys.dtype == mx.bfloat16
        assert queries.shape[1] // keys.shape[1] == 4
        assert keys.shape[1] == 2  # some heads are enough
        assert (queries < 0).any().item()
        scores = np.array((queries.astype(mx.float32)).square().mean()) * 0.3**2 * 8
        assert math.sqrt(scores) == pytest.approx(1.5, rel=0.1)


def test_it_is_done_once_per_shape_and_device() -> None:
    with fused_attention_stand_in() as stand_in:
        first = check_fused_attention(SHAPE)
        calls = len(stand_in.backward)
        # The mask of the layer and its sinks are no part of what is compared.
        assert check_fused_attention(SHAPE._replace(mask="window")) is first
        assert len(stand_in.backward) == calls
        check_fused_attention(SHAPE._replace(head_size=16))
        assert len(stand_in.backward) == 2 * calls
        fused_attention.forget_checks()
        check_fused_attention(SHAPE)
        assert len(stand_in.backward) == 3 * calls
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
            check_fused_attention(SHAPE)
        assert len(stand_in.backward) == 4 * calls
