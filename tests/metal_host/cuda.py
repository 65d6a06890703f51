"""The CUDA function into which mx.fast.cuda_kernel turns a kernel's source.

After mlx/backend/cuda/custom_kernel.cpp of MLX 0.32, which prints nothing without a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import mlx.core as mx

from .build import CALL_KERNEL, host_text
from .clang import errors, parse
from .signature import TYPES, Array, Parameter, Signature, Template

CUDA_TYPES = TYPES | {mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}
MAX_NDIM = 10
NAMESPACE = "mlx::core::cu"
EXTRAS = {"shape": f"{NAMESPACE}::Shape", "strides": f"{NAMESPACE}::Strides", "ndim": "int"}
# What CUDA calls a thread's attributes.
VARIABLES = {
    "threadIdx": "thread_position_in_threadgroup",
    "blockIdx": "threadgroup_position_in_grid",
    "blockDim": "threads_per_threadgroup",
    "gridDim": "threadgroups_per_grid",
}
FLAGS = ["-x", "cuda", "--cuda-device-only", "--cuda-gpu-arch=sm_80", "-nocudainc", "-nocudalib"]


@dataclass(frozen=True)
class CudaSignature(Signature):
    """Name and parameters of the function, and the names that it begins with."""

    library: ClassVar[str] = "cuda_host.h"
    closing: ClassVar[str] = "}}"

    constants: tuple[str, ...] = field(default=())  # "using T = float;"

    @property
    def declaration(self) -> str:
        """The text before the source. The variables that every thread has are parameters here."""
        parameters = ",\n".join(f"    {p.type} {p.name}" for p in self.parameters)
        name = self.name.removeprefix(f"{NAMESPACE}::")
        lines = [f"namespace {NAMESPACE} {{", f"__global__ void {name}(", f"{parameters}) {{"]
        return "\n".join((*lines, *self.constants))

    def argument(self, position: int, parameter: Parameter) -> str:
        """Return the C++ expression that is passed for a parameter, the position-th one."""
        if parameter.kind == "attribute":
            return f"thread_.{VARIABLES[parameter.name]}"
        if parameter.kind in EXTRAS:
            return f"*({parameter.type.replace('__grid_constant__ ', '')}*)buffers[{position}]"
        return f"({parameter.type})buffers[{position}]"


def cuda_signature(
    name: str,
    source: str,
    input_names: Sequence[str],
    inputs: Sequence[Array],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    template: Template = (),
) -> CudaSignature:
    """Return the signature of a kernel for one call. Inputs of every size are plain pointers."""
    parameters: list[Parameter] = []
    for i, (label, (dtype, shape)) in enumerate(zip(input_names, inputs, strict=True)):
        parameters.append(Parameter("input", f"const {CUDA_TYPES[dtype]}*", label, i))
        for kind, type_ in EXTRAS.items():
            if shape and f"{label}_{kind}" in source:
                extra = f"const __grid_constant__ {type_}"
                parameters.append(Parameter(kind, extra, f"{label}_{kind}", i))  # type: ignore[arg-type]
    for i, (label, dtype) in enumerate(zip(output_names, output_dtypes, strict=True)):
        parameters.append(Parameter("output", f"{CUDA_TYPES[dtype]}*", label, i))
    parameters += [Parameter("attribute", "const uint3", variable) for variable in VARIABLES]
    constants = [
        f"using {label} = {CUDA_TYPES[value]};"
        if isinstance(value, mx.Dtype)
        else f"constexpr {type(value).__name__} {label} = {str(value).lower()};"
        for label, value in template
    ]
    return CudaSignature(
        f"{NAMESPACE}::custom_kernel_{name}", "", "", tuple(parameters), tuple(constants)
    )


def cuda_errors(kernel_signature: CudaSignature, source: str, header: str = "") -> str:
    """Return Clang's errors about a kernel as CUDA, or an empty string: a function of the host that
    is called on the device, for example, of which g++ knows nothing."""
    text = host_text(kernel_signature, source, header).partition(CALL_KERNEL)[0]
    return errors(parse(text, FLAGS), text)
