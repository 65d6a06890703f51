"""What a comparison of two implementations of an operation on this device has shown."""

from typing import NamedTuple


class Agreement(NamedTuple):
    """Whether an operation agrees with its reference, value and gradient.

    name: of what was compared, for the user. dtype: of its inputs, "float32" for instance.
    value_error, gradient_error: the largest differences, relative to the largest entry of the
    reference; NaN where one of the two has a NaN. tolerance: of both. problem: why it does not run
    here at all; None if it does.
    """

    name: str
    dtype: str
    value_error: float
    gradient_error: float
    tolerance: float
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it runs, and both errors are within the tolerance."""
        errors = (self.value_error, self.gradient_error)
        return self.problem is None and all(error <= self.tolerance for error in errors)
