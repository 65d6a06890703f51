"""When checkpoints are written, by a clock of our own, and what happens if they cannot be."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import captured_display
from helpers.runs import raising
from helpers.steps import model_with_lora, weights

from mlx_simpo import SimPOError, TrainConfig
from mlx_simpo.runs.checkpoints import list_checkpoints
from mlx_simpo.training import saver as saver_module
from mlx_simpo.training.saver import Saver

MINUTE = 60.0


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(saver_module.time, "monotonic", clock)
    return clock


class Trial:
    """A saver, its clock and what it has shown."""

    def __init__(self, clock: Clock, root: Path, **train: Any) -> None:
        display, self._text = captured_display()
        display.console.width = 1000
        self.clock = clock
        self.saver = Saver(root, TrainConfig(**train), display)

    @property
    def text(self) -> str:
        return self._text.getvalue()

    def save(self, step: int, cost: float = 0.0, content: str = "state") -> bool:
        """Save a checkpoint that takes so many seconds."""

        def write(folder: Path) -> None:
            (folder / "state").write_text(content)
            self.clock.seconds += cost

        return self.saver.save(step, write)

    def due(self, steps: int, each: float, cost: float) -> list[int]:
        """Take steps of so many seconds each, save when that is due, and return when it was."""
        saved = []
        for step in range(1, steps + 1):
            self.clock.seconds += each
            if self.saver.is_due(step):
                saved.append(step)
                assert self.save(step, cost)
        return saved


@pytest.fixture
def new(clock: Clock, tmp_path: Path) -> Callable[..., Trial]:
    return lambda **train: Trial(clock, tmp_path / "checkpoints", **train)


# --- cadence ---------------------------------------------------------------------------------


def test_by_default_a_checkpoint_is_saved_every_ten_minutes(new: Callable[..., Trial]) -> None:
    test = new()
    assert test.due(65, each=MINUTE, cost=1.0) == [10, 20, 30, 40, 50, 60]
    assert test.text == ""


def test_every_so_many_steps_beside_the_minutes(new: Callable[..., Trial]) -> None:
    test = new(save_every=25, save_minutes=10.0)
    assert test.due(60, each=MINUTE, cost=0.1) == [10, 20, 25, 35, 45, 50, 60]


def test_without_minutes_only_the_steps_count(new: Callable[..., Trial]) -> None:
    assert new(save_every=25, save_minutes=None).due(60, each=MINUTE, cost=0.1) == [25, 50]
    assert new(save_minutes=None).due(60, each=MINUTE, cost=0.1) == []


def test_a_save_that_costs_more_than_a_hundredth_is_done_less_often_and_says_so_once(
    new: Callable[..., Trial],
) -> None:
    """12 s are 1 % of 20 minutes; the first checkpoint shows what they cost."""
    test = new()
    saved = test.due(100, each=MINUTE, cost=12.0)
    assert saved == [10, 30, 50, 70, 90]
    assert test.text == (
        "a checkpoint takes 12.0 s: one is saved every 20 minutes and not every 10, so that saving "
        "takes no more than 1% of the time\n"
    )
    assert test.saver.seconds == pytest.approx(60.0)


def test_the_share_of_the_time_is_at_most_a_hundredth_whatever_a_save_costs(
    new: Callable[..., Trial],
) -> None:
    for cost in (0.1, 6.0, 30.0, 200.0):
        test = new()
        started = test.clock.seconds
        test.save(0, cost)  # as a run does before its first step
        test.saver.seconds = 0.0
        saved = test.due(500, each=MINUTE, cost=cost)
        assert len(saved) >= 1
        assert test.saver.seconds <= 0.0101 * (test.clock.seconds - started)


@pytest.mark.parametrize(
    ("each", "share"), [(10.0, "20%"), (0.5, "400%"), (0.0, "200000000000%"), (200.0, None)]
)
def test_a_cadence_in_steps_is_followed_even_if_it_is_expensive_and_says_so_once(
    each: float, share: str | None, new: Callable[..., Trial]
) -> None:
    test = new(save_every=1)
    assert test.due(4, each=each, cost=2.0) == [1, 2, 3, 4]
    assert test.text == (
        ""
        if share is None
        else f"a checkpoint takes 2.0 s, {share} of the time since the last one; a larger "
        "train.save_every costs less\n"
    )


@pytest.mark.parametrize(("eval_every", "adapters"), [(None, 1 + 3 * 3), (5, 2 + 3 * 4)])
def test_the_space_for_all_that_a_run_keeps_is_checked(
    eval_every: int | None,
    adapters: int,
    new: Callable[..., Trial],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The adapter itself, and two checkpoints and one that is being written, each of weights and
    two moments; with evaluations, the best adapter in all of these places, too."""
    checks: list[tuple] = []
    monkeypatch.setattr(saver_module, "check_space", lambda *check: checks.append(check))
    model = model_with_lora()
    test = new(eval_every=eval_every, keep_checkpoints=2)
    test.saver.check_space(model)
    size = sum(array.nbytes for array in weights(model).values())
    assert checks == [(test.saver.root, size * adapters, "a run that keeps 2 checkpoints")]


# --- saving ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_checkpoints_are_kept(keep: int, new: Callable[..., Trial]) -> None:
    test = new(keep_checkpoints=keep)
    for step in range(5):
        test.save(step)
    names = [path.name for path in list_checkpoints(test.saver.root)]
    assert names == [f"step-{step:06d}" for step in (4, 3, 2, 1, 0)][:keep]


def test_a_failed_save_is_a_warning_that_names_the_last_checkpoint(
    new: Callable[..., Trial],
) -> None:
    test = new()
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    assert not test.saver.save(1, full)
    assert test.save(2)
    assert not test.saver.save(3, raising(SimPOError("the folder cannot be written")))
    assert test.text.splitlines() == [
        "warning: the checkpoint of step 1 could not be written (there is none yet): [Errno 28] No "
        "space left on device",
        "warning: the checkpoint of step 3 could not be written (the last one is step-000002): the "
        "folder cannot be written",
    ]
    assert [path.name for path in test.saver.root.iterdir()] == ["step-000002"]


def test_a_full_disk_takes_the_older_checkpoints_before_the_save_is_given_up(
    new: Callable[..., Trial],
) -> None:
    test = new(keep_checkpoints=3)
    for step in (1, 2, 3):
        test.save(step)

    def write(folder: Path) -> None:
        if len(list_checkpoints(test.saver.root)) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / "state").write_text("state")

    assert test.saver.save(4, write)
    assert [p.name for p in list_checkpoints(test.saver.root)] == ["step-000004", "step-000003"]
    assert test.text == ""


def test_the_space_that_a_checkpoint_needs_is_checked_before_it_is_written(
    new: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    test = new()
    test.save(1, content="x" * 100_000)
    monkeypatch.setattr("mlx_simpo.runs.disk.free_bytes", lambda folder: 50_000)
    assert not test.saver.save(2, lambda folder: pytest.fail("was written"))
    assert (
        "could not be written (the last one is step-000001): the checkpoint of step 2 needs "
        in (test.text)
    )
    assert " MB left; delete what you no longer need" in test.text


def test_old_checkpoints_that_cannot_be_deleted_do_not_make_the_new_one_a_failure(
    new: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    test = new(keep_checkpoints=1)
    test.save(1)
    denied = raising(OSError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(saver_module, "delete_old", denied)
    assert test.save(2)
    assert test.text == (
        f"warning: old checkpoints in {test.saver.root} could not be deleted: [Errno 13] "
        "Permission denied\n"
    )


def test_a_failed_save_is_tried_again_when_the_next_one_is_due(new: Callable[..., Trial]) -> None:
    test = new(save_minutes=10.0)
    test.clock.seconds += 10 * MINUTE
    assert test.saver.is_due(1)
    assert not test.saver.save(1, raising(OSError("full")))
    assert not test.saver.is_due(2)
    test.clock.seconds += 10 * MINUTE
    assert test.saver.is_due(3)
