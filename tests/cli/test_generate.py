"""`mlx-simpo generate`: prompts from everywhere, responses as text, in columns and as JSON."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import captured_display, command, complaint, text_stream
from helpers.terminal import terminal
from helpers.tiny import user, write_jsonl

from mlx_simpo import SimPOConfig, generate
from mlx_simpo.cli import responses as layouts
from mlx_simpo.errors import visible

Capture = pytest.CaptureFixture[str]
PROMPT = "Why is the sky [blue]?"
CUT = "for more, add --max-tokens 10"


@pytest.fixture
def expected(model_folder: Path, strong_adapter: Path) -> dict[str, str]:
    config = SimPOConfig(model=str(model_folder))
    quiet = captured_display()[0]
    return generate(config, PROMPT, strong_adapter, max_tokens=5, display=quiet)


def test_one_response_is_printed_alone(
    capsys: Capture, model_folder: Path, expected: dict[str, str]
) -> None:
    options = ("--model", model_folder, "--prompt", PROMPT, "--max-tokens", 5)
    ran = command(capsys, "generate", *options)
    assert ran.out == expected["base"] + "\n"
    assert ran.err.splitlines()[-1] == f"the response was cut at 5 tokens; {CUT}"


def test_base_model_and_adapter_are_labelled(
    capsys: Capture, strong_adapter: Path, expected: dict[str, str]
) -> None:
    options = ("generate", "--adapter", strong_adapter, "-p", PROMPT, "-m", 5)
    ran = command(capsys, *options)
    assert ran.out == f"base: {expected['base']}\nadapter: {expected['adapter']}\n"
    assert f"2 of 2 responses were cut at 5 tokens; {CUT}" in ran.err
    assert command(capsys, *options, "--no-base").out == expected["adapter"] + "\n"
    several = command(capsys, *options, "-p", "Hi [b]", "--no-base").out
    first, second = several.split("\n\n")
    assert first == f"prompt: {PROMPT}\nresponse: {expected['adapter']}"
    assert second.startswith("prompt: Hi [b]\nresponse: ")


def test_json_has_everything_about_each_response(
    capsys: Capture, model_folder: Path, strong_adapter: Path, expected: dict[str, str]
) -> None:
    options = ("generate", "--adapter", strong_adapter, "-p", PROMPT, "-m", 5, "--json")
    result = command(capsys, *options, "-p", "Hi").json
    assert result["responses"][0] == {
        "prompt": PROMPT,
        "seed": None,
        **{
            source: {"text": text, "tokens": 5, "finish_reason": "length"}
            for source, text in expected.items()
        },
    }
    assert result["responses"][1].keys() == {"prompt", "seed", "base", "adapter"}
    del result["responses"]
    assert result == {
        "model": str(model_folder),
        "adapter": str(strong_adapter),
        "system_prompt": None,
        "sampling": {
            "max_tokens": 5,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "seed": None,
        },
    }
    assert command(capsys, *options, "--no-base").json["responses"][0].keys() == {
        "prompt",
        "seed",
        "adapter",
    }


def test_every_option_reaches_the_sampling(capsys: Capture, model_folder: Path) -> None:
    sampling = ("--temperature", 1.5, "--top-p", 0.9, "--top-k", 9, "--min-p", 0.01, "--seed", 4)
    options = (*sampling, "--system-prompt", "Be brief.", "-m", 6, "--prompt", PROMPT)
    result = command(capsys, "generate", "--model", model_folder, *options, "--json").json
    names = {"max_tokens": 6, "temperature": 1.5, "top_p": 0.9, "top_k": 9, "min_p": 0.01}
    assert result["sampling"] == {**names, "seed": 4}
    (record,) = result["responses"]
    text = generate(
        SimPOConfig(model=str(model_folder)),
        PROMPT,
        **result["sampling"],
        system_prompt="Be brief.",
        display=captured_display()[0],
    )
    assert (record["seed"], record["base"]["text"]) == (4, text["base"])


def test_a_seed_that_nobody_has_chosen_can_be_used_again(
    capsys: Capture, model_folder: Path
) -> None:
    options = ("generate", "--model", model_folder, "-p", PROMPT, "-m", 6, "--temp", 2, "--json")
    first = command(capsys, *options).json["responses"][0]
    assert first["seed"] is not None
    assert command(capsys, *options, "--seed", first["seed"]).json["responses"][0] == first


# --- where prompts come from -----------------------------------------------------------------


def test_prompts_of_options_files_and_standard_input(
    capsys: Capture, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "p.txt"
    text.write_text("Why?\n\nWho?\n")
    records = write_jsonl(tmp_path / "p.jsonl", [{"prompt": [user("Why?")]}, {"prompt": "Who?"}])

    def prompts(*options: Any, stdin: str = "") -> list[Any]:
        monkeypatch.setattr(sys, "stdin", text_stream(stdin))
        ran = command(capsys, "generate", "--model", model_folder, "-m", 1, "--json", *options)
        return [record["prompt"] for record in ran.json["responses"]]

    assert prompts("-p", "a", "--prompt", "b=c", "--prompts", text) == ["a", "b=c", "Why?", "Who?"]
    assert prompts("--prompts", records) == [[user("Why?")], "Who?"]
    assert prompts("--prompts", "-", stdin="x\ny\n") == ["x", "y"]
    assert prompts("--prompts", "-", stdin='{"prompt": "x"}\n') == ["x"]
    assert prompts("--prompt", "-", "-p", "z", stdin="x\ny") == ["x\ny", "z"]
    write_jsonl(records, [{"question": "Why?"}])
    assert prompts("--prompts", records, "data.columns={prompt: question}") == ["Why?"]


def test_the_columns_of_the_adapters_run_are_not_needed_twice(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {model_folder}\ndata:\n  columns:\n    prompt: question\n")
    records = write_jsonl(tmp_path / "p.jsonl", [{"question": "Why?"}])
    ran = command(capsys, "generate", config, "--prompts", records, "-m", 1, "--json")
    assert ran.json["responses"][0]["prompt"] == "Why?"


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ([], ['there is no prompt; add --prompt "What is a comet?", --prompts FILE or --chat']),
        (["-p", " "], ["the prompt is empty; write what the model should respond to"]),
        (["-p", "a", "-p", ""], ["prompt 2 is empty"]),
        (["--prompts", "no.txt"], ["cannot read no.txt: [Errno 2] No such file"]),
        (["-p", "-", "--prompts", "-"], ["- is there twice, and standard input can be read only"]),
        (["-p", "a", "--no-base"], ["--no-base leaves nobody to respond; leave it out, or add"]),
        (
            ["-p", "a", "--side-by-side", "--json"],
            [
                "--side-by-side has no effect without an adapter; add --adapter FOLDER",
                "--side-by-side has no effect with --json; leave one of them out",
            ],
        ),
        (
            ["--chat", "-p", "a", "--json"],
            [
                "--prompt has no effect in a chat; leave out --prompt or --chat",
                "--json has no effect in a chat; leave out --json or --chat",
            ],
        ),
        (
            ["-p", "a", "--top-p", "0.9", "--seed", "3"],
            [
                "--top-p is 0.9, which has no effect at temperature 0, where the likeliest token "
                "is always taken; add --temp 0.7, or leave --top-p out",
                "--seed is 3, which has no effect at temperature 0",
            ],
        ),
        (
            ["-m", "0", "--temp", "-1", "--top-k", "-2"],
            [
                "there is no prompt",
                "--max-tokens is 0; it must be 1 or greater",
                "--temp is -1.0; it must be 0 for greedy decoding, or from 0.01 to 100",
                "--top-k is -2; it must be 0 or greater",
            ],
        ),
        (["-p", "a", "--system-prompt", ""], ["the system prompt is empty"]),
        (["-p", "a", "--temp", "1", "--top-k", "600"], ["top_k is 600; it must be less than the"]),
        (["-p", "a", "--temp", "hot"], ["argument --temp/--temperature: invalid float value"]),
    ],
)
def test_mistakes_are_told_all_at_once(
    capsys: Capture, model_folder: Path, options: list[str], messages: list[str]
) -> None:
    ran = command(capsys, "generate", "--model", model_folder, *options)
    errors = [line for line in ran.err.splitlines() if line.startswith("mlx-simpo: error: ")]
    assert (ran.status, ran.out, len(errors)) == (2, "", len(messages)), ran.err
    for error, message in zip(errors, messages, strict=True):
        assert message in error


def test_standard_input_that_is_not_text(
    capsys: Capture, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", text_stream(b"ok\n\xe4\n"))
    ran = command(capsys, "generate", "--model", model_folder, "--prompts", "-")
    assert "stdin is not UTF-8; its encoding looks like WINDOWS-1252; pipe" in complaint(ran)


def test_a_model_without_a_template_takes_text_and_no_system_prompt(
    capsys: Capture, bare_folder: Path
) -> None:
    options = ("generate", "--model", bare_folder, "-p", "numbers 0 1", "-m", 3)
    assert command(capsys, *options).status == 0
    message = "a system prompt needs a chat template, and the one in use is none"
    assert message in complaint(command(capsys, *options, "--system-prompt", "x"))


# --- columns and terminals -------------------------------------------------------------------


def test_columns_where_there_is_no_terminal(
    capsys: Capture,
    strong_adapter: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = ("--adapter", strong_adapter, "-p", PROMPT, "-p", "Hi\n[b]there", "-m", 5)
    out = command(capsys, "generate", *options, "--side-by-side").out
    assert out.startswith(f"1 of 2: {PROMPT}")
    assert "2 of 2: Hi [b]there" in out
    row = next(line for line in out.splitlines() if line.startswith("│"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == [visible(text).split("\n")[0].strip() for text in expected.values()]
    assert out.count("base") == 2
    assert "\x1b" not in out


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_headings_or_columns(
    columns: int, strong_adapter: Path, expected: dict[str, str]
) -> None:
    options = ("--adapter", strong_adapter, "-p", PROMPT, "-m", 5)
    with terminal("generate", *options, columns=columns) as screen:
        status, text = screen.finish()
    assert status == 0
    assert ("━┳━" in text) == (columns >= 100)
    if columns < 100:
        start = text.index("base")
        assert text.index(visible(expected["base"])) > start
        assert text.index("adapter", start) < text.index(visible(expected["adapter"]))
    assert "cut at 5 tokens" in text


def test_a_reader_that_goes_away_ends_the_command(model_folder: Path) -> None:
    words = ("generate", "--model", str(model_folder), "-p", PROMPT, "-m", "100000")
    with subprocess.Popen(
        [sys.executable, "-m", "mlx_simpo", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert "Traceback" not in errors
    assert "Exception" not in errors


def test_what_libraries_print_meanwhile_is_not_among_the_results(
    capsys: Capture, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_simpo.sampling import generate as module

    stream = module.stream_generate

    def printing(*arguments: Any, **options: Any) -> Any:
        print("[WARNING] a model that requires much memory")
        yield from stream(*arguments, **options)

    monkeypatch.setattr(module, "stream_generate", printing)
    ran = command(capsys, "generate", "--model", model_folder, "-p", "Hi", "-m", 2, "--json")
    assert json.loads(ran.out)
    assert "[WARNING]" in ran.err


def test_hostile_responses_do_not_act_on_a_terminal(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_simpo import Response, ResponsePart

    text = "a\x1b]0;title\x07b\rc\x9b2J[bold]:smile:"
    pieces = ["a\x1b", "]0;title\x07b\r", "c\x9b2J[bold]:smile:"]
    whole = Response(text, (1,), "stop")

    def parts(*sources: Any) -> Any:
        for source in sources:
            yield from (ResponsePart(0, source, piece) for piece in pieces)
            yield ResponsePart(0, source, "", whole)

    escaped = r"a\x1b]0;title\x07b\rc\x9b2J[bold]:smile:"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    layouts.stream_text(parts("base"), ["\x1b[2J"], ["base"])
    assert capsys.readouterr().out == escaped + "\n"
    monkeypatch.setenv("COLUMNS", "120")
    for show in (layouts.stream_text, layouts.stream_columns):
        show(parts("base", "adapter"), ["\x1b[2J \x07", "x"][:1], ["base", "adapter"])
        out = capsys.readouterr().out
        assert out.count(escaped) >= 2
        assert not {"\x07", "\x9b"} & set(out)
        assert "\x1b]0" not in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    layouts.stream_text(parts("base"), ["x"], ["base"])
    assert capsys.readouterr().out == text + "\n"  # for a program, as it is


def test_long_columns_show_their_end_while_they_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=100, height=12, file=io.StringIO(), color_system=None)
    texts = {"base": "\n".join(f"line {n}" for n in range(50)), "adapter": "short"}
    console.print(layouts._columns(console, Text("title"), texts, 12))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "line 49" in shown
    assert "line 0" not in shown
    assert "short" in shown
    assert len(shown.splitlines()) <= 12
