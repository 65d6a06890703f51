"""When a checkpoint is written, and what happens if it cannot be."""

import time
from collections.abc import Callable
from pathlib import Path

import mlx.nn as nn

from ..config.simpo_config import TrainConfig
from ..errors import SimPOError
from ..model.adapters import flat_arrays
from ..reporting.display import Display
from ..runs.checkpoints import delete_old, list_checkpoints, save_checkpoint
from ..runs.disk import check_space

MAX_SHARE = 0.01  # of the time between two checkpoints, for writing one


class Saver:
    """Writes a run's checkpoints at the cadence of its settings.

    seconds: what all checkpoints together have taken. cost: what the last one took, in seconds; of
    a run that is resumed, before that.
    """

    def __init__(
        self, root: Path, options: TrainConfig, display: Display, cost: float = 0.0
    ) -> None:
        self.root, self._options, self._display = root, options, display
        self.seconds = 0.0
        self._last_end = time.monotonic()
        self.cost = cost
        self._size = 0  # its bytes
        self._has_explained = False

    def check_space(self, model: nn.Module) -> None:
        """Check that the disk has space for all that a run of this model keeps at a time.

        Raises:
            SimPOError: it has not.
        """
        adapter = sum(array.nbytes for array in flat_arrays(model.trainable_parameters()).values())
        best = self._options.eval_every is not None
        # Of each checkpoint: weights, two moments and the best weights; one more while it is saved.
        checkpoints = (self._options.keep_checkpoints + 1) * (3 + best)
        what = f"a run that keeps {self._options.keep_checkpoints} checkpoints"
        check_space(self.root, adapter * (1 + best + checkpoints), what)

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is to be written after this step."""
        every, minutes = self._options.save_every, self._options.save_minutes
        elapsed = time.monotonic() - self._last_end
        if every is not None and step % every == 0:
            if self.cost > MAX_SHARE * elapsed:
                self._explain(
                    f"a checkpoint takes {self.cost:.1f} s, {self.cost / max(elapsed, 1e-9):.0%} "
                    f"of the time since the last one; a larger train.save_every costs less"
                )
            return True
        if minutes is None or elapsed < 60 * minutes:
            return False
        if elapsed < self.cost / MAX_SHARE:
            self._explain(
                f"a checkpoint takes {self.cost:.1f} s: one is saved every "
                f"{self.cost / MAX_SHARE / 60:.0f} minutes and not every {minutes:g}, so that "
                f"saving takes no more than {MAX_SHARE:.0%} of the time"
            )
            return False
        return True

    def save(self, step: int, write: Callable[[Path], None]) -> bool:
        """Write the checkpoint of a step, and delete those that are not kept.

        If it cannot be written, a warning says so and the training may go on: the checkpoints that
        are there stay whole.

        Returns:
            Whether it was written.
        """
        started = time.monotonic()
        try:
            self._write(step, write)
        except (OSError, SimPOError) as error:
            existing = list_checkpoints(self.root)
            last = f"the last one is {existing[0].name}" if existing else "there is none yet"
            self._display.warn(
                f"the checkpoint of step {step} could not be written ({last}): {error}"
            )
            return False
        finally:
            self._last_end = time.monotonic()
            self.cost = self._last_end - started
            self.seconds += self.cost
        return True

    def _write(self, step: int, write: Callable[[Path], None]) -> None:
        try:
            check_space(self.root, self._size, f"the checkpoint of step {step}")
            folder = save_checkpoint(self.root, step, write)
        except (OSError, SimPOError):
            if len(list_checkpoints(self.root)) < 2:
                raise
            # Perhaps the disk is full: the newest checkpoint is enough until there is another.
            delete_old(self.root, 1)
            folder = save_checkpoint(self.root, step, write)
        self._size = sum(file.stat().st_size for file in folder.rglob("*"))
        try:
            delete_old(self.root, self._options.keep_checkpoints)
        except (OSError, SimPOError) as error:
            self._display.warn(f"old checkpoints in {self.root} could not be deleted: {error}")

    def _explain(self, text: str) -> None:
        if not self._has_explained:
            self._display.note(text)
        self._has_explained = True
