"""The command line as a whole: files, everything that appears twice, all mistakes at once."""

from pathlib import Path

import pytest
from helpers.commands import command

from mlx_simpo.cli.command_line import CommandLine, read_command_line
from mlx_simpo.cli.main import build_parser

Capture = pytest.CaptureFixture[str]


def read(line: str, command: str = "train") -> CommandLine:
    return read_command_line(build_parser().commands[command], line.split())


def mistakes(capsys: Capture, *words: object) -> list[str]:
    """The messages of a command that is refused."""
    ran = command(capsys, *words)
    lines = ran.err.splitlines()
    assert (ran.status, ran.out) == (2, "")
    assert all(line.startswith("mlx-simpo: error: ") for line in lines)
    return [line.removeprefix("mlx-simpo: error: ") for line in lines]


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["a.yaml seed=3", "seed=3 a.yaml", "-c a.yaml seed=3"])
@pytest.mark.parametrize("name", ["train", "config"])
def test_a_file_in_any_position(line: str, name: str) -> None:
    result = read(line, name)
    assert (result.options.config, result.options.settings) == ("a.yaml", ["seed=3"])
    assert result.mistakes == []


@pytest.mark.parametrize(
    "line", ["--config a.yaml", "--config=a.yaml", "-c a.yaml --model m --data d"]
)
def test_the_option_is_the_same_on_other_commands(line: str) -> None:
    assert read(
        f"{line} --data d" if "--data" not in line else line, "evaluate"
    ).options.config == ("a.yaml")


@pytest.mark.parametrize("line", ["a.yaml b.yaml", "a.yaml -c b.yaml", "--config b.yaml a.yaml"])
def test_two_files_are_an_error(line: str) -> None:
    assert read(line).mistakes == [
        "one configuration file at most, not a.yaml and b.yaml; settings are written as "
        "name=value, without spaces"
    ]


def test_a_file_without_the_usual_ending(tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_text("model: x")
    assert read(f"{file}").options.config == str(file)


@pytest.mark.parametrize("line", ["a.yaml d", "d a.yaml", "-c a.yaml d", "a.yaml --data d"])
def test_a_file_among_the_arguments(line: str) -> None:
    parser = build_parser().commands["data"]
    for name, dest, value in (("convert", "source", "d"), ("inspect", "data", ["d"])):
        result = read_command_line(parser.commands[name], line.split())
        assert (result.options.config, getattr(result.options, dest)) == ("a.yaml", value)
        assert result.mistakes == []


def test_several_arguments_as_an_option() -> None:
    parser = build_parser().commands["data"].commands["inspect"]
    result = read_command_line(parser, ["--data", "a.jsonl", "b.jsonl", "--model", "m"])
    assert result.options.data == ["a.jsonl", "b.jsonl"]


# --- twice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "name", "typed"),
    [
        ("lora.rank=1 lora.rank=2", "lora.rank", ["lora.rank=1", "lora.rank=2"]),
        ("lora.rank=1 --lora-rank 1", "lora.rank", ["lora.rank=1", "--lora-rank 1"]),
        ("--lora-r 1 --rank 2", "lora.rank", ["--rank 2", "--lora-r 1"]),
        ("--iters 5 --max_steps 5", "train.steps", ["--iters 5", "--max_steps 5"]),
        ("--json --json", "json", ["--json", "--json"]),
        ("--resume a --resume=b", "resume", ["--resume a", "--resume=b"]),
    ],
)
def test_twice_is_an_error_that_names_both(line: str, name: str, typed: list[str]) -> None:
    expected = f"{name} is set by {' and by '.join(typed)}; remove one of them"
    assert read(line).mistakes == [expected]


def test_an_option_that_was_typed_is_not_suggested_again(capsys: Capture) -> None:
    (message,) = mistakes(capsys, "evaluate", "--model", "m", "--data", "a.csv", "b.csv")
    assert message == "--data is set by --data a.csv and by b.csv; remove one of them"
    (message,) = mistakes(capsys, "generate", "--model", "m", "--prompt", "Why", "so")
    assert message.startswith("unexpected word 'so'; ")
    assert message.endswith("; text of several words needs quotes")
    (message,) = mistakes(capsys, "generate", "--model", "m", "Why so")
    assert message == "'Why so' is not a configuration file; write --prompt 'Why so'"


def test_three_times() -> None:
    message = "seed is set by seed=1 and by --seed 2 and by --random_state 3; remove all but one"
    assert read("seed=1 --seed 2 --random_state 3").mistakes == [f"{message} of them"]


def test_an_option_that_is_a_setting_appears_once_in_either_form() -> None:
    line = read("--model a model=b --data c data.valid=d", "evaluate")
    assert line.mistakes == [
        "model is set by --model a and by model=b; remove one of them",
        "data.valid is set by --data c and by data.valid=d; remove one of them",
    ]


def test_an_argument_and_its_option() -> None:
    assert read("a --output b", "fuse").mistakes == [
        "output is set by --output b and by a; remove one of them"
    ]
    assert read("--output b", "fuse").options.output == "b"
    assert read("--adapter-path a", "fuse").mistakes == [
        "the following arguments are required: OUT; see `mlx-simpo fuse --help`"
    ]


def test_a_list_may_be_collected() -> None:
    assert read("--model m --prompt a --prompt b", "generate").options.prompt == ["a", "b"]


# --- all at once -----------------------------------------------------------------------------


def test_all_mistakes_of_words_and_file_are_told_at_once(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("lora: {rnk: 4, dropout: 2}\niters: 5\n")
    words = [file, "--foo", "lr=3", "--load_in_4bit", "seed=x", "train.steps=0", "model", "=", "x"]
    assert [message.partition(";")[0] for message in mistakes(capsys, "train", *words)] == [
        "unknown option '--foo'",
        "unknown setting 'lr'",
        "model = x: write model=x, without spaces",
        "--load_in_4bit: leave it out",
        "unknown setting 'lora.rnk'",
        "lora.dropout is 2.0",
        "unknown setting 'iters'",
        "seed is 'x'",
        "train.steps is 0",
    ]


def test_a_missing_option_is_not_told_beside_what_may_be_it(capsys: Capture) -> None:
    (message,) = mistakes(capsys, "evaluate", "--datta", "d", "--model", "m")
    assert message == "unknown option '--datta d'; did you mean '--data'?"
    (message,) = mistakes(capsys, "push", "folder", "--dry-rn")
    assert message == "unknown option '--dry-rn'; did you mean '--dry-run'?"
    (message,) = mistakes(capsys, "push", "folder")
    assert message == "the following arguments are required: REPO; see `mlx-simpo push --help`"


def test_values_of_the_commands_own_options_are_checked_with_the_rest(capsys: Capture) -> None:
    messages = mistakes(
        capsys, "generate", "--model", "m", "-p", "x", "--temp", "hot", "lora.rank=0"
    )
    assert messages == [
        "argument --temp/--temperature: invalid float value: 'hot'; see `mlx-simpo generate "
        "--help`",
        "lora.rank is 0; it must be greater than 0",
    ]


def test_a_setting_without_effect_is_an_error(capsys: Capture) -> None:
    (message,) = mistakes(capsys, "evaluate", "--model", "m", "--data", "d", "--output", "x")
    assert (
        message == "--output x: leave it out; no folder is written; --json > FILE saves the result"
    )


def test_what_the_file_says_counts_for_what_is_computed(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: m\nobjective: {beta: 10}\n")
    (message,) = mistakes(capsys, "train", file, "--gamma", "3")
    assert message.startswith("--gamma 3: write objective.gamma_beta_ratio=0.3; ")


def test_values_stay_as_they_are_typed() -> None:
    line = read("--lr 1e-05 --model_name_or_path 123 --num_train_epochs 1_0")
    assert line.options.settings == ["train.learning_rate=1e-05", "model=123", "train.epochs=1_0"]


def test_where_settings_come_from_is_known() -> None:
    line = read("--lr 1e-5 seed=3 --dora --lr_scheduler_type constant")
    assert line.options.origins == {
        "seed": "seed=3",
        "lora.dora": "--dora",
        "train.learning_rate": "--lr 1e-5",
        "train.schedule": "--lr_scheduler_type constant",
        "train.warmup_ratio": "--lr_scheduler_type constant",
    }
