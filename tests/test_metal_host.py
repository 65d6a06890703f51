"""The Metal host: planted bugs are found, right kernels are not blamed, results are Metal's."""

import metal_host.launch
import mlx.core as mx
import numpy as np
import pytest
from metal_host import MetalError, metal_kernel, missing, stand_in
from metal_host.signature import ATTRIBUTES
from planted import BOUNDS, LANGUAGE, LOGSUMEXP, MEETING, RACES, RIGHT, SUM, VALUES, Case

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
types = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def by_rows(source: str, x: mx.array, threads: int = 128, outputs: int | None = None) -> mx.array:
    """What a kernel with an input x and an output of float32 makes of x, a threadgroup a row."""
    kernel = mx.fast.metal_kernel("rows", ["x"], ["out"], source)
    (out,) = kernel(
        inputs=[x],
        template=[("T", x.dtype)],
        grid=(len(x) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(outputs or len(x),)],
        output_dtypes=[mx.float32],
    )
    return out


# --- planted bugs ----------------------------------------------------------------------------


def run_case(case: Case, seeds: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """The case's x, and what its kernel makes of it."""
    launch = dict(case.launch)
    x = normal(*launch.pop("shape", (4, 300))).astype(getattr(mx, launch.pop("dtype", "float32")))
    with stand_in(seeds):
        return x, by_rows(case.source, x, **launch)


titles = {"ids": lambda case: case.title}
BUGS = BOUNDS + RACES + MEETING + VALUES + LANGUAGE


@pytest.mark.parametrize("case", [c for c in BUGS if c.found != "wrong-result"], **titles)
def test_a_bug_is_found_in_any_order(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal_host.launch, "MAX_ACCESSES", 1_000_000)
    for seed in (0, 1, 7):
        with pytest.raises(MetalError) as error:
            run_case(case, (seed,))
        assert case.found in error.value.kinds, error.value


@pytest.mark.parametrize("case", [c for c in BUGS if c.found == "wrong-result"] + RIGHT, **titles)
def test_numbers_tell_what_is_left(case: Case) -> None:
    x, out = run_case(case, (0, 1, 7))
    if "outputs" not in case.launch:
        truth = float64(x).sum(1) if "buf" in case.source else np.log(np.exp(float64(x)).sum(1))
        assert np.allclose(float64(out), truth, atol=1e-4) == (case.found is None)


def test_seeds_are_orders() -> None:
    """The first thread that fails is the first that runs."""
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


# --- right kernels ---------------------------------------------------------------------------


@types
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (5, 1000), (2, 4097)], ids=str)
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_log_sum_exp(dtype: mx.Dtype, shape: tuple[int, int], threads: int) -> None:
    x = normal(*shape, scale=8.0).astype(dtype)
    with stand_in():
        out = by_rows(LOGSUMEXP, x, threads)
    assert np.allclose(float64(out), np.logaddexp.reduce(float64(x), axis=1), rtol=1e-6, atol=1e-6)


def test_infinities_are_what_they_are() -> None:
    x = mx.array([[np.inf, 1.0, -np.inf], [-np.inf] * 3, [1e4, 1e4, -1e4]])
    with stand_in():
        out = float64(by_rows(LOGSUMEXP, x, 32))
    assert np.isnan(out[0])  # inf - inf
    assert out[1] == -np.inf
    assert out[2] == pytest.approx(1e4 + np.log(2))


def test_every_attribute_in_a_grid_of_three_dimensions() -> None:
    """Of threadgroups that are cut off at all edges; the truth is worked out anew in NumPy."""
    grid, group = (37, 5, 3), (16, 2, 2)
    names = list(ATTRIBUTES)
    source = """
        uint3 p = thread_position_in_grid;
        uint i = (p.z * threads_per_grid.y + p.y) * threads_per_grid.x + p.x;
        device uint* mine = out + i * 60;
        mine[0] = x[0];
    """
    for k, name in enumerate(names):
        axes = [".x", ".y", ".z"] if ATTRIBUTES[name] == "uint3" else ["", None, None]
        for j, axis in enumerate(axes):
            value = "0" if axis is None else name + axis
            source += f"mine[{3 * k + j}] = {value};\n"
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
    """What the attributes of the thread at p are, by the Metal specification."""
    group, inside = p // full, p % full
    size = np.minimum(full, grid - group * full)
    index = int((inside[2] * size[1] + inside[1]) * size[0] + inside[0])
    threads, most = int(size.prod()), int(full.prod())
    return {
        "dispatch_quadgroups_per_threadgroup": -(-most // 4),
        "dispatch_simdgroups_per_threadgroup": -(-most // 32),
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


# --- arrays in and out -----------------------------------------------------------------------


def test_a_strided_input_is_made_contiguous() -> None:
    x = normal(300, 4).T
    with stand_in():
        assert np.allclose(float64(by_rows(SUM, x)), float64(x).sum(1), atol=1e-4)


def test_strides_tell_where_elements_are() -> None:
    """An input that need not be contiguous is not: a kernel that thinks so is wrong."""
    source = "uint3 p = thread_position_in_grid; out[p.y * x_shape[1] + p.x] = x[{}];"
    x = normal(6, 5)
    call = {
        "inputs": [x],
        "grid": (5, 6, 1),
        "threadgroup": (5, 2, 1),
        "output_shapes": [x.shape],
        "output_dtypes": [x.dtype],
    }
    for index, right in {
        "p.y * x_strides[0] + p.x * x_strides[1]": True,
        "p.y * 5 + p.x": False,
    }.items():
        kernel = metal_kernel("strided", ["x"], ["out"], source.format(index), "", False)
        assert mx.array_equal(kernel(**call)[0], x).item() == right


def test_scalars_several_outputs_and_init_value() -> None:
    source = (
        "uint i = thread_position_in_grid.x; twice[i] = bfloat(x[i] * s); if (i < 3) some[i] += n;"
    )
    kernel = metal_kernel("several", ["x", "s", "n"], ["twice", "some"], source)
    twice, some = kernel(
        inputs=[mx.arange(8, dtype=mx.float16), 2.0, 5],
        grid=(8, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(2, 4), (4,)],
        output_dtypes=[mx.bfloat16, mx.int32],
        init_value=1,
        stream=mx.cpu,
    )
    assert twice.tolist() == [[0, 2, 4, 6], [8, 10, 12, 14]]
    assert (twice.dtype, some.tolist()) == (mx.bfloat16, [6, 6, 6, 1])


def test_wrong_calls() -> None:
    kernel = metal_kernel("k", ["x"], ["out"], "out[0] = x[0];")
    call = {
        "grid": (1, 1, 1),
        "threadgroup": (1, 1, 1),
        "output_shapes": [(1,)],
        "output_dtypes": [mx.float32],
    }
    with pytest.raises(ValueError, match="expected 1 inputs"):
        kernel(inputs=[], **call)
    with pytest.raises(ValueError, match="at most 1024 threads"):
        kernel(inputs=[1.0], **{**call, "threadgroup": (64, 32, 1)})
    with pytest.raises(ValueError, match="no threads"):
        kernel(inputs=[1.0], **{**call, "grid": (0, 1, 1)})
    with pytest.raises(ValueError, match="complex64"):
        kernel(inputs=[mx.array(1j)], **call)
    with pytest.raises(NotImplementedError, match="atomic"):
        metal_kernel("k", ["x"], ["out"], "", atomic_outputs=True)


def test_a_problem_names_its_line_and_thread() -> None:
    header = "#include <metal_stdlib>\ninline float at(const device float* x, uint i) {\n\n"
    header += "  return x[i];\n}"
    kernel = metal_kernel(
        "k", ["x"], ["out"], "uint i = thread_position_in_grid.x;\nout[i] = at(x, i + 1);", header
    )
    with pytest.raises(MetalError) as error:
        kernel(
            inputs=[mx.zeros((8,))],
            grid=(8, 1, 1),
            threadgroup=(4, 1, 1),
            output_shapes=[(8,)],
            output_dtypes=[mx.float32],
        )
    assert "header:4" in str(error.value)
    assert "read of buffer 'x' at element 8 of 8" in str(error.value)


@pytest.mark.parametrize("writer", range(3))
def test_threadgroups_do_not_wait_for_each_other(writer: int) -> None:
    """One writes what all have read: nothing can make it right, be it the last one."""
    source = f"""
        uint group = threadgroup_position_in_grid.x;
        seen[group] = sum[0];
        if (group == {writer}) sum[0] += x;
    """
    kernel = metal_kernel("across", ["x"], ["sum", "seen"], source)
    with pytest.raises(MetalError, match="by another threadgroup") as error, stand_in((0,)):
        kernel(
            inputs=[1.0],
            grid=(3, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,), (3,)],
            output_dtypes=[mx.float32] * 2,
            init_value=0,
        )
    assert error.value.kinds == {"race"}


def test_the_outputs_of_all_orders_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit. Whatever makes them differ is found earlier, as far as is known."""
    outputs = iter([[np.array([1, 2])], [np.array([1, 3])]])
    monkeypatch.setattr(metal_host.launch, "_run_once", lambda *_: next(outputs))
    with pytest.raises(MetalError, match="differs from element 1 on") as error, stand_in((0, 1)):
        by_rows(SUM, normal(1, 2))
    assert error.value.kinds == {"order-dependent"}


# --- in place of MLX's -----------------------------------------------------------------------


def test_the_stand_in_is_taken_away_again() -> None:
    before = mx.fast.metal_kernel
    with stand_in():
        assert mx.fast.metal_kernel is metal_kernel
    assert mx.fast.metal_kernel is before


def test_compiled_functions_and_gradients() -> None:
    @mx.custom_function
    def log_sum_exp(x: mx.array) -> mx.array:
        return by_rows(LOGSUMEXP, x, 32)

    @log_sum_exp.vjp
    def gradient(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return cotangent[:, None] * mx.softmax(x, axis=1)

    x = normal(3, 50)
    with stand_in(seeds=(0,)):
        step = mx.compile(mx.value_and_grad(lambda x: log_sum_exp(2 * x).sum()))
        value, grad = step(x)
    e = np.exp(2 * float64(x))
    assert value.item() == pytest.approx(np.log(e.sum(1)).sum(), rel=1e-6)
    assert np.allclose(float64(grad), 2 * e / e.sum(1, keepdims=True), atol=1e-6)


def test_a_kernel_has_no_gradient_of_its_own() -> None:
    """As with MLX; zero would be the worst answer."""
    with stand_in(seeds=(0,)), pytest.raises(ValueError, match="no gradient"):
        mx.eval(mx.grad(lambda x: by_rows(SUM, x).sum())(normal(2, 8)))
