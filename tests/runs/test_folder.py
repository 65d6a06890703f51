"""A run's folder: it must be new or empty; what is written into it, and when it is deleted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import captured_display, json_lines, small_run
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import SimPOError, api, load_config, train
from mlx_simpo.data.pairs import Quarantined, load_pairs
from mlx_simpo.runs.folder import LOGS, NONFINITE, RunFolder, check_output_free, open_run
from mlx_simpo.runs.lock import LOCK, lock_run


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below ``folder`` with its bytes, every folder with None."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# --- checking the output folder --------------------------------------------------------------


def test_a_new_folder_is_free_and_not_created_yet(tmp_path: Path) -> None:
    check_output_free(str(tmp_path / "a" / "b"))
    assert contents(tmp_path) == {}


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    check_output_free(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("run/config.yaml", "which holds a run already; name a new folder, or remove it"),
        ("run/notes.txt", "which is not empty; name a new folder, or remove it"),
        ("run/.hidden", "which is not empty; name a new folder, or remove it"),
        ("run/deeper/notes.txt", "which is not empty; name a new folder, or remove it"),
        ("run", "which is a file; it must be a new folder"),
    ],
)
def test_an_output_that_is_not_empty_is_an_error_and_is_not_changed(
    file: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(SimPOError) as error:
        check_output_free(str(tmp_path / "run"))
    assert str(error.value) == f"output is {str(tmp_path / 'run')!r}, {message}"
    assert contents(tmp_path) == before


def test_the_home_folder_may_be_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1")
    with pytest.raises(SimPOError, match="holds a run already"):
        check_output_free("~/run")
    with open_run("~/new", "never") as folder:
        assert folder.path == tmp_path / "new"


def test_the_output_is_checked_before_data_and_model_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*arguments: Any) -> Any:
        pytest.fail("the run was prepared")

    monkeypatch.setattr(api, "prepare", prepare)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1")
    before = contents(tmp_path)
    settings = small_run(tmp_path / "no model", tmp_path / "no data", tmp_path / "run")
    with pytest.raises(SimPOError, match="holds a run already"):
        train(load_config(None, settings), captured_display()[0])
    assert contents(tmp_path) == before


# --- opening a run ---------------------------------------------------------------------------


def begun(path: Path, *records: dict[str, Any]) -> Path:
    """A run's folder with these records in its metrics."""
    with open_run(str(path), "never") as folder:
        folder.begin("seed: 1", [])
        for record in records:
            folder.log(record)
    return path


def test_a_folder_is_new_and_resumed_only_where_that_is_asked_for(tmp_path: Path) -> None:
    path = begun(tmp_path / "run", {"step": 1})
    for resume in ("auto", "always"):
        with open_run(str(path), resume) as folder:
            assert folder.resuming
    with pytest.raises(SimPOError) as error, open_run(str(path), "never"):
        pass
    assert str(error.value) == (
        f"output is {str(path)!r}, which holds a run already; go on with it (mlx-simpo train "
        f"--resume {path}), name a new folder, or remove it"
    )
    with open_run(str(tmp_path / "other"), "auto") as folder:
        assert not folder.resuming


def test_only_a_run_can_be_resumed(tmp_path: Path) -> None:
    message = r"holds no run that could be resumed \(it has no config\.yaml\); name the output"
    with pytest.raises(SimPOError, match=message), open_run(str(tmp_path), "always"):
        pass
    assert contents(tmp_path) == {}


def test_a_run_is_locked_while_it_is_open_and_only_then(tmp_path: Path) -> None:
    with open_run(str(tmp_path / "run"), "never") as folder:
        folder.begin("", [])
        folder.log({"step": 1})
        with pytest.raises(SimPOError, match="is in use by process"), lock_run(folder.path):
            pass
        with pytest.raises(SimPOError, match="is in use"), open_run(str(folder.path), "auto"):
            pass
    with lock_run(folder.path):
        pass


def test_the_lock_of_a_killed_run_that_had_not_begun_does_not_fill_the_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / LOCK).write_text("{}")
    check_output_free(str(tmp_path))


def interrupted(output: Path, work: Callable[[RunFolder], None]) -> None:
    """Open a new run, do some work in it, and raise KeyboardInterrupt."""
    with open_run(str(output), "never") as folder:
        folder.begin("seed: 1", [])
        work(folder)
        raise KeyboardInterrupt


def test_a_folder_in_which_nothing_was_done_is_deleted_with_its_new_parents(tmp_path: Path) -> None:
    def work(folder: RunFolder) -> None:
        folder.log({"step": 0, "eval_loss": 1.0})
        (folder.path / "best").mkdir()

    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "mine" / "a" / "b", work)
    assert contents(tmp_path) == {str(tmp_path / "mine"): None}


@pytest.mark.parametrize("name", ["metrics.jsonl", NONFINITE])
def test_a_folder_with_a_finished_step_stays(name: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "run", lambda folder: folder.log({"step": 1}, name))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.yaml", name}


def test_a_resumed_folder_stays_whatever_happens(tmp_path: Path) -> None:
    path = begun(tmp_path / "run", {"step": 1})
    before = contents(path)
    with pytest.raises(KeyboardInterrupt), open_run(str(path), "always"):
        raise KeyboardInterrupt
    assert contents(path) == before


# --- its files -------------------------------------------------------------------------------


def test_a_new_folder_has_only_the_configuration(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin("seed: 1\nname: é\n", [])
    assert contents(tmp_path) == {str(tmp_path / "config.yaml"): "seed: 1\nname: é\n".encode()}


def test_a_summary_does_not_outlive_the_end_that_it_tells_of(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.finish({"steps": 3})
    folder.begin("seed: 1", [])
    assert not (tmp_path / "summary.json").exists()


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = r"cannot be a folder: .*file is a file; name another"
    opened = open_run(str(tmp_path / "file" / "run"), "never")
    with pytest.raises(SimPOError, match=message), opened:
        pass


def test_metrics_are_written_at_once_and_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    records = [{"step": 1, "loss": 1.5}, {"step": 1, "eval_loss": 1.25}, {"step": 2, "loss": 1.0}]
    for count, record in enumerate(records, 1):
        folder.log(record)
        # A run that is killed leaves the metrics of what it did.
        assert json_lines(tmp_path / "metrics.jsonl") == records[:count]


def test_the_summary_is_json(tmp_path: Path) -> None:
    summary = {"adapter": "é", "steps": 3, "before": None}
    RunFolder(tmp_path).finish(summary)
    text = (tmp_path / "summary.json").read_text("utf-8")
    assert json.loads(text) == summary
    assert "é" in text


def test_quarantined_records_are_written_with_their_sources_and_reasons(tmp_path: Path) -> None:
    rows = [{"prompt": "é?"}, *some_pairs(1), {"prompt": "x", "chosen": "a", "rejected": "a"}]
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    quarantined = load_pairs(str(data)).quarantined
    RunFolder(tmp_path).begin("", [q._asdict() for q in quarantined])
    lines = json_lines(tmp_path / "quarantined.jsonl")
    assert lines == [json.loads(json.dumps(q._asdict())) for q in quarantined]
    assert [line["source"] for line in lines] == [f"{data}:1", f"{data}:3"]
    assert [line["reason"] for line in lines] == ["missing response", "identical responses"]


def test_half_an_emoji_can_be_written(tmp_path: Path) -> None:
    odd = Quarantined(*["\ud83d"] * len(Quarantined._fields))
    folder = RunFolder(tmp_path)
    folder.begin("", [odd._asdict()])
    folder.finish({"adapter": "\udcff"})
    (line,) = json_lines(tmp_path / "quarantined.jsonl")
    assert set(line.values()) == {"\ud83d"}
    assert json.loads((tmp_path / "summary.json").read_text("utf-8")) == {"adapter": "\udcff"}


# --- logs that go back -----------------------------------------------------------------------


def test_a_resumed_run_has_the_lines_until_its_checkpoint_and_no_other(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.log({"step": step})
    positions = json.loads(json.dumps(folder.log_positions()))
    for step in (3, 4):
        folder.log({"step": step})
    folder.log({"step": 4}, NONFINITE)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote

    resumed = RunFolder(tmp_path, resuming=True)
    assert resumed.rewind_logs(positions) == []
    assert [r["step"] for r in json_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / NONFINITE).exists()
    resumed.log({"step": 3})
    assert [r["step"] for r in json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    size, _ = resumed.log_positions()["metrics.jsonl"]
    assert size == (tmp_path / "metrics.jsonl").stat().st_size
    assert resumed.log_positions().keys() == set(LOGS)


def test_the_position_after_going_back_is_that_of_an_uninterrupted_log(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole, first = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    for step in (1, 2, 3):
        whole.log({"step": step})
    first.log({"step": 1})
    positions = first.log_positions()
    first.log({"step": 9})
    resumed = RunFolder(tmp_path / "b")
    resumed.rewind_logs(positions)
    for step in (2, 3):
        resumed.log({"step": step})
    assert resumed.log_positions() == whole.log_positions()


@pytest.mark.parametrize("damage", ["shorter", "changed", "gone"])
def test_a_log_that_was_changed_is_put_aside_and_said(damage: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log({"step": 1, "loss": 1.0})
    positions = folder.log_positions()
    file = tmp_path / "metrics.jsonl"
    text = file.read_text()
    if damage == "gone":
        file.unlink()
    else:
        file.write_text(text[:-3] if damage == "shorter" else text.replace("1.0", "2.0"))
    resumed = RunFolder(tmp_path)
    (message,) = resumed.rewind_logs(positions)
    assert message.startswith("metrics.jsonl is not as the run left it; it is now metrics-damaged")
    resumed.log({"step": 2})
    assert json_lines(file) == [{"step": 2}]
    assert (tmp_path / "metrics-damaged.jsonl").exists() == (damage != "gone")


def test_lines_that_a_full_disk_refuses_come_later_and_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log({"step": 1})
    file = tmp_path / "metrics.jsonl"
    real = type(file).open

    def full(self: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if self == file and "b" in mode and mode != "rb":
            with real(self, "ab") as half:
                half.write(b'{"st')
            raise OSError(28, "No space left on device")
        return real(self, mode, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        folder.log({"step": 2})
        with pytest.raises(OSError, match="No space"):
            folder.log_positions()
    folder.log({"step": 3})
    assert [r["step"] for r in json_lines(file)] == [1, 2, 3]


# --- runs that do not get far ----------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        "data.valid=/no/such.jsonl",
        "data.chat_template=/no/such.jinja",
        "lora.target_modules=[nope]",
        "lora.init_from=/no/such",
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(
    setting: str, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    config = load_config(None, small_run(model_folder, pairs_file, tmp_path / "a" / "b", setting))
    with pytest.raises(SimPOError, match=setting.partition("=")[2].strip("[]")):
        train(config, captured_display()[0])
    assert contents(tmp_path) == before
