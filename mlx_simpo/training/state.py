"""The state of a training between two optimizer steps: what the next step depends on.

The weights are the model's own. The order of the data is drawn from the seed and the number of the
epoch (`data.order`), so that the number of finished steps says which pairs come next.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_map_with_path

from ..config.simpo_config import SimPOConfig
from ..errors import SimPOError
from ..model.adapters import flat_arrays
from ..randomness import set_random_state
from .optimizer import build_optimizer

RANDOM = "random"
OPTIMIZER = "optimizer."


class TrainingState:
    """Optimizer, random numbers and position of one training.

    step: optimizer steps that are finished. skipped: those among them without an update, because it
    was not finite. random: MLX's random state at the end of the last step, uint32 [2]; each step
    begins with it, so that whatever draws random numbers in between changes nothing.
    """

    def __init__(self, model: nn.Module, config: SimPOConfig, total_steps: int) -> None:
        """Begin a training of ``total_steps`` steps of the model's trainable weights."""
        self.step = 0
        self.skipped = 0
        self.random = np.array([0, config.seed], np.uint32)  # the key of mx.random.seed(seed)
        self.optimizer: optim.AdamW = build_optimizer(config.train, total_steps)
        self.optimizer.init(model.trainable_parameters())  # only the trainable ones have moments

    def arrays(self) -> dict[str, mx.array]:
        """Return the optimizer's arrays and the random state by name, to be saved."""
        optimizer = flat_arrays(self.optimizer.state)
        named = {f"{OPTIMIZER}{name}": array for name, array in optimizer.items()}
        return {RANDOM: mx.array(self.random), **named}

    def restore(self, arrays: dict[str, mx.array], step: int, skipped: int) -> None:
        """Continue where `arrays` was called, after ``step`` steps.

        Raises:
            SimPOError: the arrays are not those of this training.
        """
        expected = self.arrays()
        for name, array in expected.items():
            saved = arrays.get(name)
            if saved is None or (saved.shape, saved.dtype) != (array.shape, array.dtype):
                there = "missing" if saved is None else f"{saved.dtype} {saved.shape}"
                raise SimPOError(
                    f"the saved optimizer state does not belong to this adapter: {name} is {there}"
                    f" and must be {array.dtype} {array.shape}; resume with the model and the "
                    "LoRA settings of the run"
                )
        self.random = np.array(arrays[RANDOM])
        self.optimizer.state = tree_map_with_path(
            lambda path, _: arrays[f"{OPTIMIZER}{path}"], self.optimizer.state
        )
        self.step, self.skipped = step, skipped

    def seed_random_numbers(self) -> None:
        """Set MLX's random state to that of this training."""
        set_random_state(self.random)

    def skip_update(self) -> None:
        """Count a step that has no update: the learning rate follows its schedule."""
        # The bias correction of the moments counts it too, which makes the next updates a little
        # smaller than those of a schedule with a counter of its own.
        self.optimizer.state["step"] = self.optimizer.step + 1
        self.skipped += 1


@contextmanager
def restore_on_error(model: nn.Module, state: TrainingState) -> Iterator[None]:
    """Restore the model's arrays, the optimizer's and the random numbers if the block raises.

    An exception while mx.compile traces (Ctrl-C, out of memory) leaves its placeholders in the
    model and in mx.random.state; one between the update and its metrics leaves half a step.
    """
    before = tree_map(lambda leaf: leaf, model.state)  # a copy of the tree, not of its arrays
    optimizer = tree_map(lambda leaf: leaf, state.optimizer.state)
    try:
        yield
    except BaseException:  # Ctrl-C too
        _restore(model.state, before)
        state.optimizer.state = optimizer
        state.seed_random_numbers()
        raise


def _restore(tree: Any, saved: Any) -> None:
    """Write the leaves of ``saved`` into the dicts, modules and lists of ``tree``, in place."""
    for key, value in saved.items() if isinstance(saved, dict) else enumerate(saved):
        if isinstance(value, dict | list):
            _restore(tree[key], value)
        else:
            tree[key] = value
