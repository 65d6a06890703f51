"""A checkpoint's content: written, read back, and what is wrong with one that does not belong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import arrays, captured_display
from helpers.runs import Ran, Runs, raising
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import Session, SimPOError, prepare
from mlx_simpo.runs.checkpoints import list_checkpoints
from mlx_simpo.runs.folder import RunFolder
from mlx_simpo.runs.manifest import MANIFEST, write_manifest
from mlx_simpo.training import resuming as resuming_module
from mlx_simpo.training.fingerprint import fingerprint
from mlx_simpo.training.resuming import (
    PROGRESS,
    STATE,
    Evaluations,
    Progress,
    copy_files,
    newest_checkpoint,
    restore_checkpoint,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of five steps, in the folder "run"."""
    root = tmp_path_factory.mktemp("finished")
    runs = Runs(model_folder, write_jsonl(root / "pairs.jsonl", some_pairs()), root)
    runs.begin("run")
    return runs


@pytest.fixture
def runs(finished: Runs, tmp_path: Path) -> Runs:
    shutil.copytree(finished.root / "run", tmp_path / "run")
    return Runs(finished.model, finished.pairs, tmp_path)


def restored(runs: Runs) -> tuple[Session, Progress, Evaluations]:
    """Prepare the session of a run, and set it to its newest checkpoint."""
    session = prepare(runs.config("run"), captured_display()[0], resuming=True)
    folder = RunFolder(runs.root / "run", resuming=True)
    path = newest_checkpoint(folder, session.display)
    assert path is not None
    return session, *restore_checkpoint(session, folder, path, fingerprint(session))


def change_progress(runs: Runs, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change progress.json of the newest checkpoint, which stays valid."""
    newest = list_checkpoints(runs.root / "run" / "checkpoints")[0]
    content = json.loads((newest / PROGRESS).read_text("utf-8"))
    change(content)
    (newest / PROGRESS).write_text(json.dumps(content), encoding="utf-8")
    (newest / MANIFEST).unlink()
    write_manifest(newest, content.get("step", 5))
    return newest


def error_of(call: Callable[[], Ran]) -> str:
    with pytest.raises(SimPOError) as error:
        call()
    return str(error.value)


# --- what is saved ---------------------------------------------------------------------------


def test_a_checkpoint_that_is_restored_and_written_again_is_the_same(
    finished: Runs, runs: Runs, tmp_path: Path
) -> None:
    newest = list_checkpoints(runs.root / "run" / "checkpoints")[0]
    session, progress, evaluations = restored(runs)
    assert (session.state.step, progress.step, progress.evaluated) == (5, 5, 5)
    assert progress.best is not None
    folder = RunFolder(runs.root / "run", resuming=True)
    folder.rewind_logs(progress.logs)
    (tmp_path / "again").mkdir()
    now = fingerprint(session)
    write_checkpoint(tmp_path / "again", session, folder, progress, evaluations, now)
    before, after = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (newest, tmp_path / "again")
    )
    del before[Path(MANIFEST)]
    assert after.keys() == before.keys()
    paths = (str(runs.root).encode(), str(finished.root).encode())  # of the output folder
    different = [str(n) for n in before if after[n].replace(*paths) != before[n]]
    assert different == []


def test_evaluations_are_the_same_after_resuming(finished: Runs, runs: Runs) -> None:
    _, _, evaluations = restored(runs)
    summary = json.loads((finished.root / "run" / "summary.json").read_text("utf-8"))
    assert evaluations.before[""].as_dict() == summary["before"]
    assert evaluations.latest[""].as_dict() == summary["after"]


def test_a_restored_session_does_not_need_the_checkpoint_any_more(runs: Runs) -> None:
    """MLX reads arrays when they are used, and older checkpoints are deleted."""
    newest = list_checkpoints(runs.root / "run" / "checkpoints")[0]
    expected = arrays(newest / STATE)
    session, *_ = restored(runs)
    for file in newest.rglob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    for name, array in session.state.arrays().items():
        np.testing.assert_array_equal(np.array(array), expected[name], err_msg=name)


def test_only_files_are_copied(tmp_path: Path) -> None:
    """Somebody may have fused best/ into a folder in best/."""
    (tmp_path / "best" / "fused").mkdir(parents=True)
    (tmp_path / "best" / "a").write_text("a")
    copy_files(tmp_path / "best", tmp_path / "copy")
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["a"]
    (tmp_path / "best" / "a").write_text("b")
    assert (tmp_path / "copy" / "a").read_text() == "a"


# --- what does not belong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.pop("best"), "KeyError('best')"),
        (lambda content: content.pop("fingerprint"), "KeyError('fingerprint')"),
        (lambda content: content["fingerprint"].pop("model"), "KeyError('model')"),
        (lambda content: content["fingerprint"].update(config=[]), "TypeError("),
        (lambda content: content.update(fingerprint="x"), "TypeError("),
    ],
)
def test_progress_of_another_form_is_an_error_that_says_what_to_remove(
    change: Callable[[dict[str, Any]], object], reason: str, runs: Runs
) -> None:
    newest = change_progress(runs, change)
    message = error_of(lambda: runs.resume("run"))
    assert message.startswith(f"{newest / PROGRESS} is not as a run writes it ({reason}")
    assert message.endswith(f"; remove {newest} to go on from the checkpoint before")


def test_changed_settings_are_named_and_nothing_is_written(runs: Runs) -> None:
    before = {p: p.read_bytes() for p in runs.root.rglob("*") if p.is_file()}
    message = error_of(lambda: runs.resume("run", "seed=7", "lora.rank=4"))
    assert "seed was 42 and is 7; lora.rank was 2 and is 4" in message
    message = error_of(lambda: runs.resume("run", "train.learning_rate=1e-3"))
    assert "train.learning_rate was 0.01 and is 0.001" in message
    assert {p: p.read_bytes() for p in runs.root.rglob("*") if p.is_file()} == before


def test_a_data_file_with_other_content_is_noticed(finished: Runs, runs: Runs) -> None:
    other = write_jsonl(runs.root / "other.jsonl", some_pairs(13))
    message = error_of(lambda: runs.resume("run", f"data.train={other}"))
    assert "the training pairs changed" in message
    shutil.copyfile(finished.pairs, other)
    assert runs.resume("run", f"data.train={other}").result.last.step == 5


def test_a_data_file_that_is_gone_is_an_error_that_names_it(runs: Runs) -> None:
    gone = runs.root / "gone.jsonl"
    message = error_of(lambda: runs.resume("run", f"data.train={gone}"))
    assert message == f"no such file, folder or dataset: {str(gone)!r}"


def test_a_relative_path_is_relative_to_the_current_folder(
    finished: Runs, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the shell has it; from elsewhere the message says where the file was looked for."""
    monkeypatch.chdir(finished.root)
    runs.resume("run", "data.train=pairs.jsonl")
    monkeypatch.chdir(runs.root)
    message = error_of(lambda: runs.resume("run"))
    assert message == (
        f"no such file, folder or dataset: 'pairs.jsonl' (in the current folder, {runs.root})"
    )


def test_a_damaged_log_is_put_aside_with_a_warning(runs: Runs) -> None:
    log = runs.root / "run" / "metrics.jsonl"
    log.write_text(log.read_text()[5:])
    text = runs.resume("run").text
    assert "warning: metrics.jsonl is not as the run left it; it is now metrics-damaged" in text


def test_other_versions_are_a_warning_when_a_run_goes_on(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_simpo.training.fingerprint.version", lambda name: "9.9")
    result, text = runs.resume("run")
    assert "warning: mlx was " in text
    assert "and is 9.9: the run goes on, but not bit for bit as it would have" in text
    assert result.last.step == 5


@pytest.mark.parametrize("obstacle", ["file", "full"])
def test_a_best_folder_that_cannot_be_restored_is_an_error_of_one_line(
    obstacle: str, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = runs.root / "run" / "best"
    if obstacle == "file":
        shutil.rmtree(best)
        best.write_text("mine")
    else:
        full = raising(OSError(28, "No space left on device"))
        monkeypatch.setattr(resuming_module.shutil, "copyfile", full)
    message = error_of(lambda: runs.resume("run"))
    assert message.startswith(f"cannot restore {best}: [Errno ")
    assert message.endswith("make it a folder that can be written, with space for an adapter")
    if obstacle == "full":
        monkeypatch.undo()
        assert runs.resume("run").result.last.step == 5
        assert best.is_dir()
