"""The Metal kernel itself, executed on this machine (see metal_host), through its own launcher."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.gradients import greatest_difference, run
from helpers.logit_rows import DTYPES, Case, assert_right, case, hard_rows
from helpers.tiny import tiny_model
from helpers.tiny import token_pair as pair
from metal_host import MetalError, missing, stand_in
from metal_host.address_spaces import address_spaces, clang
from metal_host.signature import signature
from mlx.utils import tree_flatten

from mlx_simpo import LoRAConfig, ObjectiveConfig, TrainConfig
from mlx_simpo.engine import token_logps as logps
from mlx_simpo.engine.choice import REFERENCE, shared_prefix_engine
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
from mlx_simpo.errors import SimPOError
from mlx_simpo.kernels import choice, launch
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.training.step import GradientFunction, make_step, step_gradients

KERNEL = Path(launch.__file__).with_name("response_logps.metal")


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launcher believes that it runs on Metal, and its kernels run here."""
    if reason := missing():
        pytest.skip(reason)
    monkeypatch.setattr(launch, "backend", lambda: "Metal")
    monkeypatch.setattr(choice, "backend", lambda: "Metal")
    with stand_in(seeds=(0, 1, 7)):
        launch._kernel.cache_clear()
        choice.check.cache_clear()
        yield
    launch._kernel.cache_clear()
    choice.check.cache_clear()


def launched(given: Case, *, gradient: bool = True) -> tuple[mx.array, mx.array | None]:
    return launch.launch(
        given.products,
        given.targets,
        scale=given.scale,
        softcap=given.softcap,
        gradient=gradient,
    )


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "rows"),
    [
        *[(2, 1), (2, 7), (31, 7), (33, 63), (33, 64), (33, 65)],
        *[(1027, 7), (32_000, 3), (151_936, 1), (262_144, 1)],
    ],
)
def test_matrix(size: int, rows: int, dtype: mx.Dtype, softcap: float, metal: None) -> None:
    given = case(size, rows, dtype, 1 / 16 if rows == 7 else 1.0, softcap)
    found = launched(given)
    assert_right(found, given)
    without = launched(given, gradient=False)
    assert without[1] is None
    assert mx.array_equal(without[0], found[0], equal_nan=True)
    again = launched(given)
    assert all(mx.array_equal(a, b, equal_nan=True) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 33, 1027])
def test_hard_rows(size: int, dtype: mx.Dtype, metal: None) -> None:
    given = hard_rows(size, dtype)
    assert_right(launched(given), given)


def test_rows_of_a_larger_array(metal: None) -> None:
    given = case(33)
    wide = mx.concatenate([given.products, given.products], axis=1)[:, :33]
    for one, two in zip(launched(given._replace(products=wide)), launched(given), strict=True):
        assert mx.array_equal(one, two, equal_nan=True)


def test_the_wrong_shape_or_dtype_is_refused() -> None:
    given = case(33)
    for products, targets, words in (
        (given.products.astype(mx.int32), given.targets, "logits are .*int32"),
        (given.products, given.targets.astype(mx.int64), "targets .*int64"),
        (mx.zeros((1025, 2)), mx.zeros((1025,), mx.int32), "1025 rows of 2 logits"),
    ):
        with pytest.raises(ValueError, match=words):
            launched(given._replace(products=products, targets=targets))


@pytest.mark.skipif(clang() is None, reason="address spaces are checked by clang++ 19 or newer")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 2), (3, 33), (9, 1027)])
def test_address_spaces(rows: int, size: int, dtype: mx.Dtype, gradient: bool) -> None:
    """Small inputs are put into ``constant``; a pointer that could not lead there is refused."""
    text = launch.text("Metal", gradient=gradient)
    described = signature(
        text["name"],
        text["source"],
        text["input_names"],
        [(dtype, (rows, size)), (mx.int32, (rows,)), (mx.float32, (2,))],
        text["output_names"],
        [mx.float32, dtype][: 1 + gradient],
        [("T", dtype)],
    )
    assert address_spaces(described, text["source"], text["header"]) == ""


# --- the choice ------------------------------------------------------------------------------


def test_on_a_cpu_mlx_runs_and_says_why() -> None:
    assert choice.choose().name == "mlx"
    assert "CPU" in choice.choose().note
    assert "logps.impl=mlx" in choice.choose("mlx").note
    with pytest.raises(SimPOError, match=r"logps\.impl is kernel, but MLX runs on the CPU"):
        choice.choose("kernel")


def test_on_metal_the_kernel_runs_once_it_is_checked(metal: None) -> None:
    chosen = choice.choose()
    assert chosen.name == "kernel"
    assert "Metal kernel" in chosen.note
    assert choice.choose("mlx").name == "mlx"


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("relative(value, total.greatest) / total.sum", "relative(value, 0.0f)", "is off by"),
        ("T(0.0f)", "T(1.0f)", "is off by"),
        ("return {greatest,", "return {gratest,", "does not run"),
    ],
)
def test_a_wrong_kernel_is_refused(
    right: str, wrong: str, words: str, metal: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = KERNEL.read_text()
    assert text.count(right) == 1
    (tmp_path / KERNEL.name).write_text(text.replace(right, wrong))
    monkeypatch.setattr(launch, "_FOLDER", tmp_path)
    with pytest.raises(SimPOError, match=f"(?s)Metal kernel .*{words}.*logps.impl=mlx"):
        choice.choose()


# What each of these does is not always seen in the numbers; the executor sees it.
MUTANTS = {
    "no barrier": ("  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\n", ""),
    "barrier for other memory": ("mem_flags::mem_threadgroup", "mem_flags::mem_device"),
    "tail not guarded": (
        "start + i < size ? logit(float(products[start + i]), scale, softcap) : -INFINITY",
        "logit(float(products[start + i]), scale, softcap)",
    ),
    "gradient beyond the row": ("v < start + READS && v < size", "v < start + READS"),
    "a tail left out": (
        "start < size; start += int(place.count) * READS) {\n    for",
        "start + READS <= size; start += int(place.count) * READS) {\n    for",
    ),
    "absent simdgroups read": ("place.lane < place.simdgroups", "true"),
    "one simdgroup only": ("place.lane < place.simdgroups", "place.lane < 1"),
    "a barrier some miss": ("  if (place.lane == 0) {\n", "  if (place.lane != 0) return own; {\n"),
    "a row that writes nothing": (
        "    return;\n  }\n\n  Total total",
        "    return;\n  }\n  if (target == 0) return;\n  Total total",
    ),
    "left out without a word": ("      *logp = 0.0f;\n", ""),
    "next row's logit": ("products[target]", "products[target + 1]"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(
    name: str, metal: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = MUTANTS[name]
    text = KERNEL.read_text()
    assert text.count(right) == 1
    (tmp_path / KERNEL.name).write_text(text.replace(right, wrong))
    monkeypatch.setattr(launch, "_FOLDER", tmp_path)
    given = case(1027)
    try:
        found = launched(given)
    except MetalError:
        return
    with pytest.raises(AssertionError):
        assert_right(found, given)


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
    model_type: tuple[str, dict[str, Any]], metal: None
) -> None:
    model = tiny_model(model_type[0], **model_type[1])
    attach_lora(model, LoRAConfig(rank=4), seed=0)
    pairs = [pair(12, 5, 7), pair(9, 3, 8)]
    kernel = shared_prefix_engine(model, choice.choose("kernel"))
    expected = run(model, REFERENCE, pairs)
    for checkpointing in (nullcontext, gradient_checkpointing):
        with checkpointing(model):
            assert greatest_difference(run(model, kernel, pairs), expected) < 1e-4


def test_micro_batches_and_chunks_through_the_kernel(
    metal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer step of SimPO: a pair at a time in small chunks, and plainly in one."""
    model = tiny_model()
    attach_lora(model, LoRAConfig(rank=4), seed=0)
    pairs = [pair(12, 5, 90), pair(9, 70, 8), pair(4, 1, 1)]
    gradients = []
    for engine, size in ((REFERENCE, 3), (shared_prefix_engine(model, choice.choose("kernel")), 1)):
        monkeypatch.setattr(logps, "MAX_CHUNK_LOGITS", 1)
        step = make_step(pairs, engine, TrainConfig(batch_size=size))
        function = GradientFunction(model, asdict(ObjectiveConfig()), engine, compiled=False)
        _, gradient = step_gradients(function, step)
        gradients.append({name: np.array(value) for name, value in tree_flatten(gradient)})
    assert greatest_difference(*gradients) < 1e-4
