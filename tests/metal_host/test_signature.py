"""The signatures of custom kernels, compared with what MLX itself prints."""

import ctypes
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from metal_host.signature import ATTRIBUTES, signature

NAMES_EVERYTHING = """
    uint i = thread_position_in_grid.x;
    // x_shape x_strides tiny_ndim threads_per_threadgroup simdgroup_index_in_threadgroup
    y[i] = 0;
"""
SOURCES = {
    "nothing": "y[0] = 1;",
    "everything": NAMES_EVERYTHING,
    "all attributes": "// " + " ".join(ATTRIBUTES),
    "scalar": "y[0] = s_ndim + x_ndim; // dispatch_threads_per_threadgroup",
}
TEMPLATES = {
    "none": [],
    "all kinds": [("T", mx.bfloat16), ("N", -3), ("B", True)],
    "one": [("T", mx.float32)],
}
HEADERS = {"empty": "", "lines": "// a line\ninline float q(float x) { return x; }\n"}
INPUTS = {
    "x": mx.zeros((4, 8)),
    "s": mx.array(1.0),
    "tiny": mx.zeros((3,), mx.float16),
    "seven": mx.zeros((1, 7), mx.int8),
    "u8": mx.zeros((2, 4), mx.uint8),
    "long_": mx.zeros((9,), mx.int64),
}


def make_mlx_print(definition: dict[str, Any], call: dict[str, Any], folder: Path) -> None:
    """Let MLX print the text that it would compile: exporting a function does, without a GPU."""
    kernel: Any = mx.fast.metal_kernel(**definition)

    def function(*inputs: mx.array) -> list[mx.array]:
        return kernel(inputs=inputs, verbose=True, **call)

    mx.export_function(str(folder / "kernel.mlxfn"), function, *INPUTS.values())


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_text_is_that_of_mlx(
    source: str,
    template: list,
    header: str,
    outputs: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    names, dtypes = ["y", "z"][:outputs], [mx.int32, mx.float32][:outputs]
    definition = {
        "name": "foo",
        "input_names": list(INPUTS),
        "output_names": names,
        "source": source,
        "header": header,
    }
    call = {
        "grid": (64, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [(4, 8), (3,)][:outputs],
        "output_dtypes": dtypes,
        **({"template": template} if template else {}),
    }
    make_mlx_print(definition, call, tmp_path)
    ctypes.CDLL(None).fflush(None)
    theirs = capfd.readouterr().out.split("```\n")[1]
    inputs = [(a.dtype, a.shape) for a in INPUTS.values()]
    ours = signature("foo", source, list(INPUTS), inputs, names, dtypes, template)
    assert ours.text(source, header).strip("\n") == theirs.strip("\n")


@pytest.mark.parametrize(
    ("shape", "type"),
    [
        ((), "const constant float&"),
        ((7,), "const constant float*"),
        ((2, 4), "const device float*"),
    ],
)
def test_small_inputs_are_constant(shape: tuple[int, ...], type: str) -> None:
    kernel_signature = signature(
        "k", "y[0] = 0;", ["x"], [(mx.float32, shape)], ["y"], [mx.float32]
    )
    assert kernel_signature.parameters[0].type == type


def test_names_in_the_header_add_nothing() -> None:
    kernel_signature = signature("k", "y[0] = 0;", ["x"], [(mx.float32, (9,))], ["y"], [mx.float32])
    assert [p.name for p in kernel_signature.parameters] == ["x", "y"]
    assert "x_shape" in kernel_signature.text("y[0] = 0;", "// x_shape thread_position_in_grid")


def test_a_template_argument_of_another_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="a template argument must be"):
        signature("k", "", [], [], ["y"], [mx.float32], [("T", 1.5)])  # type: ignore[list-item]
