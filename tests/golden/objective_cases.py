"""The inputs on which SimPO's loss is compared with TRL's and Liger's: random average
log-probabilities, and the settings of the published recipes. NumPy only, so that the ordinary tests
and the parity tests share them."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """The settings of one comparison, and the seed of its inputs."""

    beta: float
    gamma_beta_ratio: float
    label_smoothing: float
    loss_type: str
    pairs: int
    seed: int

    @property
    def name(self) -> str:
        return (
            f"{self.loss_type}-beta{self.beta:g}-ratio{self.gamma_beta_ratio:g}"
            f"-smoothing{self.label_smoothing:g}-pairs{self.pairs}-seed{self.seed}"
        )

    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """(chosen, rejected) average log-probabilities, float32 [pairs]: ordinary ones, and every
        fifth an extreme one, for which a naive log-sigmoid overflows."""
        rng = np.random.default_rng(self.seed)
        chosen, rejected = -rng.gamma(2.0, 0.8, (2, self.pairs)).astype(np.float32)
        rejected[::5] -= rng.choice([-60.0, 60.0], rejected[::5].shape).astype(np.float32)
        return chosen, np.minimum(rejected, -1e-3).astype(np.float32)


CASES = [
    *(
        Case(beta, ratio, 0.0, "sigmoid", 16, seed)
        for seed, (beta, ratio) in enumerate(
            [(2.0, 0.5), (2.0, 0.8), (2.5, 0.1), (2.5, 0.55), (10.0, 0.3), (10.0, 0.5), (2.0, 0.0)]
        )
    ),
    Case(2.0, 0.5, 0.1, "sigmoid", 16, 20),
    Case(10.0, 0.3, 0.3, "sigmoid", 7, 21),
    Case(2.5, 0.55, 0.0, "sigmoid", 1, 22),
    Case(2.0, 0.5, 0.0, "hinge", 16, 30),
    Case(10.0, 0.3, 0.0, "hinge", 5, 31),
]
