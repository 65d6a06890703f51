"""Whole runs: killed, interrupted, failing and resumed, they end like one that was left alone."""

import errno
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.commands import arrays, assert_same_arrays, json_lines
from helpers.kills import content, differences
from helpers.runs import (
    EVALUATED,
    Ran,
    Runs,
    after_line,
    assert_same_run,
    finish,
    not_finite,
    raising,
    send,
    snapshots,
)
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import SimPOError, load_config
from mlx_simpo.runs.checkpoints import list_checkpoints, newest_valid
from mlx_simpo.runs.folder import RunFolder
from mlx_simpo.sampling import samples
from mlx_simpo.training import run as run_module
from mlx_simpo.training import saver as saver_module
from mlx_simpo.training import trainer
from mlx_simpo.training.session import Session

WEIGHTS = "adapters.safetensors"
FULL = OSError(errno.ENOSPC, "No space left on device")


class Whole(NamedTuple):
    """A run that nothing has disturbed, and copies of its folder after each line of its log."""

    runs: Runs
    folder: Path
    ran: Ran
    killed: list[Path]


@pytest.fixture(scope="module")
def whole(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("whole")
    runs = Runs(model_folder, write_jsonl(root / "pairs.jsonl", some_pairs()), root)
    with snapshots(root) as killed:
        ran = runs.begin("run")
    return Whole(runs, root / "run", ran, killed)


@pytest.fixture
def runs(whole: Whole, tmp_path: Path) -> Runs:
    return Runs(whole.runs.model, whole.runs.pairs, tmp_path)


def killed_at(whole: Whole, index: int, folder: Path) -> Path:
    """Copy what a run leaves that is killed after this line of its log."""
    return Path(shutil.copytree(whole.killed[index], folder))


def lines(folder: Path) -> list[tuple[int, str]]:
    """Return (step, kind) of each line of metrics.jsonl."""
    return [
        (line["step"], "eval" if EVALUATED in line else "train")
        for line in json_lines(folder / "metrics.jsonl")
    ]


LINES = [(0, "eval"), (1, "train"), (2, "train"), (2, "eval"), (3, "train"), (4, "train")]
LINES += [(4, "eval"), (5, "train"), (5, "eval")]


# --- killed ----------------------------------------------------------------------------------


def test_a_run_that_is_left_alone(whole: Whole) -> None:
    assert lines(whole.folder) == LINES
    result = whole.ran.result
    assert (result.last.step, result.signal, result.skipped) == (5, None, 0)
    assert result.before is not None
    assert result.after is not None
    assert "warning" not in whole.ran.text


def test_another_seed_would_be_noticed(whole: Whole, runs: Runs) -> None:
    """The negative control of everything below."""
    runs.begin("other", "seed=7")
    different = differences(content(runs.root / "other"), content(whole.folder))
    assert "logs" in different
    assert any(name.startswith(f"{WEIGHTS}.") for name in different)
    assert any(name.startswith("state.") for name in different)


@pytest.mark.parametrize("index", range(len(LINES)), ids=lambda i: f"{LINES[i][1]}-{LINES[i][0]}")
def test_a_run_that_is_killed_after_any_line_ends_the_same(
    index: int, whole: Whole, runs: Runs
) -> None:
    folder = killed_at(whole, index, runs.root / "run")
    assert lines(folder) == LINES[: index + 1]
    assert newest_valid(folder / "checkpoints")[1] == []
    runs.resume("run")
    assert_same_run(folder, whole.folder)


def test_resuming_again_and_again_ends_the_same(whole: Whole, runs: Runs) -> None:
    folder = killed_at(whole, 2, runs.root / "run")
    for step in (2, 4, 5):
        with after_line(step, lambda _: send(signal.SIGTERM)):
            assert runs.resume("run").result.exit_status == 143
    runs.resume("run")
    assert_same_run(folder, whole.folder)


def test_a_checkpoint_does_not_change_when_best_does(whole: Whole, runs: Runs) -> None:
    """best/ of the run and of its checkpoints are not the same files, and saving replaces files."""
    folder = killed_at(whole, 4, runs.root / "run")
    before = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    assert any(path.parent.name == "best" for path in before)

    def check(_: RunFolder) -> None:
        assert {p: p.read_bytes() for p in before if p.exists()} == before
        raise KeyboardInterrupt

    with after_line(4, check, EVALUATED):
        runs.resume("run", "train.steps=6")  # which config.yaml in best/ has, too
    assert newest_valid(folder / "checkpoints")[1] == []


def test_files_of_a_killed_save_are_removed(whole: Whole, runs: Runs) -> None:
    folder = killed_at(whole, 4, runs.root / "run")
    for remains in (folder / ".saving-abc", folder / "checkpoints" / ".saving-def"):
        remains.mkdir()
        (remains / WEIGHTS).write_text("half")
    runs.resume("run")
    assert not list(folder.rglob(".saving-*"))
    assert_same_run(folder, whole.folder)


def test_the_adapter_of_an_earlier_interruption_is_not_taken_for_the_last_one(
    whole: Whole, runs: Runs
) -> None:
    folder = Path(shutil.copytree(whole.folder, runs.root / "run"))
    earlier = list_checkpoints(folder / "checkpoints")[1]
    shutil.copyfile(earlier / WEIGHTS, folder / WEIGHTS)
    runs.resume("run")
    assert_same_run(folder, whole.folder)


# --- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step_and_says_how_to_go_on(
    number: int, status: int, whole: Whole, runs: Runs
) -> None:
    with after_line(3, lambda _: send(number)):
        result, text = runs.begin("a run")
    folder = runs.root / "a run"
    assert (result.exit_status, result.interrupted, result.last.step) == (status, True, 3)
    assert result.after is None
    assert (
        "warning: interrupted; the adapter of step 3 is saved; to go on from there: "
        f"mlx-simpo train --resume '{folder}'" in text
    )
    newest = list_checkpoints(folder / "checkpoints")[0]
    assert newest.name == "step-000003"
    assert_same_arrays(arrays(folder / WEIGHTS), arrays(newest / WEIGHTS))
    assert (folder / "summary.json").is_file()
    resumed = runs.resume("a run")
    assert resumed.result.exit_status == whole.ran.result.exit_status
    assert "resuming after step 3 of 5, from " in resumed.text
    assert_same_run(folder, whole.folder)


def test_a_signal_during_an_evaluation_ends_it_and_it_is_done_when_resumed(
    whole: Whole, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Session.evaluate_sets

    def interrupted(self: Session, title: str, check: Callable[[], None]) -> Any:
        if title == "Step 2":
            send(signal.SIGTERM)
        return evaluate(self, title, check)

    monkeypatch.setattr(Session, "evaluate_sets", interrupted)
    assert runs.begin("run").result.exit_status == 143
    assert lines(runs.root / "run") == LINES[:3]
    monkeypatch.undo()
    runs.resume("run")
    assert_same_run(runs.root / "run", whole.folder)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_before_the_first_step_leaves_nothing(
    number: int, error: type[BaseException], runs: Runs
) -> None:
    with after_line(0, lambda _: send(number), EVALUATED), pytest.raises(error) as caught:
        runs.begin("run", "train.steps=1", "train.max_grad_norm=null")
    assert caught.value.args in [(), (128 + number,)]
    assert not (runs.root / "run").exists()


def test_a_signal_during_the_last_evaluation(whole: Whole, runs: Runs) -> None:
    with after_line(5, lambda _: send(signal.SIGTERM)):
        result = runs.begin("run").result
    assert (result.exit_status, result.last.step, result.after) == (143, 5, None)
    assert runs.resume("run").result.exit_status == whole.ran.result.exit_status
    assert_same_run(runs.root / "run", whole.folder)


def test_ctrl_c_as_an_exception_in_the_middle_of_a_step(
    whole: Whole, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, at the second Ctrl-C."""
    gradients, calls = trainer.step_gradients, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(None)
        return raising(KeyboardInterrupt())() if len(calls) == 4 else gradients(*arguments)

    monkeypatch.setattr(trainer, "step_gradients", interrupted)
    result = runs.begin("run").result
    assert (result.exit_status, result.last.step) == (130, 3)
    runs.resume("run")
    assert_same_run(runs.root / "run", whole.folder)


def test_ctrl_c_as_an_exception_in_the_middle_of_a_save(
    whole: Whole, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = run_module.write_checkpoint, []

    def interrupted(*arguments: Any, **more: Any) -> None:
        write(*arguments, **more)
        calls.append(None)
        if len(calls) == 2:  # of step 2
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "write_checkpoint", interrupted)
    result = runs.begin("run").result
    assert (result.exit_status, result.last.step) == (130, 2)
    names = {path.name for path in (runs.root / "run" / "checkpoints").iterdir()}
    assert names == {"step-000000", "step-000002"}
    runs.resume("run")
    assert_same_run(runs.root / "run", whole.folder)


# --- errors ----------------------------------------------------------------------------------


def test_an_error_in_a_step_leaves_the_state_before_it(
    whole: Whole, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MLX raises it when memory runs out."""
    gradients, calls = trainer.step_gradients, []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        error = RuntimeError("[malloc] out of memory")
        return raising(error)() if len(calls) == 4 else gradients(*arguments)

    monkeypatch.setattr(trainer, "step_gradients", failing)
    with pytest.raises(SimPOError, match=r"not enough memory \(\[malloc\] out of memory"):
        runs.begin("run")
    folder = runs.root / "run"
    newest = list_checkpoints(folder / "checkpoints")[0]
    assert newest.name == "step-000003"
    assert_same_arrays(arrays(folder / WEIGHTS), arrays(newest / WEIGHTS))
    runs.resume("run")
    assert_same_run(folder, whole.folder)


def test_an_error_between_an_evaluation_and_its_samples_leaves_no_double_line(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("train.sample_prompts=[Hello, Bye]", "train.sample_tokens=4")
    more += ("train.early_stopping.patience=9",)
    runs.begin("whole", *more)
    generate, calls = samples._sample, []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        error = RuntimeError("[malloc] out of memory")
        return raising(error)() if len(calls) == 4 else generate(*arguments)  # the 2nd, after 2

    monkeypatch.setattr(samples, "_sample", failing)
    with pytest.raises(SimPOError, match=r"not enough memory \(\[malloc\] out of memory"):
        runs.begin("run", *more)
    monkeypatch.undo()
    runs.resume("run")
    assert len(json_lines(runs.root / "run" / "samples.jsonl")) == 8
    assert_same_run(runs.root / "run", runs.root / "whole")


def test_a_step_that_is_not_finite_ends_the_run_and_can_be_skipped(runs: Runs) -> None:
    with not_finite(3):
        runs.begin("whole", "train.on_nonfinite=skip")
        with pytest.raises(SimPOError, match=r"loss of step 3 .*on_nonfinite=skip omits such"):
            runs.begin("run")
        folder = runs.root / "run"
        (record,) = json_lines(folder / "nonfinite.jsonl")
        assert (record["step"], len(record["pairs"])) == (3, 2)
        assert list_checkpoints(folder / "checkpoints")[0].name == "step-000002"
        ran = runs.resume("run", "train.on_nonfinite=skip")
    assert "warning: step 3 was skipped: its loss is not a finite number; its pairs are" in ran.text
    assert (ran.result.skipped, ran.result.last.step) == (1, 5)
    assert_same_run(folder, runs.root / "whole")


def test_the_warning_of_a_step_that_is_not_finite_has_the_command_that_goes_on(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    command = f"mlx-simpo train --resume {runs.root / 'run'} train."
    with not_finite(2, 3), pytest.raises(SimPOError):
        finish_shown(runs, "train.on_nonfinite=stop")
    shown = capsys.readouterr().err
    assert (
        f"the adapter of step 1 is saved; to go on from there: {command}on_nonfinite=skip" in shown
    )
    assert f"the pairs of this step are in {runs.root / 'run' / 'nonfinite.jsonl'}" in shown
    shutil.rmtree(runs.root / "run")
    with (
        not_finite(2, 3),
        pytest.raises(SimPOError, match=r"1 were skipped before, and train\.max"),
    ):
        finish_shown(runs, "train.on_nonfinite=skip", "train.max_skipped=1")
    assert (
        f"step 2 is saved; to go on from there: {command}max_skipped=12" in capsys.readouterr().err
    )


def finish_shown(runs: Runs, *settings: str) -> None:
    """Begin a run whose notes go to stderr."""
    from mlx_simpo import train

    train(runs.config("run", *settings))


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_skipped_step_is_remembered(step: int, runs: Runs) -> None:
    settings = ("train.on_nonfinite=skip", "train.max_skipped=1", "train.eval_every=null")
    with not_finite(3):
        runs.begin("whole", *settings)
        with after_line(step, lambda _: send(signal.SIGTERM)):
            runs.begin("run", *settings)
        assert runs.resume("run").result.skipped == 1
    assert_same_run(runs.root / "run", runs.root / "whole")
    with not_finite(3, 5):
        with after_line(4, lambda _: send(signal.SIGTERM)):
            runs.begin("two", *settings)
        with pytest.raises(SimPOError, match=r"step 5 .*1 were skipped before"):
            runs.resume("two")


# --- full disks ------------------------------------------------------------------------------


def test_a_run_goes_on_when_checkpoints_cannot_be_written(
    whole: Whole, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = saver_module.save_checkpoint

    def full(root: Path, step: int, write: Callable[[Path], None]) -> Path:
        return raising(FULL)() if step in (0, 2, 4) else save(root, step, write)

    monkeypatch.setattr(saver_module, "save_checkpoint", full)
    text = runs.begin("run").text
    assert_same_run(runs.root / "run", whole.folder)
    for step in (0, 2, 4):
        assert (
            f"warning: the checkpoint of step {step} could not be written (there is none yet): "
            "[Errno 28] No space left on device" in text
        )


def test_a_run_goes_on_when_the_best_adapter_cannot_be_written(
    whole: Whole, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Session.save

    def full(self: Session, folder: Path) -> Path:
        return raising(SimPOError("no space"))() if folder.name == "best" else save(self, folder)

    monkeypatch.setattr(Session, "save", full)
    result, text = runs.begin("run")
    assert "warning: the best adapter so far, of step 2, is not kept: no space" in text
    assert result.best is None
    final = arrays(runs.root / "run" / WEIGHTS)
    assert_same_arrays(final, arrays(whole.folder / WEIGHTS))


def test_without_space_for_the_adapter_the_error_names_the_last_checkpoint(
    whole: Whole, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, folder = Session.save, runs.root / "run"

    def full(self: Session, target: Path) -> Path:
        return raising(SimPOError("no space"))() if target == folder else save(self, target)

    monkeypatch.setattr(Session, "save", full)
    with pytest.raises(SimPOError) as error:
        runs.begin("run")
    assert str(error.value) == (
        f"no space; the last checkpoint is {folder / 'checkpoints' / 'step-000005'}; to go on from "
        f"there: mlx-simpo train --resume {folder}"
    )
    monkeypatch.undo()
    runs.resume("run")
    assert_same_run(folder, whole.folder)


def test_a_summary_that_cannot_be_written_costs_nothing(
    whole: Whole, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "finish", raising(SimPOError("cannot write summary.json: full")))
    result, text = runs.begin("run")
    assert "warning: cannot write summary.json: full" in text
    assert result.as_dict()["steps"] == 5
    assert_same_arrays(arrays(runs.root / "run" / WEIGHTS), arrays(whole.folder / WEIGHTS))


def test_a_best_folder_that_somebody_moves_away_does_not_stop_the_saving(runs: Runs) -> None:
    def move(folder: RunFolder) -> None:
        (folder.path / "best").rename(folder.path.parent / "mine")

    with after_line(3, move):
        text = runs.begin("run", "train.steps=4", "train.save_every=1", "train.eval_every=2").text
    assert "could not be written" not in text
    assert list_checkpoints(runs.root / "run" / "checkpoints")[0].name == "step-000004"


# --- resuming at the end ---------------------------------------------------------------------


def test_a_finished_run_stays_as_it_is(whole: Whole, runs: Runs) -> None:
    folder = Path(shutil.copytree(whole.folder, runs.root / "run"))
    result, text = runs.resume("run")
    assert_same_run(folder, whole.folder)
    assert "resuming after step 5 of 5" in text
    expected = whole.ran.result.as_dict()
    for name in ("steps", "best", "worse", "before", "after", "train", "stopped_early"):
        assert result.as_dict()[name] == expected[name]
    assert result.exit_status == whole.ran.result.exit_status


@pytest.mark.parametrize(
    ("settings", "steps"),
    [(["train.steps=7"], 7), (["train.steps=null", "train.epochs=2"], 6)],
)
def test_a_finished_run_goes_on_with_more_steps(
    settings: list[str], steps: int, whole: Whole, runs: Runs
) -> None:
    folder = Path(shutil.copytree(whole.folder, runs.root / "run"))
    result, text = runs.resume("run", *settings)
    assert result.last.step == steps
    assert "the number of steps changed: the learning rate follows the schedule of the new" in text
    assert lines(folder)[: len(LINES)] == LINES
    assert load_config(folder / "config.yaml").train.steps == (7 if steps == 7 else None)
    assert list_checkpoints(folder / "checkpoints")[0].name == f"step-{steps:06d}"


def test_fewer_steps_than_are_done_are_an_error(whole: Whole, runs: Runs) -> None:
    folder = Path(shutil.copytree(whole.folder, runs.root / "run"))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(SimPOError) as error:
        runs.resume("run", "train.steps=4")
    assert str(error.value) == (
        "the run has done 5 steps, and with these settings it has 4; set train.steps to 5 or more, "
        "or train.epochs accordingly"
    )
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_run_that_stopped_early_says_so_and_goes_on_with_more_patience(runs: Runs) -> None:
    # With no improvement by 1000, the first two evaluations after the one before training are bad.
    settings = ("train.eval_every=1", "train.early_stopping.patience=2")
    first = runs.begin("run", *settings, "train.early_stopping.min_delta=1000")
    assert (first.result.stopped_early, first.result.last.step) == (True, 2)
    again = runs.resume("run")
    assert (again.result.stopped_early, again.result.last.step) == (True, 2)
    assert (
        "the run has stopped early, after step 2; to go on, raise train.early_stopping.patience"
        in again.text
    )
    more = runs.resume("run", "train.early_stopping.patience=9")
    assert (more.result.stopped_early, more.result.last.step) == (False, 5)


# --- resuming where something has changed ----------------------------------------------------


def test_auto_resumes_a_run_in_every_state_of_its_folder(whole: Whole, runs: Runs) -> None:
    """Absent, empty, killed before its configuration or its first checkpoint, later, finished."""

    def prepare(state: str) -> None:
        folder = runs.root / state
        if state in ("empty", "locked"):
            folder.mkdir()
        if state == "locked":
            for name in (".lock", ".config.yaml.writing", ".writable-abc"):
                (folder / name).write_text("")
        if state == "new":
            killed_at(whole, 0, folder)
            assert not (folder / "checkpoints").exists()
        if state == "later":
            killed_at(whole, 5, folder)
        if state == "finished":
            shutil.copytree(whole.folder, folder)

    for state in ("absent", "empty", "locked", "new", "later", "finished"):
        prepare(state)
        text = finish(runs.config(state, "train.resume=auto")).text
        assert_same_run(runs.root / state, whole.folder)
        assert ("has no checkpoint yet; it begins at its first step" in text) == (state == "new")
        assert ("resuming after step" in text) == (state in ("later", "finished"))


def test_a_run_killed_before_its_first_checkpoint_begins_with_its_initial_adapter(
    whole: Whole, runs: Runs
) -> None:
    initial = f"lora.init_from={whole.folder}"
    with snapshots(runs.root) as killed:
        runs.begin("whole", initial)
    killed[0].rename(runs.root / "run")
    runs.resume("run")
    assert_same_run(runs.root / "run", runs.root / "whole")


def test_a_run_can_be_moved_and_be_a_link(whole: Whole, runs: Runs) -> None:
    killed_at(whole, 5, runs.root / "elsewhere")
    (runs.root / "link").symlink_to("elsewhere")
    result = runs.resume("link").result
    assert result.adapter == runs.root / "link"
    assert (runs.root / "link").is_symlink()
    assert_same_run(runs.root / "elsewhere", whole.folder)
    config = load_config(runs.root / "elsewhere" / "config.yaml")
    assert config.output == str(runs.root / "link")


def test_a_link_to_an_empty_folder_is_an_empty_folder_again(whole: Whole, runs: Runs) -> None:
    (runs.root / "elsewhere").mkdir()
    (runs.root / "link").symlink_to("elsewhere")
    interrupt = after_line(0, lambda _: send(signal.SIGINT), EVALUATED)
    with interrupt, pytest.raises(KeyboardInterrupt):
        runs.begin("link")
    assert list((runs.root / "elsewhere").iterdir()) == []
    runs.begin("link")
    assert_same_run(runs.root / "elsewhere", whole.folder)


def test_a_damaged_checkpoint_is_replaced_by_the_one_before_with_its_best(
    whole: Whole, runs: Runs
) -> None:
    folder = Path(shutil.copytree(whole.folder, runs.root / "run"))
    newest, older = list_checkpoints(folder / "checkpoints")
    (newest / "state.safetensors").write_bytes(b"")
    with after_line(5, lambda run: check_best(run, older)):
        text = runs.resume("run").text
    assert f"warning: the checkpoint {newest} is damaged: " in text
    assert f"resuming after step 4 of 5, from {older}" in text
    assert_same_run(folder, whole.folder)


def check_best(run: RunFolder, checkpoint: Path) -> None:
    """Check that best/ of a run is that of a checkpoint."""
    best = run.path / "best"
    assert {p.name: p.read_bytes() for p in best.iterdir()} == {
        p.name: p.read_bytes() for p in (checkpoint / "best").iterdir()
    }


def test_with_damaged_checkpoints_only_nothing_is_overwritten(whole: Whole, runs: Runs) -> None:
    folder = Path(shutil.copytree(whole.folder, runs.root / "run"))
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        (checkpoint / WEIGHTS).write_bytes(b"")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(SimPOError, match=r"no checkpoint of the run is whole .*begin a new run in"):
        runs.resume("run")
    with pytest.raises(SimPOError, match="no checkpoint of the run is whole"):
        finish(runs.config("run", "train.resume=auto"))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "name", ["checkpoints/step-000005", "best", "checkpoints/step-000005/best"]
)
def test_the_folder_of_an_adapter_is_not_a_run(name: str, whole: Whole, runs: Runs) -> None:
    folder = Path(shutil.copytree(whole.folder, runs.root / "run"))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(SimPOError) as error:
        runs.resume(f"run/{name}")
    assert str(error.value) == (
        f"{folder / name} has an adapter but no checkpoints/ to go on from; name the folder of the "
        f"run, {folder}"
    )
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_finished_run_without_checkpoints_is_not_begun_again(whole: Whole, runs: Runs) -> None:
    folder = Path(shutil.copytree(whole.folder, runs.root / "run"))
    shutil.rmtree(folder / "checkpoints")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    message = rf"no checkpoints/ to go on from; begin a new run .*lora\.init_from={folder} "
    with pytest.raises(SimPOError, match=message):
        finish(runs.config("run", "train.resume=auto"))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
