"""`mlx-simpo data inspect`: counts, one pair in tokens, and JSON."""

import re
from pathlib import Path

import pytest
from helpers.commands import command, complaint, with_bad_rows
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import SimPOError, inspect, load_config

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


def test_inspect_several_sources(capsys: Capture, model_folder: Path, tmp_path: Path) -> None:
    rows = some_pairs(9)
    a = write_jsonl(tmp_path / "a.jsonl", [*rows[:6], {"prompt": "?"}])
    b = write_jsonl(tmp_path / "b.jsonl", [rows[7], rows[8], rows[2]])
    ran = command(capsys, "data", "inspect", a, "--model", model_folder, b, "--json")
    summary = ran.json
    assert (summary["records"], summary["pairs"], summary["distinct_prompts"]) == (10, 9, 8)
    assert [(s["name"], s["role"], s["records"], s["pairs"]) for s in summary["sources"]] == [
        (str(a), "", 7, 6),
        (str(b), "", 3, 3),
    ]
    (leaks,) = summary["leaks"]
    assert (leaks["source"], leaks["in"], leaks["pairs"]) == (str(b), [str(a)], 1)
    assert (leaks["records"][0]["pair"], leaks["records"][0]["like"]) == (f"{b}:3", f"{a}:3")
    ran = command(capsys, "data", "inspect", a, b, "--model", model_folder, "--pair", 7)
    assert f"{b}:2" in ran.out.replace("\n", "")
    assert "1 of 3 pairs of" in ran.out
    for words in ("sources", "different prompts", "quarantined: missing response"):
        assert words in ran.out


@pytest.mark.parametrize("form", ["word", "option", "settings"])
def test_inspect_without_data_takes_those_of_the_configuration(
    form: str, capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    rows = some_pairs(9)
    files = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", part))
        for name, part in (("a", rows[:4]), ("b", rows[4:6]), ("c", [rows[0], rows[7]]))
    }
    settings = [
        f"model={model_folder}",
        f"data.train=[{{path: {files['a']}}}, {{path: {files['b']}}}]",
        f"data.valid={{chat: {files['c']}}}",
    ]
    if form != "settings":
        config = tmp_path / "recipe.yaml"
        config.write_text(
            f"model: {model_folder}\n"
            f"data:\n  train: [{{path: {files['a']}}}, {{path: {files['b']}}}]\n"
            f"  valid: {{chat: {files['c']}}}\n"
        )
        settings = [config] if form == "word" else ["--config", config]
    summary = command(capsys, "data", "inspect", *settings, "--json").json
    assert [(s["name"], s["role"], s["pairs"]) for s in summary["sources"]] == [
        ("a", "train", 4),
        ("b", "train", 2),
        ("chat", "valid", 2),
    ]
    (leaks,) = summary["leaks"]
    assert (leaks["in"], leaks["pairs"], leaks["checked"]) == (["a", "b"], 1, 2)
    out = command(capsys, "data", "inspect", *settings).out
    assert out.startswith("what will be trained and evaluated on")


def test_inspect_groups_the_digits_of_all_counts(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", some_pairs(1200))
    out = command(capsys, "data", "inspect", data, data, "--model", model_folder).out
    assert out.startswith("what will be trained on")
    counts = re.findall(r"│ +([\d,]+) │ (?:records|pairs|different prompts) +│", out)
    assert counts == ["2,400", "2,400", "1,200"]
    assert out.count("1,200 ") >= 6  # and of each source


def test_inspect_lists_quarantined_records(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    data = with_bad_rows(tmp_path / "p.jsonl", 5, (1, 3))
    ran = command(capsys, "data", "inspect", data, "--model", model_folder, "--quarantined")
    assert ran.out == "".join(
        f"{data}:{line}: missing response (no chosen and no rejected)\n" for line in (2, 4)
    )


def test_inspect_writes_a_page(capsys: Capture, model_folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", some_pairs(12))
    page = tmp_path / "page.html"
    page.write_text("from before")
    words = ("data", "inspect", data, "--model", model_folder, "--html", page)
    ran = command(capsys, *words)
    assert ran.status == 0
    assert f"the page is {page}; open it in a browser" in ran.err
    assert "12 │ records" in ran.out
    html = page.read_text("utf-8")
    assert html.startswith("<!DOCTYPE html>")
    assert html.count('class="pair"') == 12
    assert command(capsys, *words, "--html-pairs", 5, "--json").json["pairs"] == 12
    assert page.read_text("utf-8").count('class="pair"') == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--html-pairs", "5"], "--html-pairs is for the page; add --html FILE"),
        (["--html", "page.html", "--html-pairs", "0"], "--html-pairs is 0; it must be 1 or more"),
        (["--html", "/nowhere/x/page.html"], "there is no folder /nowhere/x; create it"),
        (["a.yaml", "b.yaml"], "one configuration file at most, not a.yaml and b.yaml"),
    ],
)
def test_inspect_rejects(
    words: list[str], message: str, capsys: Capture, model_folder: Path, pairs_file: Path
) -> None:
    ran = command(capsys, "data", "inspect", pairs_file, "--model", model_folder, *words)
    assert message in complaint(ran)


def test_there_must_be_something_to_look_at(capsys: Capture, model_folder: Path) -> None:
    message = "there is nothing to look at; name a file, a folder or a Hugging Face dataset"
    assert message in complaint(command(capsys, "data", "inspect", "--model", model_folder))
    config = load_config(None, [f"model={model_folder}", "data.train=x.jsonl"])
    with pytest.raises(SimPOError, match="the split is 'test', but no data are named"):
        inspect(config, split="test")


def test_rows_and_names_in_python(model_folder: Path, pairs_file: Path) -> None:
    config = load_config(None, [f"model={model_folder}"])
    rows = some_pairs(3)
    result = inspect(config, rows)
    assert [source["name"] for source in result.summary["sources"]] == ["rows"]
    assert len(result.pairs) == 3
    both = inspect(config, [pairs_file, str(pairs_file)])
    assert both.summary["pairs"] == 24
    assert both.summary["leaks"][0]["pairs"] == 12
    assert inspect(config, str(pairs_file)).summary["leaks"] == []
