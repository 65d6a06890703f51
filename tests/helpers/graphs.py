"""What a graph of MLX's is made of."""

import io
import re
from collections import Counter

import mlx.core as mx

# Names of primitives that are a matrix product, or change every number of an array.
PRODUCTS = ("Matmul", "AddMM", "QuantizedMatmul")
ELEMENTWISE = ("Add", "Multiply", "Subtract", "Divide", "Select", "AsType")


def primitives(*outputs: mx.array) -> Counter[str]:
    """How many primitives of each name the outputs need; nothing is evaluated."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    return Counter(re.findall(r'label ="([^"]*)"', text.getvalue()))


def count(names: Counter[str], *of: str) -> int:
    """How many have one of these names."""
    return sum(names[name] for name in of)
