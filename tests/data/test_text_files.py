"""Text that is not UTF-8, or no text at all, is an error that says what it is and what to type."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.forms import STRINGS, tokens, write_csv, write_format
from helpers.tiny import write_jsonl

from mlx_simpo import SimPOError, SourceConfig
from mlx_simpo.data.sources import open_source
from mlx_simpo.data.text_files import guess_encoding

# A sentence of each kind of text, as its encoding has it: (iconv's name, Python's, text).
TEXTS = [
    ("WINDOWS-1252", "cp1252", "Où est le café ? Voilà l’été à Málaga, für Ämter und Größe."),
    ("WINDOWS-1252", "cp1252", "Qu’est-ce?"),
    ("WINDOWS-1252", "cp1252", "naïve"),
    ("WINDOWS-1252", "latin-1", "Skål på smörgåsbordet, señor"),
    ("WINDOWS-1251", "cp1251", "Почему небо голубое? Потому что так рассеивается свет."),
    ("SHIFT_JIS", "cp932", "空はなぜ青いのですか。光が散乱するからです。"),
    ("EUC-JP", "euc_jp", "空はなぜ青いのですか。光が散乱するからです。"),
    ("EUC-KR", "cp949", "하늘은 왜 파란가요? 빛이 산란되기 때문입니다."),
    ("GB18030", "gb18030", "天空为什么是蓝色的？因为光会散射。我们知道这个问题的答案"),
    ("BIG5", "big5", "天空為什麼是藍色的？因為光會散射。我們知道這個問題"),
]


def csv_in(folder: Path, encoding: str, text: str, name: str = "a b.csv") -> Path:
    path = folder / name
    path.write_bytes(f'prompt,chosen,rejected\n"{text}",a,b\n"{text}",b,a\n'.encode(encoding))
    return path


def error_of(path: Path | str) -> str:
    """The message of the error when a source is opened and read."""
    with pytest.raises(SimPOError) as caught:
        list(open_source(str(path)).rows())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "codec", "text"), TEXTS, ids=[codec for _, codec, _ in TEXTS])
def test_an_encoding_is_named_with_the_command_that_converts(
    tmp_path: Path, name: str, codec: str, text: str
) -> None:
    path = csv_in(tmp_path, codec, text)
    assert error_of(path) == (
        f"{path} is not UTF-8; its encoding looks like {name}; convert it with `iconv -f {name} "
        f"-t UTF-8 '{path}' > '{tmp_path / 'a b.utf8.csv'}'`"
    )
    command = error_of(path).split("`")[1]
    subprocess.run(command, shell=True, check=True)
    rows = list(open_source(str(tmp_path / "a b.utf8.csv")).rows())
    assert [row.value["prompt"] for row in rows] == [text, text]


def test_a_compressed_file_is_unpacked_by_the_command(tmp_path: Path) -> None:
    path = csv_in(tmp_path, "cp1252", "café", "a.csv")
    subprocess.run(["gzip", path], check=True)
    command = error_of(f"{path}.gz").split("`")[1]
    assert command == f"gzip -dc {path}.gz | iconv -f WINDOWS-1252 -t UTF-8 > {tmp_path}/a.utf8.csv"
    subprocess.run(command, shell=True, check=True)
    assert open_source(str(tmp_path / "a.utf8.csv")).count() == 2


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl"])
@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("utf-16", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32-le", "UTF-32LE"),
        ("utf-32-be", "UTF-32BE"),
    ],
)
def test_wide_encodings(tmp_path: Path, ending: str, codec: str, name: str) -> None:
    """Excel's "Unicode text" and PowerShell's > write UTF-16."""
    path = tmp_path / f"a.{ending}"
    (write_csv if ending == "csv" else write_jsonl)(path, STRINGS)
    expected = tokens(open_source(str(path)))
    path.write_bytes(path.read_text("utf-8").encode(codec))
    assert error_of(path).startswith(
        f"{path} is {name}, not UTF-8; convert it with `iconv -f {name}"
    )
    subprocess.run(error_of(path).split("`")[1], shell=True, check=True)
    assert tokens(open_source(str(tmp_path / f"a.utf8.{ending}"))) == expected


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl"])
def test_a_byte_order_mark_of_utf_8_is_no_text(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    (write_csv if ending == "csv" else write_jsonl)(path, STRINGS)
    expected = tokens(open_source(str(path)))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert tokens(open_source(str(path))) == expected


@pytest.mark.parametrize("num_pairs", [2, 300])
def test_json_lines_in_another_encoding_are_one_error(tmp_path: Path, num_pairs: int) -> None:
    """Not as many quarantined records as there are lines with an accent."""
    path = tmp_path / "a.jsonl"
    lines = ['{"prompt": "é", "chosen": "a", "rejected": "b"}\n'] * num_pairs
    path.write_bytes("".join(lines).encode("cp1252"))
    assert "a.jsonl is not UTF-8; its encoding looks like WINDOWS-1252; convert" in error_of(path)


def test_damaged_lines_among_good_ones_are_quarantined(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = '{"prompt": "é", "chosen": "a", "rejected": "b"}\n'.encode()
    path.write_bytes(good.replace(b"\xc3\xa9", b"\xff") * 3 + good)
    problems = [row.problem for row in open_source(str(path)).rows()]
    assert [problem is None for problem in problems] == [False, False, False, True]
    assert problems[0] == "not UTF-8: byte 0xff in column 13"


NO_TEXT = [
    (b"\x1f\x8b\x08", "gzip data; its name must end in .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data; its name must end in .zst"),
    (b"PAR1", "Parquet data; its name must end in .parquet"),
    (b"ARROW1\0\0", "Arrow data; its name must end in .arrow"),
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook; save it as CSV in UTF-8"),
]


@pytest.mark.parametrize(("start", "what"), NO_TEXT)
def test_data_that_is_no_text_in_standard_input(
    monkeypatch: pytest.MonkeyPatch, start: bytes, what: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(start + b"more")))
    kind = what.partition(";")[0]
    with pytest.raises(SimPOError) as caught:
        list(open_source("-").rows())
    assert str(caught.value) == f"stdin is {kind}, not text; name the file itself in the place of -"


@pytest.mark.parametrize(("start", "what"), NO_TEXT)
@pytest.mark.parametrize("ending", ["csv", "json", "jsonl"])
def test_data_that_is_no_text(tmp_path: Path, start: bytes, what: str, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(start + b"more")
    assert error_of(path) == f"{path} is not text but {what}"


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "csv.gz", "csv.zst", "json.zst"])
def test_truncated_archives(tmp_path: Path, ending: str) -> None:
    path = write_format(tmp_path, f".{ending}", [{**STRINGS[0], "id": n} for n in range(3000)])
    path.write_bytes(path.read_bytes()[:-20])
    assert error_of(path).startswith(f"cannot read {path}: ")


@pytest.mark.parametrize("ending", ["jsonl.gz", "csv.zst"])
def test_a_file_that_is_not_compressed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text("prompt,chosen,rejected\n")
    assert error_of(path).startswith(f"cannot read {path}: ")


def test_the_guess_for_text_of_one_byte() -> None:
    assert guess_encoding(b"\xe9") == "WINDOWS-1252"


# --- standard input --------------------------------------------------------------------------


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("kind", ["lines", "array", "object"])
def test_standard_input_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", STRINGS)
    content = {"array": json.dumps(STRINGS), "object": json.dumps({"data": STRINGS})}
    pipe(monkeypatch, content.get(kind, lines.read_text()).encode())
    source = open_source("-")
    assert tokens(source) == tokens(source) == tokens(open_source(str(lines)))
    assert source.count() == len(STRINGS)
    assert (source.name, source.files) == ("stdin", ())
    expected = 3 if kind == "lines" else 1
    assert [*source.rows()][2].source == f"stdin:{expected}"
    # Whoever opens it again in this process reads the same.
    assert tokens(open_source("-")) == tokens(source)


def test_standard_input_in_another_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, '[{"prompt": "é", "chosen": "a", "rejected": "b"}]'.encode("cp1252"))
    assert error_of("-") == (
        "stdin is not UTF-8; its encoding looks like WINDOWS-1252; pipe it through `iconv -f "
        "WINDOWS-1252 -t UTF-8`"
    )


def test_a_terminal_is_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert error_of("-") == (
        "- is standard input, and no data comes from there; pipe or redirect some"
    )


def test_standard_input_has_no_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"")
    with pytest.raises(SimPOError, match="- is standard input, which has no splits and subsets"):
        open_source(SourceConfig("-", split="train"))
