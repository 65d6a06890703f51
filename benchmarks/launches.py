"""Which of MLX's primitives launch a kernel on a Metal GPU, and how many.

Read from MLX's source (each primitive's ``eval_gpu`` in mlx/backend/metal and mlx/backend/gpu, and
``eval`` in mlx/backend/common/common.cpp; version 0.32). A graph is what mx.export_to_dot writes:
names and connections without shapes, so whether an array lies row after row in memory is inferred
from the primitives that lead to it (`Graph.is_scattered`).

Not counted, for lack of shapes: copies of a matrix product's operand that has neither its rows nor
its columns together, a second kernel for thin products (split-K) and for long reductions. All of
these are the same before and after a change that leaves the products themselves alone.
"""

import io
import re
from collections import Counter
from dataclasses import dataclass

import mlx.core as mx

# Another view of the same memory, or nothing. (backend/common/common.cpp: the eval of each
# calls copy_shared_buffer; Slice: slice() in backend/common/slicing.cpp. Copy is what
# value_and_grad makes of its arguments. NumberOfElements is written by the CPU.)
VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends"),
    *("ExpandDims", "NumberOfElements", "Slice", "Split", "Squeeze", "StopGradient", "Transpose"),
    "Unflatten",  # prepare_reshape: one axis of any stride can always be divided into two
}
# A view if the array lies row after row, else one kernel that copies it. (reshape_gpu and
# prepare_reshape; Contiguous::eval_gpu.)
RESHAPES = {"Reshape", "Flatten", "Contiguous"}
# One kernel. (backend/metal: unary.cpp, binary.cpp, ternary.cpp, reduce.cpp, softmax.cpp,
# logsumexp.cpp, matmul.cpp, quantized.cpp, rope.cpp, normalization.cpp, compiled.cpp,
# scaled_dot_product_attention.cpp; indexing.cpp: Gather, GatherAxis; primitives.cpp: Arange,
# ArgReduce, RandomBits. gpu/primitives.cpp: AsType and Full are copies.)
KERNELS = {
    *("Abs", "Add", "AddMM", "And", "Arange", "ArgReduce", "AsType", "BitwiseAnd", "Cos", "Divide"),
    *("Equal", "Erf", "Exp", "Full", "Gather", "GatherAxis", "Greater", "GreaterEqual", "Less"),
    *("LessEqual", "Log", "LogAddExp", "LogicalAnd", "LogicalNot", "LogicalOr", "LogSumExp"),
    *("Matmul", "Max", "Maximum", "Min", "Minimum", "Multiply", "Negative", "NotEqual", "Or"),
    *("Power", "QuantizedMatmul", "RandomBits", "RMSNorm", "RoPE", "Rsqrt", "Select", "Sigmoid"),
    *("Sin", "Softmax", "Sqrt", "Square", "Subtract", "Sum", "Tanh", "Compiled"),
    "ScaledDotProductAttention",
}
# A kernel for the new values, and one that copies the array first, unless nobody else needs it.
# (copy_gpu at the start of their eval_gpu in metal/indexing.cpp, which donates the buffer.)
UPDATES = {"Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate"}
# Several kernels. RMSNormVJP: one, and one that sums the weight's gradient over rows, whether it is
# needed or not (metal/normalization.cpp). The gradient of MLX's attention is newer than the source
# that we read (pull 4563): four is an assumption, after the names of its kernels in the library:
# odo (δ), the gradient by blocks, ds, reduce.
SEVERAL = {"RMSNormVJP": 2, "ScaledDotProductAttentionVJP": 4}
# Concatenate copies its inputs one by one (concatenate_gpu in metal/slicing.cpp).


@dataclass
class Primitive:
    """A node of the graph: its name, where each input comes from (the primitive and which of its
    outputs; None: an array that exists already), and how often its outputs are used."""

    name: str
    inputs: list["tuple[Primitive, int] | None"]
    outputs: int = 0
    uses: int = 0


class Graph:
    """The primitives that ``outputs`` need.

    stand_ins: names of primitives that stand for others, and the names of those.
    """

    def __init__(self, outputs: list[mx.array], stand_ins: dict[str, str] | None = None) -> None:
        text = io.StringIO()
        mx.export_to_dot(text, outputs)
        primitives: dict[str, Primitive] = {}
        producers: dict[str, tuple[Primitive, int]] = {}
        edges: list[tuple[str, str]] = []
        for line in text.getvalue().splitlines():
            if label := re.match(r'\{ (\d+) \[label ="([^"]*)"', line):
                name = label[2].split()[0]
                name = "Compiled" if name.startswith("Compiled") else name
                primitives[label[1]] = Primitive((stand_ins or {}).get(name, name), [])
            elif into := re.match(r'"(\w+)" -> (\d+)', line):
                edges.append((into[1], into[2]))
            elif out := re.match(r'(\d+) -> "(\w+)"', line):
                producer = primitives[out[1]]
                producers[out[2]] = producer, producer.outputs
                producer.outputs += 1
        for array, primitive in edges:
            source = producers.get(array)
            primitives[primitive].inputs.append(source)
            if source is not None:
                source[0].uses += 1
        self.primitives = list(primitives.values())

    def names(self) -> Counter[str]:
        """Return how many primitives of each name there are."""
        return Counter(p.name for p in self.primitives)

    def launching(self) -> Counter[str]:
        """Return how many primitives of each name launch a kernel."""
        return Counter(p.name for p in self.primitives if kernels(p))

    def kernels(self) -> int:
        """Return how many kernels all of them launch."""
        return sum(map(kernels, self.primitives))


def kernels(primitive: Primitive) -> int:
    """Return how many kernels a primitive launches.

    Raises:
        KeyError: its name is in no table above.
    """
    name = primitive.name
    if name in VIEWS:
        return 0
    if name in RESHAPES:
        return int(is_scattered(primitive.inputs[0]))
    if name in KERNELS:
        return 1
    if name in UPDATES:
        target = primitive.inputs[0]
        is_ours = target is not None and target[0].name not in VIEWS and target[0].uses == 1
        return 1 if is_ours else 2
    if name == "Concatenate":
        return len(primitive.inputs)
    return SEVERAL[name]


def is_scattered(source: tuple[Primitive, int] | None) -> bool:
    """Return whether an output of a primitive does not lie row after row in memory.

    Kernels write row after row, but for MLX's attention, whose output has its heads innermost. A
    second transposition is taken to undo the first, as those of queries and outputs do.
    """
    if source is None:
        return False
    primitive, output = source
    name = primitive.name
    if name == "Transpose":
        return not is_scattered(primitive.inputs[0])
    if name in ("Slice", "Split", "Broadcast", "ScaledDotProductAttention"):
        return True
    if name == "CustomTransforms":  # its inputs end with what its outputs are
        return is_scattered(primitive.inputs[output - primitive.outputs])
    if name == "Depends":
        return is_scattered(primitive.inputs[output])
    return name in VIEWS and is_scattered(primitive.inputs[0])
