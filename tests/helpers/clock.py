"""A clock that only work moves on."""

from collections.abc import Callable
from typing import Any


class FakeClock:
    """Returns the seconds that all work together has taken."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], Any]:
        """Return work that takes so long, and has nothing to evaluate."""

        def run() -> list:
            self.now += seconds
            return []

        return run
