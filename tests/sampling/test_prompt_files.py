"""Prompts from files: text, records of every form, standard input."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import text_stream
from helpers.tiny import assistant, system, user, write_jsonl

from mlx_simpo import SimPOError
from mlx_simpo.sampling.prompt_files import read_prompts
from mlx_simpo.sampling.prompts import NamedPrompt


def test_text_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffWhy?\r\n\n  What is {a} [comet]?  \n\t\nEin\u2028Satz ü\n".encode())
    assert read_prompts(str(path)) == [
        NamedPrompt("Why?", f"{path}:1"),
        NamedPrompt("What is {a} [comet]?", f"{path}:3"),
        NamedPrompt("Ein\u2028Satz ü", f"{path}:5"),
    ]


TOOLS = [{"type": "function", "function": {"name": "f"}}]
RECORDS: list[tuple[dict[str, Any], Any, list | None]] = [
    ({"prompt": "Why?"}, "Why?", None),
    ({"prompt": [user("Why?")]}, [user("Why?")], None),
    (
        {"messages": [user("a"), assistant("b"), user("c")]},
        [user("a"), assistant("b"), user("c")],
        None,
    ),
    ({"prompt": "Why?", "chosen": "x", "rejected": "y"}, "Why?", None),
    ({"prompt": "Why?", "messages": None, "system": None}, "Why?", None),
    ({"prompt": "Why?", "system": "Be kind."}, [system("Be kind."), user("Why?")], None),
    ({"prompt": "Why?", "tools": json.dumps(TOOLS)}, "Why?", TOOLS),
]


def test_records_have_a_prompt_or_messages(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [record for record, _, _ in RECORDS])
    assert read_prompts(str(path)) == [
        NamedPrompt(prompt, f"{path}:{line}", tools)
        for line, (_, prompt, tools) in enumerate(RECORDS, 1)
    ]


def test_other_columns_are_named_as_those_of_the_data(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "Why?", "rules": "Be kind."}])
    columns = {"prompt": "question", "system": "rules"}
    assert read_prompts(str(path), columns)[0].prompt == [system("Be kind."), user("Why?")]


@pytest.mark.parametrize(
    ("lines", "prompts"),
    [
        (["Why?\n", "\n", "Who? {}"], ["Why?", "Who? {}"]),
        (["\n", ' {"prompt": "Why?"}\n', '{"prompt": [{"role": "user", "content": "Who?"}]}\n'],
         ["Why?", [user("Who?")]]),
    ],
)  # fmt: skip
def test_standard_input_is_text_or_records(
    lines: list[str], prompts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", text_stream("".join(lines)))
    result = read_prompts("-")
    assert [prompt.prompt for prompt in result] == prompts
    assert result[-1].name == "stdin:3"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "p.txt has no prompts; it must have at least one"),
        ("p.txt", b"\xff\xfeW\x00", "p.txt is UTF-16, not UTF-8; convert it with `iconv"),
        ("p.jsonl", b"", "p.jsonl has no prompts"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ""}', "p.jsonl:2 is empty; write what the model"),
        ("p.jsonl", b'{"question": "a", "x": 1}', "p.jsonl:1 has no prompt and no messages; it "
         "has question, x; name the column of the prompts with data.columns, as in data.columns="),
        ("p.jsonl", b"{}", "it has no columns"),
        ("p.jsonl", b'{"prompt": "a"', "p.jsonl:1 cannot be read: invalid JSON"),
        ("p.jsonl", b"[1]", "p.jsonl:1 cannot be read: it is a list and must be a JSON object"),
        ("p.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}',
         "p.jsonl:1 ends with a turn of the assistant; it must end with the user's"),
        ("p.jsonl", b'{"prompt": "a", "tools": "x"}', "tools are not a JSON list"),
        ("p.jsonl", b'{"prompt": "a", "system": 3}', "p.jsonl:1: system is 3; it must be text"),
        ("p.jsonl", b'{"messages": [{"role": "system", "content": "a"}, {"role": "user", '
         b'"content": "b"}], "system": "c"}', "p.jsonl:1 has a system turn of its own"),
        ("p.docx", b"", "has an unknown type"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SimPOError) as raised:
        read_prompts(str(tmp_path / name))
    assert message in str(raised.value)


def test_a_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SimPOError, match=r"cannot read no.txt: .*No such file"):
        read_prompts("no.txt")
    with pytest.raises(SimPOError, match=r"no such file, folder or dataset: 'no.jsonl'"):
        read_prompts("no.jsonl")
    monkeypatch.setattr(sys, "stdin", text_stream("\n"))
    with pytest.raises(SimPOError, match="stdin has no prompts"):
        read_prompts("-")
