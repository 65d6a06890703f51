"""`mlx-simpo data inspect`: counts, one pair in tokens, and JSON."""

from pathlib import Path

import pytest
from helpers.commands import command, with_bad_rows
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import inspect, load_config

Capture = pytest.CaptureFixture[str]


def test_inspect_shows_counts_and_one_pair_in_tokens(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    rows = some_pairs(4)
    rows[2]["prompt"] = "Say [bold] and :100: and [/]."
    data = write_jsonl(tmp_path / "pairs.jsonl", [*rows, {"prompt": "?"}])
    ran = command(capsys, "data", "inspect", data, "--model", model_folder, "--pair", 2)
    assert ran.status == 0
    for words in ("5 │ records", "4 │ pairs", "quarantined: missing response"):
        assert words in ran.out
    assert "Say [bold] and :100: and [/]." in ran.out.replace("↵\n", "")
    assert "scored tokens, between" in ran.out


def test_inspect_as_json_is_the_summary(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    data = with_bad_rows(tmp_path / "pairs.jsonl", 6, (1, 3))
    ran = command(capsys, "data", "inspect", data, "--model", model_folder, "--json")
    expected = inspect(load_config(None, [f"model={model_folder}"]), str(data)).summary
    assert ran.json == expected
    assert (ran.json["records"], ran.json["pairs"]) == (8, 6)
    assert ran.json["quarantined"] == {"missing response": 2}
    assert [q["source"] for q in ran.json["quarantined_records"]] == [f"{data}:2", f"{data}:4"]


def test_inspect_shows_the_hundredth_pair(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", some_pairs(100))
    ran = command(capsys, "data", "inspect", data, "--model", model_folder, "--pair", 99)
    assert "p.jsonl:100: " in ran.out.replace("\n", "")


@pytest.mark.parametrize("folder", ["a[bold]b", "a[/x]"])
def test_inspect_shows_brackets_in_a_path_as_they_are(
    folder: str,
    capsys: Capture,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Records of Hub datasets have them, too: "name[split]:number"."""
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / folder / "p.jsonl"
    path.parent.mkdir(parents=True)
    with_bad_rows(path, 5, (5,))
    ran = command(capsys, "data", "inspect", path, "--model", model_folder)
    assert ran.status == 0
    assert f"e.g. {path}:6" in ran.out
    assert f"chosen of {path}:1" in ran.out
