"""An engine's log-probabilities and gradients, and how far two of them are apart."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_simpo.data.encode import EncodedPair
from mlx_simpo.engine.choice import Engine


def run(model: nn.Module, engine: Engine, pairs: Sequence[EncodedPair]) -> dict[str, np.ndarray]:
    """The log-probabilities, and the gradient of a sum of them with weights of both signs."""
    arrays = engine.collate(pairs).arrays
    weights = mx.array(np.random.default_rng(1).normal(size=2 * len(pairs)), mx.float32)

    def weighted_sum(model: nn.Module) -> tuple[mx.array, mx.array]:
        logps = engine.logps(model, arrays, training=True)
        return (logps * weights).sum(), logps

    (_, logps), gradient = nn.value_and_grad(model, weighted_sum)(model)
    return {"logps": np.array(logps)} | {k: np.array(g) for k, g in tree_flatten(gradient)}


def greatest_difference(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    """Relative to the largest entry of each array (or, where that is nearly nothing, of all)."""
    assert one.keys() == two.keys()
    least = 1e-4 * max(np.abs(value).max() for value in two.values())
    return max(float(np.abs(one[k] - two[k]).max() / max(np.abs(two[k]).max(), least)) for k in two)
