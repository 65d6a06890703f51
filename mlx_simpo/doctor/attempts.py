"""What may fail on one machine and must not end the report."""

import math
from collections.abc import Callable
from typing import TypeVar

from ..errors import SimPOError, one_line

_T = TypeVar("_T")

# What MLX and mlx-lm raise where an operation is missing, is not right or has no memory left.
FAILURES = (
    SimPOError,
    RuntimeError,
    MemoryError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


def attempt(run: Callable[[], _T]) -> tuple[_T | None, str | None]:
    """Return what ``run`` returns and None, or None and how it failed, on one line."""
    try:
        return run(), None
    except FAILURES as error:
        reason = one_line(error, 300) or type(error).__name__
        return None, reason if isinstance(
            error, SimPOError
        ) else f"{type(error).__name__}: {reason}"


def finite(number: float) -> float | None:
    """Return a number, or None if it is not finite, for which JSON has nothing."""
    return float(number) if math.isfinite(number) else None
