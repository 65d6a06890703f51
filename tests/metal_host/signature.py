"""The Metal function into which mx.fast.metal_kernel turns a kernel's source, word for word.

After mlx/backend/common/metal_kernel.cpp of MLX 0.32; tests compare it with what MLX prints.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import mlx.core as mx

TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
}  # not complex64, which no kernel here needs

# In MLX's order, which is that of the parameters.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

Kind = Literal["input", "shape", "strides", "ndim", "output", "attribute"]  # of a parameter
# What MLX adds for an input x if the source mentions x_shape, x_strides or x_ndim.
EXTRAS: dict[Kind, str] = {
    "shape": "const constant int*",
    "strides": "const constant int64_t*",
    "ndim": "const constant int&",
}

Array = tuple[mx.Dtype, tuple[int, ...]]  # dtype and shape of an input
Template = Sequence[tuple[str, bool | int | mx.Dtype]]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the function; ``index`` is that of the input or output that it belongs to."""

    kind: Kind
    type: str
    name: str
    index: int = 0


@dataclass(frozen=True)
class Signature:
    """Name, template and parameters of the function.

    ``library`` is the header that takes the place of Metal's; ``closing`` follows the source.
    """

    library: ClassVar[str] = "msl.h"
    closing: ClassVar[str] = "}"
    name: str
    template: str  # "template <typename T, int N>\n", or nothing
    arguments: str  # "<float, 3>", or nothing
    parameters: tuple[Parameter, ...]

    @property
    def declaration(self) -> str:
        """The text that MLX puts before the source."""
        buffers = [p for p in self.parameters if p.kind != "attribute"]
        attributes = [p for p in self.parameters if p.kind == "attribute"]
        arrays = sum(p.kind in ("input", "output") for p in buffers)
        lines = [f"{self.template}[[kernel]] void {self.name}(\n"]
        for i, p in enumerate(buffers):
            # MLX looks for the last buffer, but does not count the extras: with MLX, too, a kernel
            # without attributes that has extras and several outputs does not compile.
            last = p.kind == "output" and not attributes and i >= arrays - 1
            lines.append(f"  {p.type} {p.name} [[buffer({i})]]" + (") {\n" if last else ",\n"))
        lines += [f"  {p.type} {p.name} [[{p.name}]],\n" for p in attributes]
        if attributes:
            lines[-1] = lines[-1].removesuffix(",\n") + ") {\n"
        return "".join(lines)

    def argument(self, position: int, parameter: Parameter) -> str:
        """Return the C++ expression that is passed for a parameter, the position-th one."""
        if parameter.kind == "attribute":
            value = f"thread_.{parameter.name}"
            is_triple = parameter.type == "uint3"
            return f"uint3({value}.x, {value}.y, {value}.z)" if is_triple else value
        pointer = parameter.type.replace("&", "*")
        return ("*" if "&" in parameter.type else "") + f"({pointer})buffers[{position}]"

    def text(self, source: str, header: str = "") -> str:
        """Return the whole text that MLX compiles."""
        text = f"{header}{self.declaration}{source}\n}}\n"
        if self.template:
            function = self.name + self.arguments
            text += f'\ntemplate [[host_name("{self.name}")]] [[kernel]] '
            text += f"decltype({function}) {function};\n"
        return text


def type_name(dtype: mx.Dtype) -> str:
    """Return the name of a dtype in Metal.

    Raises:
        ValueError: kernels with this dtype cannot be executed here.
    """
    if dtype not in TYPES:
        raise ValueError(f"kernels with {dtype} cannot be executed here")
    return TYPES[dtype]


def _template_argument(value: bool | int | mx.Dtype) -> tuple[str, str]:
    """Return the declaration of a template's parameter, without its name, and the argument.

    Raises:
        ValueError: the argument is no dtype, int or bool.
    """
    if isinstance(value, bool):
        return "bool", str(int(value))
    if isinstance(value, int):
        return "int", str(value)
    if isinstance(value, mx.Dtype):
        return "typename", type_name(value)
    raise ValueError("a template argument must be an mlx.core.Dtype, an int or a bool")


def _input_parameters(index: int, name: str, array: Array, source: str) -> list[Parameter]:
    dtype, shape = array
    space = "constant" if math.prod(shape) < 8 else "device"
    suffix = "*" if shape else "&"
    parameters = [Parameter("input", f"const {space} {type_name(dtype)}{suffix}", name, index)]
    if shape:
        parameters += [
            Parameter(kind, type, f"{name}_{kind}", index)
            for kind, type in EXTRAS.items()
            if f"{name}_{kind}" in source
        ]
    return parameters


def signature(
    name: str,
    source: str,
    input_names: Sequence[str],
    inputs: Sequence[Array],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    template: Template = (),
) -> Signature:
    """Return the signature of a kernel for one call.

    As in MLX, names are looked for in ``source`` alone, not in the header.

    Raises:
        ValueError: a dtype or template argument that cannot be used here.
    """
    declared = [(_template_argument(value), label) for label, value in template]
    template_parameters = ", ".join(f"{kind} {label}" for (kind, _), label in declared)
    arguments = ", ".join(argument for (_, argument), _ in declared)
    words = ["custom_kernel", name]
    if declared:
        words.append("_" + arguments.replace(", ", "_").replace("-", "_"))
    for dtype, shape in inputs:
        size = "c" if math.prod(shape) < 8 else ""
        words.append(type_name(dtype) + (size if shape else "s"))
    words += [type_name(dtype) for dtype in output_dtypes]
    parameters: list[Parameter] = []
    for i, (label, array) in enumerate(zip(input_names, inputs, strict=True)):
        parameters += _input_parameters(i, label, array, source)
    for i, (label, dtype) in enumerate(zip(output_names, output_dtypes, strict=True)):
        parameters.append(Parameter("output", f"device {type_name(dtype)}*", label, i))
    parameters += [Parameter("attribute", type, a) for a, type in ATTRIBUTES.items() if a in source]
    return Signature(
        "_".join(words),
        f"template <{template_parameters}>\n" if declared else "",
        f"<{arguments}>" if declared else "",
        tuple(parameters),
    )
