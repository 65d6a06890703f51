"""Words that cannot be used: what is said of them depends on what is there."""

import shlex
from pathlib import Path

import pytest

from mlx_simpo.cli.mistakes import (
    example,
    fix,
    may_be_config,
    misplaced_word,
    no_value,
    set_twice,
    spaced,
    unknown_command,
    unknown_option,
)

COMMANDS = ["train", "evaluate", "generate", "data", "fuse", "convert", "push", "doctor", "config"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my pairs.jsonl").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / "data" / name).touch()
    (tmp_path / "settings").touch()


@pytest.mark.parametrize(
    ("word", "before", "message"),
    [
        (
            "pairs.jsonl",
            "data.train=my",
            "'pairs.jsonl' is a part of the name 'my pairs.jsonl'; write "
            "'data.train=my pairs.jsonl', quoted",
        ),
        (
            "pairs.jsonl",
            "data.train=your",
            "'pairs.jsonl' is not a configuration file; write data.train=pairs.jsonl",
        ),
        ("a.csv.gz", "", "'a.csv.gz' is not a configuration file; write data.train=a.csv.gz"),
        ("model", "", "'model' is not a setting of the form name=value; write model=VALUE"),
        ("./model", "", "'./model' is not a configuration file; write model=./model"),
        ("org/name", "", "'org/name' is not a configuration file; write model=org/name"),
        ("data", "", "'data' is not a configuration file; write data.folder=data"),
        ("rank", "", "'rank' is not a setting of the form name=value; write lora.rank=16"),
        ("lr:3", "", "'lr:3' is not a setting of the form name=value; write train.learning_rate=3"),
        ("x:3", "", "unexpected word 'x:3'; write settings as name=value, and the name of a YAML"),
        ("nonsense", "", "unexpected word 'nonsense'; write settings as name=value, and the name"),
    ],
)
def test_a_word_too_many(word: str, before: str, message: str) -> None:
    assert misplaced_word(word, before).startswith(message)


@pytest.mark.parametrize(
    ("word", "options", "right"),
    [
        ("run", ["--adapter", "--prompt"], "--adapter run"),
        ("What is it?", ["--prompt"], "--prompt 'What is it?'"),
        ("hi", ["--prompt", "--prompts"], "--prompt hi"),
        ("my pairs.jsonl", ["--prompt", "--prompts"], "--prompts 'my pairs.jsonl'"),
        ("my pairs.jsonl", ["--data"], "--data 'my pairs.jsonl'"),
        ("my pairs.jsonl", ["--output"], "'data.train=my pairs.jsonl'"),
        ("new.jsonl", ["--output"], "--output new.jsonl"),
        ("org/name", ["--prompt"], "model=org/name"),
    ],
)
def test_a_word_that_an_option_of_the_command_is_for(
    word: str, options: list[str], right: str
) -> None:
    Path("run").mkdir()
    (Path("run") / "adapter_config.json").touch()
    message = misplaced_word(word, "", options)
    assert message == f"{word!r} is not a configuration file; write {right}"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("no-such.yaml", True),
        ("no-such.yml", True),
        ("settings", True),
        ("no-such", False),
        ("model", False),
        ("my pairs.jsonl", False),
        ("", False),
    ],
)
def test_what_may_be_a_configuration_file(word: str, expected: bool) -> None:
    assert may_be_config(word) is expected


def test_the_words_to_write_are_quoted_for_a_shell() -> None:
    assert fix("lora.rank", "8") == "write lora.rank=8"
    assert fix("output", "a b") == "write 'output=a b'"
    assert (
        fix("target_modules", "[q_proj, v_proj]") == "write 'lora.target_modules=[q_proj, v_proj]'"
    )
    assert fix("simpo_gamma", "1") == (
        "write objective.gamma_beta_ratio=0.5; here the target margin is divided by beta, 2"
    )
    assert fix("no-such-name", "3") is None
    assert spaced("no-such-name", "3", "no-such-name = 3") == (
        "no-such-name = 3: write no-such-name=3, without spaces"
    )


def test_examples_are_defaults() -> None:
    assert (example("lora.rank"), example("data.chat_template")) == ("16", "auto")
    assert (example("lora.dora"), example("train.compile")) == ("false", "true")
    assert (example("model"), example("train.steps"), example("x")) == ("VALUE",) * 3
    assert example("train.sample_prompts") == "[]"
    assert no_value("lora.rank", "lora.rank=") == (
        "lora.rank= has no value; write lora.rank=16, or leave it out"
    )


def test_twice_and_more() -> None:
    assert set_twice("seed", ["a", "b"]) == "seed is set by a and by b; remove one of them"
    assert set_twice("seed", ["a", "b", "c"]).endswith(
        "a and by b and by c; remove all but one of them"
    )


def test_an_unknown_option_has_the_nearest() -> None:
    options = ["--resume", "--json"]
    assert unknown_option("--resum=x", options, takes_settings=True).endswith("mean '--resume'?")
    assert unknown_option("--lora_rnk", options, takes_settings=True).endswith("mean 'lora.rank'?")
    assert (
        unknown_option("--lora_rnk", options, takes_settings=False) == "unknown option '--lora_rnk'"
    )


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("trian a.yaml", "train"),
        ("Train", "train"),
        ("dpo", "train"),
        ("fine-tune", "train"),
        ("chat", "generate"),
        ("merge", "fuse"),
        ("preprocess", "data inspect"),
        ("a.yaml seed=3", "train a.yaml seed=3"),
        ("--prompt 'a b' generate", "generate --prompt 'a b'"),
    ],
)
def test_a_command_that_does_not_exist(words: str, written: str) -> None:
    message = unknown_command(shlex.split(words), COMMANDS, "mlx-simpo")
    assert message.endswith(f"; write mlx-simpo {written}")


def test_a_command_like_no_other() -> None:
    message = unknown_command(["qqq"], COMMANDS, "mlx-simpo")
    assert message == f"unknown command 'qqq'; the commands are {', '.join(COMMANDS)}"
