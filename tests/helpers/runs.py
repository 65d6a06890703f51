"""Small runs in this process, in which something happens after a chosen line of the log."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.commands import captured_display, small_run
from helpers.kills import content, differences

from mlx_simpo import SimPOConfig, TrainResult, load_config, train
from mlx_simpo.config.simpo_config import resume_config
from mlx_simpo.data.encode import EncodedPair
from mlx_simpo.runs.folder import RunFolder
from mlx_simpo.training import stopping, trainer
from mlx_simpo.training.step import check_finite

# Five steps of four pairs, three per epoch: with dropout, micro-batches and evaluations. The forecast
# of memory, a third of such a run's time, has tests of its own.
SETTINGS = (
    "train.memory_check=off",
    "train.steps=5",
    "train.eval_every=2",
    "train.save_every=2",
    "train.save_minutes=null",
    "lora.dropout=0.3",
)
EVALUATED, TRAINED = "eval_loss", "learning_rate"  # what a line has of an evaluation, of a step


class Ran(NamedTuple):
    """The result of a run, and what it showed."""

    result: TrainResult
    text: str


class Runs:
    """Runs of one model and dataset, each in its own folder below ``root``."""

    def __init__(self, model: Path, pairs: Path, root: Path) -> None:
        self.model, self.pairs, self.root = model, pairs, root

    def config(self, name: str, *settings: str) -> SimPOConfig:
        """Return the configuration of the run in the folder ``name``."""
        run = small_run(self.model, self.pairs, self.root / name, *SETTINGS, *settings)
        return load_config(None, run)

    def begin(self, name: str, *settings: str) -> Ran:
        """Begin a run and go to its end."""
        return finish(self.config(name, *settings))

    def resume(self, name: str, *settings: str) -> Ran:
        """Go on with the run in the folder ``name``, as `mlx-simpo train --resume` does."""
        return finish(resume_config(self.root / name, settings), resume=True)


def finish(config: SimPOConfig, *, resume: bool = False) -> Ran:
    """Train, and return what was shown, too."""
    display, text = captured_display()
    display.console.width = 1000
    result = train(config, display, resume=resume)
    return Ran(result, text.getvalue())


def assert_same_run(folder: Path, expected: Path) -> None:
    """Check that two runs have left the same, bit for bit, but for their times."""
    assert differences(content(folder), content(expected)) == []


@contextmanager
def after_line(
    step: int, action: Callable[[RunFolder], object], kind: str = TRAINED
) -> Iterator[None]:
    """Call ``action`` when the metrics of a step, or of its evaluation, have been written."""
    log = RunFolder.log

    def log_and_act(self: RunFolder, record: dict[str, Any], *name: str) -> None:
        log(self, record, *name)
        if record["step"] == step and kind in record:
            action(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "log", log_and_act)
        yield


@contextmanager
def snapshots(target: Path) -> Iterator[list[Path]]:
    """Copy the run's folder after each line of its log: what a process leaves that is killed."""
    copies: list[Path] = []
    log = RunFolder.log

    def log_and_copy(self: RunFolder, *arguments: Any) -> None:
        log(self, *arguments)
        copies.append(Path(shutil.copytree(self.path, target / f"killed-{len(copies)}")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "log", log_and_copy)
        yield copies


def send(number: int) -> None:
    """Send a signal to this process and wait until the run knows of it."""
    listener = stopping._Listener.active
    assert listener is not None, "no run is listening"
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 60
    while not listener.request:
        assert time.monotonic() < deadline, "the run does not know of the signal"
        time.sleep(0.001)


def raising(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises this error."""

    def fail(*arguments: Any, **more: Any) -> Any:
        raise error

    return fail


@contextmanager
def not_finite(*steps: int) -> Iterator[None]:
    """Let the losses of these steps be NaN."""

    def check(step: int, losses: Any, norm: float, pairs: list[EncodedPair]) -> None:
        check_finite(step, losses * float("nan") if step in steps else losses, norm, pairs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "check_finite", check)
        yield
