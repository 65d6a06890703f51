"""Words are sorted into options, settings and the rest, whatever their order."""

import pytest

from mlx_simpo.cli.main import build_parser
from mlx_simpo.cli.words import Foreign, Plain, Setting, SortedWords, sort_words

PARSER = build_parser()


def sort(*words: str, command: str = "train") -> SortedWords:
    return sort_words(PARSER.commands[command], words)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["lora.rank=8"], "lora.rank", "8"),
        (["--lora.rank=8"], "lora.rank", "8"),
        (["--lora.rank", "8"], "lora.rank", "8"),
        (["--lora-rank", "8"], "lora.rank", "8"),
        (["--lora_rank=8"], "lora.rank", "8"),
        (["--rank", "8"], "lora.rank", "8"),
        (["--Train.Learning-Rate", "1e-5"], "train.learning_rate", "1e-5"),
        (["--early-stopping-patience", "3"], "train.early_stopping.patience", "3"),
        (["--patience", "3"], "train.early_stopping.patience", "3"),
        (["--num-layers", "-1"], "lora.num_layers", "-1"),
        (["--output", "a=b"], "output", "a=b"),
        (["output=a=b"], "output", "a=b"),
        (["--output=-x"], "output", "-x"),
        (["--dora"], "lora.dora", "true"),
        (["--dora", "False"], "lora.dora", "false"),
        (["--dora=True"], "lora.dora", "true"),
        (["--no-dora"], "lora.dora", "false"),
        (["--no_dora"], "lora.dora", "false"),
        (["--compile"], "train.compile", "true"),
        (["--valid", "-"], "data.valid", "-"),
        (["--valid", "a b.jsonl"], "data.valid", "a b.jsonl"),
        (["--train", "a.jsonl"], "data.train", "a.jsonl"),
        (["data.columns.prompt=q"], "data.columns.prompt", "q"),
        (["--data.columns.prompt", "q"], "data.columns.prompt", "q"),
        (["--columns.prompt=q"], "data.columns.prompt", "q"),
        (
            ["--template-args.enable_thinking", "false"],
            "data.template_args.enable_thinking",
            "false",
        ),
        (
            ["--sample-prompts", "Why?", "How, then?"],
            "train.sample_prompts",
            "['Why?', 'How, then?']",
        ),
        (["--sample-prompts", "Why?"], "train.sample_prompts", "['Why?']"),
        (["--sample-prompts=[a, b]"], "train.sample_prompts", "[a, b]"),
        (["unknown.name=3"], "unknown.name", "3"),  # told when the settings are read
    ],
)
def test_a_setting_in_any_spelling(words: list[str], name: str, value: str) -> None:
    line = sort(*words)
    if line.foreign:  # another tool's name, too
        assert [(f.name, f.value) for f in line.foreign] == [
            (words[0][2:].replace("-", "_"), value)
        ]
        return
    assert [(s.name, s.value) for s in line.settings] == [(name, value)]
    assert (line.mistakes, line.plain, line.own) == ([], [], [])


def test_words_in_any_order() -> None:
    words = ["--resume", "runs/a b", "seed=1", "--lr", "1e-5", "my.yaml", "--json", "--rank=2"]
    line = sort(*words)
    assert line.own == ["--resume=runs/a b", "--json"]
    assert line.typed == {"resume": ["--resume 'runs/a b'"], "json": ["--json"]}
    assert line.settings == [Setting("seed", "1", "seed=1"), Setting("lora.rank", "2", "--rank=2")]
    assert line.foreign == [Foreign("lr", "1e-5", "--lr 1e-5")]
    assert line.plain == [Plain("my.yaml", "--lr")] or line.plain[0].word == "my.yaml"
    assert line.mistakes == []


def test_after_two_hyphens_nothing_is_an_option() -> None:
    line = sort("--json", "--", "--resume", "a=b")
    assert [plain.word for plain in line.plain] == ["--resume", "a=b"]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--bf16"], True),
        (["--bf16", "True"], "True"),
        (["--bf16", "my.yaml"], True),
        (["--bf16", "seed=1"], True),
        (["--bf16", "--json"], True),
        (["--report_to", "wandb"], "wandb"),
        (["--no-packing"], False),
        (["--use_gradient_checkpointing", "unsloth"], "unsloth"),
        (["--use_gradient_checkpointing"], "true"),
        (["--lora_target_modules", "q_proj", "v_proj", "my.yaml"], ["q_proj", "v_proj"]),
        (["--data", "a.jsonl", "seed=1"], "a.jsonl"),
        (["--lora_target_linear"], True),
    ],
)
def test_an_option_of_another_tool_takes_its_values(words: list[str], value: object) -> None:
    (foreign,) = sort(*words).foreign
    assert foreign.value == value


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["--lora-rank"], "--lora-rank has no value; write lora.rank=16, or leave it out"),
        (["--lora-rank="], "--lora-rank= has no value; write lora.rank=16, or leave it out"),
        (["--lora-rank", ""], "--lora-rank '' has no value; write lora.rank=16, or leave it out"),
        (["--iters"], "--iters has no value; write train.steps=VALUE, or leave it out"),
        (["--iters", "--json"], "--iters has no value; write train.steps=VALUE, or leave it out"),
        (["model="], "model= has no value; write model=VALUE, or leave it out"),
        (["model", "=", "x y"], "model = x y: write 'model=x y', without spaces"),
        (["model", "=x"], "model =x: write model=x, without spaces"),
        (["model=", "x"], "model= x: write model=x, without spaces"),
        (["lr", "=", "3"], "lr = 3: write train.learning_rate=3, without spaces"),
        (["lora.rank", "8"], "lora.rank 8: write lora.rank=8, without spaces"),
        (["learning_rate=3"], "unknown setting 'learning_rate'; write train.learning_rate=3"),
        (["data=x"], "data is a section of settings; write data.train=x"),
        (["--lora-rnk", "3"], "unknown option '--lora-rnk 3'; did you mean 'lora.rank'?"),
        (["--resum", "x"], "unknown option '--resum x'; did you mean '--resume'?"),
        (["--qqqq"], "unknown option '--qqqq'; `mlx-simpo train --help` lists them all"),
    ],
)
def test_mistakes_are_collected(words: list[str], mistake: str) -> None:
    line = sort(*words, "seed=2")
    assert line.mistakes == [mistake]
    assert line.settings == [Setting("seed", "2", "seed=2")]


def test_a_command_without_settings_names_its_option() -> None:
    line = sort("model=some/model", command="doctor")
    assert line.mistakes == [
        "doctor takes no settings; write --model some/model for 'model=some/model'"
    ]


def test_a_command_without_settings_has_none() -> None:
    line = sort("out", "seed=2", "--lora-rank", "3", command="fuse")
    assert line.mistakes == [
        "fuse takes no settings; leave out 'seed=2'",
        "unknown option '--lora-rank 3'",
    ]
    assert [plain.word for plain in line.plain] == ["out"]


def test_own_options_may_have_underscores() -> None:
    line = sort("output", "a", "--trust_remote_code", "--no_verify", "--dtype=x", command="fuse")
    assert line.own == ["--trust-remote-code", "--no-verify", "--dtype=x"]
    assert [plain.word for plain in line.plain] == ["output", "a"]
    assert line.mistakes == []


def test_an_argument_may_be_written_as_an_option() -> None:
    line = sort("--output", "a", "--adapter-path", "b", command="fuse")
    assert line.named == {"output": ["a"]}
    assert line.own == ["--adapter=b"]


def test_options_that_collect_take_one_value_each() -> None:
    line = sort("--prompt", "a", "-p", "-5?", "--max_tokens", "3", command="generate")
    assert line.own == ["--prompt=a", "--prompt=-5?", "--max-tokens=3"]
