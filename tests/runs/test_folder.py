"""A run's folder: it must be new or empty; what is written into it, and when it is deleted."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import captured_display, json_lines, small_run
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import SimPOError, api, load_config, train
from mlx_simpo.data.pairs import Quarantined, load_pairs
from mlx_simpo.runs.folder import RunFolder, check_output_free


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
    assert RunFolder("~/new", "seed: 1", []).path == tmp_path / "new"


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


# --- the folder ------------------------------------------------------------------------------


def test_a_new_folder_has_only_the_configuration(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "a" / "run"), "seed: 1\nname: é\n", [])
    assert folder.path == tmp_path / "a" / "run"
    assert contents(folder.path) == {
        str(folder.path / "config.yaml"): "seed: 1\nname: é\n".encode()
    }


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    output = str(tmp_path / "file" / "run")
    with pytest.raises(SimPOError) as error:
        RunFolder(output, "seed: 1", [])
    assert str(error.value).startswith(f"output is {output!r}; it cannot be written: ")


def test_metrics_are_written_at_once_and_in_order(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "", [])
    records = [{"step": 1, "loss": 1.5}, {"step": 1, "eval_loss": 1.25}, {"step": 2, "loss": 1.0}]
    for count, record in enumerate(records, 1):
        folder.log(record)
        # A run that is killed leaves the metrics of what it did.
        assert json_lines(tmp_path / "metrics.jsonl") == records[:count]


def test_the_summary_is_json(tmp_path: Path) -> None:
    summary = {"adapter": "é", "steps": 3, "before": None}
    RunFolder(str(tmp_path), "", []).finish(summary)
    text = (tmp_path / "summary.json").read_text("utf-8")
    assert json.loads(text) == summary
    assert "é" in text


def test_quarantined_records_are_written_with_their_sources_and_reasons(tmp_path: Path) -> None:
    rows = [{"prompt": "é?"}, *some_pairs(1), {"prompt": "x", "chosen": "a", "rejected": "a"}]
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    quarantined = load_pairs(str(data)).quarantined
    RunFolder(str(tmp_path / "run"), "", [q._asdict() for q in quarantined])
    lines = json_lines(tmp_path / "run" / "quarantined.jsonl")
    assert lines == [json.loads(json.dumps(q._asdict())) for q in quarantined]
    assert [line["source"] for line in lines] == [f"{data}:1", f"{data}:3"]
    assert [line["reason"] for line in lines] == ["missing response", "identical responses"]


def test_half_an_emoji_can_be_written(tmp_path: Path) -> None:
    odd = Quarantined(*["\ud83d"] * len(Quarantined._fields))
    RunFolder(str(tmp_path), "", [odd._asdict()]).finish({"adapter": "\udcff"})
    (line,) = json_lines(tmp_path / "quarantined.jsonl")
    assert set(line.values()) == {"\ud83d"}
    assert json.loads((tmp_path / "summary.json").read_text("utf-8")) == {"adapter": "\udcff"}


# --- runs that do not get far ----------------------------------------------------------------


def test_a_folder_without_a_finished_step_is_deleted(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), "seed: 1", [])
    folder.log({"step": 0})
    (folder.path / "best").mkdir()
    folder.discard_if_empty()
    assert contents(tmp_path) == {}


def test_a_folder_with_a_finished_step_is_not_deleted(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), "seed: 1", [])
    folder.log({"step": 0, "eval_loss": 1.0})
    folder.log({"step": 1, "loss": 1.0})
    before = contents(tmp_path)
    folder.discard_if_empty()
    assert contents(tmp_path) == before


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
