"""The Metal host reports planted bugs, accepts correct kernels, and computes what Metal does."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.metal_kernels import LOGSUMEXP, Case, float64, launch_rows, normal
from helpers.planted import BOUNDS, CORRECT, DIVERGENCE, LANGUAGE, RACES, VALUES

import metal_host.launch
from metal_host import MetalError, metal_kernel, missing, stand_in
from metal_host.signature import ATTRIBUTES

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
types = pytest.mark.parametrize("dtype", FLOATS, ids=str)


# --- planted bugs ----------------------------------------------------------------------------


def run_case(case: Case, seeds: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """Return the case's x and the output of its kernel."""
    launch = dict(case.launch)
    x = normal(*launch.pop("shape", (4, 300))).astype(getattr(mx, launch.pop("dtype", "float32")))
    with stand_in(seeds):
        return x, launch_rows(case.source, x, **launch)


titles: dict[str, Any] = {"ids": lambda case: case.title}
BUGS = BOUNDS + RACES + DIVERGENCE + VALUES + LANGUAGE


@pytest.mark.parametrize("case", [c for c in BUGS if c.kind != "wrong-result"], **titles)
def test_a_bug_is_reported_in_any_order(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal_host.launch, "MAX_ACCESSES", 1_000_000)
    for seed in (0, 1, 7):
        with pytest.raises(MetalError) as error:
            run_case(case, (seed,))
        assert case.kind in error.value.kinds, error.value


@pytest.mark.parametrize("case", [c for c in BUGS if c.kind == "wrong-result"] + CORRECT, **titles)
def test_the_remaining_bugs_show_in_the_results(case: Case) -> None:
    x, out = run_case(case, (0, 1, 7))
    if "outputs" not in case.launch:
        exact = float64(x).sum(1) if "buf" in case.source else np.log(np.exp(float64(x)).sum(1))
        assert np.allclose(float64(out), exact, atol=1e-4) == (case.kind is None)


def test_each_seed_is_an_order_of_threads() -> None:
    """Every thread reads out of bounds, so the one that is reported is the first that ran."""
    source = "uint i = thread_position_in_grid.x; out[i] = x[i + 1000];"
    case = Case("", "out-of-bounds", source, {"shape": (3, 64), "threads": 64})
    first = []
    for seed in (0, 1, 2, 3, 3):
        with pytest.raises(MetalError) as error:
            run_case(case, (seed,))
        first.append(str(error.value).split("(")[-1])
    assert first[:2] == ["threadgroup 0 0 0, thread 0)", "threadgroup 2 0 0, thread 63)"]
    assert len(set(first)) == 4
    assert first[3] == first[4]


# --- correct kernels -------------------------------------------------------------------------


@types
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (5, 1000), (2, 4097)], ids=str)
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_log_sum_exp(dtype: mx.Dtype, shape: tuple[int, int], threads: int) -> None:
    x = normal(*shape, scale=8.0).astype(dtype)
    with stand_in():
        out = launch_rows(LOGSUMEXP, x, threads)
    assert np.allclose(float64(out), np.logaddexp.reduce(float64(x), axis=1), rtol=1e-6, atol=1e-6)


def test_log_sum_exp_of_infinities() -> None:
    x = mx.array([[np.inf, 1.0, -np.inf], [-np.inf] * 3, [1e4, 1e4, -1e4]])
    with stand_in():
        out = float64(launch_rows(LOGSUMEXP, x, 32))
    assert np.isnan(out[0])  # inf - inf
    assert out[1] == -np.inf
    assert out[2] == pytest.approx(1e4 + np.log(2))


def test_every_attribute_in_three_dimensions() -> None:
    """In a grid that cuts threadgroups off at every edge."""
    grid, group = (37, 5, 3), (16, 2, 2)
    names = list(ATTRIBUTES)
    source = """
        uint3 p = thread_position_in_grid;
        uint i = (p.z * threads_per_grid.y + p.y) * threads_per_grid.x + p.x;
        device uint* own = out + i * 60;
        own[0] = x[0];
    """
    for k, name in enumerate(names):
        axes = [".x", ".y", ".z"] if ATTRIBUTES[name] == "uint3" else ["", None, None]
        for j, axis in enumerate(axes):
            value = "0" if axis is None else name + axis
            source += f"own[{3 * k + j}] = {value};\n"
    kernel = metal_kernel("attributes", ["x"], ["out"], source)
    (out,) = kernel(
        inputs=[mx.zeros((9,), mx.uint32)],
        grid=grid,
        threadgroup=group,
        output_shapes=[(*grid[::-1], len(names), 3)],
        output_dtypes=[mx.uint32],
    )
    for z, y, x in np.ndindex(*grid[::-1]):
        expected = attributes(np.array([x, y, z]), np.array(grid), np.array(group))
        for k, name in enumerate(names):
            value = np.resize(np.append(expected[name], [0, 0]), 3)
            assert np.array_equal(np.array(out[z, y, x, k]), value), (name, x, y, z)


def attributes(p: np.ndarray, grid: np.ndarray, full: np.ndarray) -> dict[str, np.ndarray | int]:
    """Return the attributes of the thread at position p, by the Metal specification."""
    group, inside = p // full, p % full
    size = np.minimum(full, grid - group * full)
    index = int((inside[2] * size[1] + inside[1]) * size[0] + inside[0])
    threads, full_threads = int(size.prod()), int(full.prod())
    return {
        "dispatch_quadgroups_per_threadgroup": -(-full_threads // 4),
        "dispatch_simdgroups_per_threadgroup": -(-full_threads // 32),
        "dispatch_threads_per_threadgroup": full,
        "grid_origin": np.zeros(3),
        "grid_size": grid,
        "quadgroup_index_in_threadgroup": index // 4,
        "quadgroups_per_threadgroup": -(-threads // 4),
        "simdgroup_index_in_threadgroup": index // 32,
        "simdgroups_per_threadgroup": -(-threads // 32),
        "thread_execution_width": 32,
        "thread_index_in_quadgroup": index % 4,
        "thread_index_in_simdgroup": index % 32,
        "thread_index_in_threadgroup": index,
        "thread_position_in_grid": p,
        "thread_position_in_threadgroup": inside,
        "threadgroup_position_in_grid": group,
        "threadgroups_per_grid": -(-grid // full),
        "threads_per_grid": grid,
        "threads_per_simdgroup": 32,
        "threads_per_threadgroup": size,
    }
