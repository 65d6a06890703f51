"""The kernel through its own launcher: on the GPU, or executed on the CPU by metal_host."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.devices import on_gpu, on_stand_in_cuda, on_stand_in_gpu
from helpers.gradients import greatest_difference, run
from helpers.kernel_mutants import MUTANTS
from helpers.logit_rows import DTYPES, SHAPES, Case, assert_correct, case, hard_rows
from helpers.tiny import tiny_model
from helpers.tiny import token_pair as pair
from metal_host import MetalError
from metal_host.address_spaces import address_spaces
from metal_host.cuda import cuda_errors, cuda_signature
from metal_host.signature import signature
from mlx.utils import tree_flatten

from mlx_simpo import LoRAConfig, ObjectiveConfig, TrainConfig
from mlx_simpo.engine.choice import REFERENCE, shared_prefix_engine
from mlx_simpo.engine.figures import GPU
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
from mlx_simpo.errors import SimPOError
from mlx_simpo.kernels import choice, launch
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.training.step import GradientFunction, collate_step, step_gradients

KERNEL = Path(launch.__file__).with_name("response_logps.metal")


@pytest.fixture
def gpu() -> Iterator[None]:
    with on_gpu():
        yield


# Where the kernel runs: the machine's GPU (or Metal's text on the CPU), and CUDA's text on the CPU.
BACKENDS = {"GPU": on_gpu, "CUDA": on_stand_in_cuda}


@pytest.fixture
def stand_in_gpu() -> Iterator[None]:
    """For tests that a real GPU cannot run: of wrong kernels, and of float32 matrix products, whose
    factors a GPU may round."""
    with on_stand_in_gpu():
        yield


def launched(inputs: Case, *, gradient: bool = True) -> tuple[mx.array, mx.array | None]:
    return launch.kernel_response_logps(
        inputs.raw_logits,
        inputs.targets,
        scale=inputs.scale,
        softcap=inputs.softcap,
        gradient=gradient,
    )


def assert_same(actual: Sequence[mx.array | None], expected: Sequence[mx.array | None]) -> None:
    """Check that values and gradients are there and the same; NaN equals NaN."""
    for one, other in zip(actual, expected, strict=True):
        assert one is not None
        assert other is not None
        assert mx.array_equal(one, other, equal_nan=True)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.3, 5.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("backend", "size", "rows"),
    [*(("GPU", *shape) for shape in SHAPES), ("CUDA", 33, 7), ("CUDA", 1030, 7), ("CUDA", 9001, 2)],
)
def test_values_and_gradients(
    backend: str, size: int, rows: int, dtype: mx.Dtype, scale: float, softcap: float
) -> None:
    inputs = case(size, rows, dtype, scale, softcap)
    with BACKENDS[backend]():
        outputs = launched(inputs)
        only_values = launched(inputs, gradient=False)
    assert outputs[0].dtype == mx.float32
    assert outputs[1] is not None
    assert outputs[1].dtype == dtype
    assert_correct(outputs, inputs)
    assert only_values[1] is None
    assert mx.array_equal(only_values[0], outputs[0], equal_nan=True)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 30.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "size"), [("GPU", 2), ("GPU", 1027), ("CUDA", 1027)])
def test_hard_rows(backend: str, size: int, dtype: mx.Dtype, scale: float, softcap: float) -> None:
    inputs = hard_rows(size, dtype, scale, softcap)
    with BACKENDS[backend]():
        assert_correct(launched(inputs), inputs)


def test_the_same_bits_again(gpu: None) -> None:
    inputs = case(9001)
    assert_same(launched(inputs), launched(inputs))


def test_rows_of_a_larger_array(gpu: None) -> None:
    """A slice is not contiguous: its rows are further apart than they are long."""
    inputs = case(33)
    wide = mx.concatenate([inputs.raw_logits, inputs.raw_logits], axis=1)[:, :33]
    assert_same(launched(inputs._replace(raw_logits=wide)), launched(inputs))


def test_a_wrong_shape_or_dtype_is_an_error() -> None:
    inputs = case(33)
    for raw_logits, targets, words in (
        (inputs.raw_logits.astype(mx.int32), inputs.targets, "logits are .*int32"),
        (inputs.raw_logits, inputs.targets.astype(mx.int64), "targets .*int64"),
        (mx.zeros((1025, 2)), mx.zeros((1025,), mx.int32), "1025 rows of 2 logits are too many"),
        (mx.zeros((2, 2**30)), mx.zeros((2,), mx.int32), "2 rows of 1073741824 logits are too"),
    ):
        with pytest.raises(ValueError, match=words):
            launched(inputs._replace(raw_logits=raw_logits, targets=targets))


def test_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows and logits as a launch takes; threads in whole simdgroups, one for 16 bytes of a
    row while a threadgroup has so many. Nothing is evaluated."""
    launches = []
    monkeypatch.setattr(
        launch, "_kernel", lambda *_: lambda **call: launches.append(call) or [0, 1]
    )
    for rows, size, dtype, threads in (
        (1024, 2, mx.float32, 32),
        (1, 2**31 - 1, mx.bfloat16, 1024),
        (3, 128, mx.float32, 32),
        (3, 129, mx.float32, 64),
        (3, 1027, mx.float32, 288),
        (3, 1030, mx.float32, 288),
        (3, 1030, mx.float16, 160),
        (3, 3968, mx.float32, 992),
        (3, 3969, mx.float32, 1024),
        (3, 4097, mx.float32, 1024),
    ):
        outputs = launched(Case(mx.zeros((rows, size), dtype), mx.zeros((rows,), mx.int32), 2, 3))
        assert outputs == (0, 1)
        assert launches[-1]["grid"] == (threads, rows, 1)
        assert launches[-1]["threadgroup"] == (threads, 1, 1)
        assert launches[-1]["output_shapes"] == [(rows,), (rows, size)]
        assert launches[-1]["output_dtypes"] == [mx.float32, dtype]
        assert launches[-1]["inputs"][2].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(1, 2), (3, 33), (9, 1027)])
def test_address_spaces(rows: int, size: int, gradient: bool) -> None:
    """MLX puts small inputs into ``constant``; a pointer to ``device`` would not compile there."""
    definition, kernel_signature = signed("Metal", rows, size, gradient)
    assert address_spaces(kernel_signature, definition["source"], definition["header"]) == ""


@pytest.mark.parametrize("gradient", [False, True])
def test_the_cuda_text_is_cuda(gradient: bool) -> None:
    """Of the device's functions alone, which g++ cannot tell from the host's."""
    definition, kernel_signature = signed("CUDA", 3, 33, gradient)
    source, header = definition["source"], definition["header"]
    assert cuda_errors(kernel_signature, source, header) == ""
    on_host = header.replace("METAL_FUNC __device__", "METAL_FUNC")
    assert "no matching function" in cuda_errors(kernel_signature, source, on_host)


def signed(backend: str, rows: int, size: int, gradient: bool) -> tuple[dict[str, Any], Any]:
    """Return what the kernel is defined by, and its signature for bfloat16."""
    definition = launch.kernel_definition(backend, gradient=gradient)
    function = cuda_signature if backend == "CUDA" else signature
    return definition, function(
        definition["name"],
        definition["source"],
        definition["input_names"],
        [(mx.bfloat16, (rows, size)), (mx.int32, (rows,)), (mx.float32, (2,))],
        definition["output_names"],
        [mx.float32, mx.bfloat16][: 1 + gradient],
        [("T", mx.bfloat16)],
    )


# --- a wrong kernel --------------------------------------------------------------------------


def replace_in_kernel(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch a kernel from now on whose text has ``new`` where ``old`` was, which occurs once."""
    text = KERNEL.read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tmp_path / KERNEL.name).write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(launch, "_FOLDER", tmp_path)


def test_a_kernel_that_does_not_compile_is_an_error(
    stand_in_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_in_kernel("return {max_value,", "return {max_valve,", tmp_path, monkeypatch)
    with pytest.raises(SimPOError, match=r"(?s)the Metal kernel .*does not run.*max_valve"):
        choice.choose_implementation()


# --- mutants ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new", "kinds"), MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_shows_in_its_own_way(
    old: str,
    new: str,
    kinds: set[str],
    stand_in_gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mutant that fails for another reason, such as a typing mistake, would prove nothing."""
    replace_in_kernel(old, new, tmp_path, monkeypatch)
    inputs = case(1027)
    if kinds:
        with pytest.raises(MetalError) as error:
            launched(inputs)
        assert error.value.kinds == kinds, error.value
    else:
        outputs = launched(inputs)
        with pytest.raises(AssertionError):
            assert_correct(outputs, inputs)


# --- a whole step ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type",
    [
        ("llama", {}),
        ("gemma2", {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 0.25, "layer_norm_eps": 1e-5}),
    ],
)
def test_a_step_through_the_kernel_equals_the_reference(
    model_type: tuple[str, dict[str, Any]], stand_in_gpu: None
) -> None:
    model = tiny_model(model_type[0], **model_type[1])
    attach_lora(model, LoRAConfig(rank=4), seed=0)
    pairs = [pair(12, 5, 7), pair(9, 3, 8)]
    kernel = shared_prefix_engine(model, choice.choose_implementation("kernel"))
    expected = run(model, REFERENCE, pairs)
    for checkpointing in (nullcontext, gradient_checkpointing):
        with checkpointing(model):
            assert greatest_difference(run(model, kernel, pairs), expected) < 1e-4


def test_micro_batches_and_chunks_through_the_kernel(stand_in_gpu: None) -> None:
    """One optimizer step of SimPO: pair by pair in small chunks, and all pairs at once."""
    model = tiny_model()
    attach_lora(model, LoRAConfig(rank=4), seed=0)
    pairs = [pair(12, 5, 90), pair(9, 70, 8), pair(4, 1, 1)]
    gradients, implementation = [], choice.choose_implementation("kernel")
    in_chunks = replace(GPU, chunk_logits=1)  # of 64 rows, fewer than a pair scores
    for engine, size in (
        (REFERENCE, 3),
        (shared_prefix_engine(model, implementation, figures=in_chunks), 1),
    ):
        step = collate_step(pairs, engine, TrainConfig(batch_size=size))
        function = GradientFunction(model, asdict(ObjectiveConfig()), engine, compiled=False)
        _, gradient = step_gradients(function, step)
        gradients.append({name: np.array(value) for name, value in tree_flatten(gradient)})
    assert greatest_difference(*gradients) < 1e-4
