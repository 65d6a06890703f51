"""`mlx-simpo data convert`: any accepted data as clean JSON Lines."""

import io
import json
import sys
from pathlib import Path

import pytest
from helpers.commands import command, complaint, json_lines
from helpers.forms import FORMS, STRINGS, in_form, tokens, write_csv
from helpers.tiny import write_jsonl

from mlx_simpo.data.sources import open_source


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_gives_the_same_tokens(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, form: str
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", in_form(form)[0])
    output = tmp_path / "clean.jsonl"
    ran = command(capsys, "data", "convert", data, "--output", output)
    assert (ran.status, ran.out) == (0, "")
    assert ran.err.endswith(f"6 pairs written to {output}\n")
    assert tokens(open_source(str(output))) == tokens(open_source(str(data)))
    assert all(
        record.keys() <= {"prompt", "chosen", "rejected", "tools"} for record in json_lines(output)
    )


def test_from_standard_input_to_standard_output(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_simpo.cli.main import run_command

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(STRINGS).encode())))
    assert run_command(["data", "convert", "-"]) == 0
    captured = capfdbinary.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == STRINGS
    assert captured.err.endswith(b"6 pairs written to standard output\n")


def test_the_form_and_the_quarantined_records_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{"question": "q", "chosen": "a", "rejected": b} for b in ("b", "a", "", "a")]
    data, output = tmp_path / "a.csv", tmp_path / "clean.jsonl"
    write_csv(data, rows)
    ran = command(capsys, "data", "convert", data, "--output", output, "--json")
    assert ran.status == 0
    reasons = {"identical responses": 2, "missing response": 1}
    assert ran.json == {"output": str(output), "pairs": 1, "quarantined": reasons}
    assert ran.err.splitlines()[1:] == [
        f"{data} is read as Intel Orca's form (prompt from question, responses from chosen and "
        "rejected)",
        f"1 pair written to {output}",
        f"2 quarantined: identical responses, e.g. {data}:3",
        f"1 quarantined: missing response, e.g. {data}:4 (no rejected)",
    ]


def test_columns_and_splits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"q": p["prompt"], "good": p["chosen"], "bad": p["rejected"]} for p in STRINGS]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "valid.jsonl", rows[:1])
    mapping = "data.columns={prompt: q, chosen: good, rejected: bad}"
    output = tmp_path / "clean.json.out"
    arguments = [tmp_path, "--split", "train", "--output", output, mapping]
    assert command(capsys, "data", "convert", *arguments).status == 0
    assert json_lines(output) == STRINGS


def test_settings_may_come_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [{"chosen": "It is so", "rejected": "It is not"}])
    config = tmp_path / "c.yaml"
    config.write_text("model: m\ndata: {implicit_string_prompts: true}\n")
    output = tmp_path / "clean.jsonl"
    assert command(capsys, "data", "convert", data, config, "--output", output).status == 0
    assert json_lines(output) == [{"prompt": "It is", "chosen": " so", "rejected": " not"}]


def test_errors_leave_no_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", STRINGS)
    bad = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "a"}])
    cut = tmp_path / "c.csv"
    cut.write_text('prompt,chosen,rejected\nq,a,b\nq,"a,b\n')
    output = tmp_path / "clean.jsonl"
    for data, message in (
        (bad, "1 of 1 records are quarantined, all of them: 1 × identical responses"),
        (cut, "invalid CSV: unexpected end of data"),
        (tmp_path / "no.jsonl", "no such file"),
    ):
        ran = command(capsys, "data", "convert", data, "--output", output)
        assert message in complaint(ran)
        assert not output.exists()
    ran = command(capsys, "data", "convert", good, "--output", tmp_path / "no" / "clean.jsonl")
    assert "cannot write" in complaint(ran)


def test_an_existing_file_is_not_replaced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", STRINGS)
    before = data.read_bytes()
    ran = command(capsys, "data", "convert", data, "--output", data)
    assert complaint(ran) == f"{data} exists already; name another file, or delete it"
    assert data.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["clean.parquet", "clean.csv", "clean.jsonl.gz", "clean.zst", "clean.ARROW"]
)
def test_a_file_name_that_promises_another_format_is_an_error(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "a.jsonl", STRINGS)
    ran = command(capsys, "data", "convert", data, "--output", name)
    assert complaint(ran) == (
        f"--output is {name}, but JSON Lines are written, and not compressed; write --output "
        "clean.jsonl"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert command(capsys, "data", "convert", data, "--output", "clean.jsonl").status == 0


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("data.folder=x", "what to convert is named by SOURCE"),
        ("data.train_split=train", "the split is named by --split"),
        ("data.max_samples=1", "all records are converted"),
    ],
)
def test_settings_without_effect_are_errors(
    setting: str, reason: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", STRINGS)
    ran = command(capsys, "data", "convert", data, setting)
    assert complaint(ran) == f"{setting}: leave it out; {reason}"


def test_json_needs_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", STRINGS)
    ran = command(capsys, "data", "convert", data, "--json")
    assert complaint(ran) == (
        "--json prints to standard output, where the pairs go; add --output FILE"
    )
