"""What a comparison of two implementations of an operation on this device has shown."""

import math
from typing import NamedTuple


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
