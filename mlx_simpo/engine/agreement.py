"""What a comparison of two implementations of an operation on this device has shown."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx
import numpy as np


class Agreement(NamedTuple):
    """Whether an operation agrees with its reference, value and gradient.

    name: of what was compared, for the user. dtype: of its inputs, "float32" for instance.
    value_error, gradient_error: the largest differences, relative to the largest entry of the
    reference; NaN where one of the two has a NaN. tolerance: of both. problem: why it does not run
    here at all; None if it does. where: which array differs most, and for which inputs, for the
    user ("the gradient of keys, 41 queries and 107 keys").
    """

    name: str
    dtype: str
    value_error: float
    gradient_error: float
    tolerance: float
    problem: str | None = None
    where: str = ""

    @property
    def passed(self) -> bool:
        """Whether it runs, and both errors are within the tolerance."""
        errors = (self.value_error, self.gradient_error)
        return self.problem is None and all(error <= self.tolerance for error in errors)

    @property
    def failure(self) -> str | None:
        """What is wrong with the operation, to come after its name; None if it has passed."""
        if self.passed:
            return None
        if self.problem is not None:
            return f"does not run here ({self.problem})"
        errors = (self.value_error, self.gradient_error)
        where = self.where or "its result"
        if any(math.isnan(error) for error in errors):
            return f"is not a number in {where} ({self.dtype})"
        return (
            f"is off by {max(errors):.2g} of the largest entry in {where} ({self.dtype}, where "
            f"{self.tolerance:.2g} is rounding)"
        )


class Difference(NamedTuple):
    """How far one array is off, relative to the largest entry of the reference's; NaN if one of the
    two has a NaN.

    where: which array, for which inputs, for the user. is_gradient: whether it is a gradient.
    """

    error: float
    where: str
    is_gradient: bool


def summarize(
    name: str, dtype: mx.Dtype, tolerance: float, differences: Iterable[Difference]
) -> Agreement:
    """Return what ``differences`` show, which may raise MLX's errors while they are computed."""
    worst = {kind: Difference(0.0, "", kind) for kind in (False, True)}
    problem = None
    try:
        for difference in differences:
            worst[difference.is_gradient] = max(
                worst[difference.is_gradient], difference, key=_badness
            )
    except (RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split())
    return Agreement(
        name=name,
        dtype=dtype_name(dtype),
        value_error=worst[False].error,
        gradient_error=worst[True].error,
        tolerance=tolerance,
        problem=problem,
        where=max(worst.values(), key=_badness).where,
    )


def dtype_name(dtype: mx.Dtype) -> str:
    """Return "float32" for mx.float32."""
    return str(dtype).removeprefix("mlx.core.")


def relative_difference(actual: mx.array, expected: mx.array) -> float:
    """Return the largest difference over the largest entry; NaN if one of the two has a NaN."""
    one, two = (np.array(array.astype(mx.float32)) for array in (actual, expected))
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return float(np.abs(one - two).max() / np.abs(two).max())


def _badness(difference: Difference) -> tuple[bool, float]:
    """Return what differences are ordered by: NaN is worse than any number."""
    return math.isnan(difference.error), difference.error
