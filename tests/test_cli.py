"""The command line: results alone on stdout, bad input in one line, nothing left behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from commands import Ran, changed_copy, command, complaint, json_lines, small_run
from tiny import (
    assistant,
    some_pairs,
    tiny_config,
    tiny_folder,
    tiny_model,
    tiny_tokenizer,
    user,
    write_jsonl,
)

from mlx_simpo import SimPOConfig, __version__, evaluate, inspect, load_config, train
from mlx_simpo.strict import all_settings

Capture = pytest.CaptureFixture[str]
EVALUATION_KEYS = {
    "pairs",
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
}


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    pairs = write_jsonl(folder / "pairs.jsonl", some_pairs())
    train(load_config(None, small_run(model_folder, pairs, folder / "run")))
    return folder / "run"


@pytest.fixture(scope="module")
def bare_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has no chat template."""
    return tiny_folder(tmp_path_factory.mktemp("bare") / "model", template=None)


def with_bad_rows(path: Path, good: int, bad_at: tuple[int, ...]) -> Path:
    """Good records, with a record that has no answers in each row of ``bad_at``."""
    rows: list[dict] = list(some_pairs(good))
    for place in bad_at:
        rows.insert(place, {"prompt": "no answers"})
    return write_jsonl(path, rows)


# --- what commands print ---------------------------------------------------------------------


def test_train_prints_the_adapters_folder_and_nothing_else(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    ran = command(capsys, "train", *small_run(model_folder, pairs_file, output))
    assert (ran.status, ran.out) == (0, f"{output}\n")
    assert (output / "adapters.safetensors").is_file()
    for words in ("chat template: the tokenizer's own", "pairs to train on", "before", "after"):
        assert words in ran.err


def test_train_with_json_prints_one_object(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    run = small_run(model_folder, pairs_file, tmp_path / "run")
    ran = command(capsys, "train", "--json", *run)
    assert ran.status == 0
    assert ran.json == json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert (ran.json["steps"], ran.json["interrupted"]) == (3, False)
    assert ran.json["before"].keys() >= EVALUATION_KEYS


def test_train_takes_a_file_and_overrides_in_any_order(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    run = small_run(model_folder, pairs_file, tmp_path / "no", "train.steps=1")
    file = tmp_path / "recipe.yaml"
    file.write_text(load_config(None, run).to_yaml(), encoding="utf-8")
    ran = command(
        capsys, "train", "lora.rank=3", file, "--json", f"output={tmp_path / 'run'}", "seed=7"
    )
    assert ran.status == 0
    found = load_config(tmp_path / "run" / "config.yaml")
    assert (found.lora.rank, found.seed, found.train.steps) == (3, 7, 1)
    assert not (tmp_path / "no").exists()


def test_evaluate_prints_a_table_of_all_metrics(
    capsys: Capture, adapter: Path, pairs_file: Path
) -> None:
    ran = command(capsys, "evaluate", "--adapter", adapter, "--data", pairs_file)
    assert ran.status == 0
    for words in ("12 pairs", "base", "adapter", *(EVALUATION_KEYS - {"pairs"})):
        assert words in ran.out
    assert "12 pairs" not in ran.err


def test_evaluate_as_json_without_an_adapter(
    capsys: Capture, model_folder: Path, pairs_file: Path
) -> None:
    ran = command(capsys, "evaluate", "--model", model_folder, "--data", pairs_file, "--json")
    assert ran.status == 0
    assert ran.json.keys() >= EVALUATION_KEYS
    assert "base" not in ran.json
    config = load_config(None, [f"model={model_folder}", f"data.valid={pairs_file}"])
    expected = evaluate(config)["base"].metrics
    assert {key: ran.json[key] for key in expected} == pytest.approx(expected)


def test_evaluate_as_json_with_an_adapter(
    capsys: Capture, adapter: Path, model_folder: Path, pairs_file: Path
) -> None:
    ran = command(capsys, "evaluate", "--adapter", adapter, "--data", pairs_file, "--json")
    assert ran.status == 0
    assert ran.json["adapter"] == str(adapter)
    bare = command(capsys, "evaluate", "--model", model_folder, "--data", pairs_file, "--json")
    expected = {key: bare.json[key] for key in EVALUATION_KEYS}
    assert {key: ran.json["base"][key] for key in EVALUATION_KEYS} == pytest.approx(expected)
    assert ran.json["loss"] != pytest.approx(bare.json["loss"], abs=1e-4)  # the adapter's own


def test_evaluate_takes_the_settings_of_the_adapters_run(
    capsys: Capture, adapter: Path, pairs_file: Path
) -> None:
    command_line = ("evaluate", "--adapter", adapter, "--data", pairs_file, "--json")
    plain = command(capsys, *command_line).json
    changed = command(capsys, *command_line, "objective.beta=20").json
    assert changed["rewards/chosen"] == pytest.approx(10 * plain["rewards/chosen"])


def test_evaluate_writes_a_line_a_pair_in_input_order(
    capsys: Capture, adapter: Path, tmp_path: Path
) -> None:
    data = with_bad_rows(tmp_path / "pairs.jsonl", 12, (0, 4, 5))
    per_pair = tmp_path / "per-pair.jsonl"
    arguments = ("--data", data, "--per-pair", per_pair, "--json", "data.max_quarantined=0.5")
    ran = command(capsys, "evaluate", "--adapter", adapter, *arguments)
    assert ran.status == 0
    assert "3 records left out" in ran.err
    records = json_lines(per_pair)
    assert [r["index"] for r in records] == [1, 2, 3, *range(6, 15)]
    numbers = {f"{side}_{what}" for side in ("chosen", "rejected") for what in ("logp", "tokens")}
    assert all(r.keys() == numbers | {"index", "margin"} for r in records)
    assert ran.json["pairs"] == len(records)
    for side in ("chosen", "rejected"):
        mean = sum(r[f"{side}_logp"] for r in records) / len(records)
        assert mean == pytest.approx(ran.json[f"logps/{side}"])
    for record in records:
        margin = 2.0 * (record["chosen_logp"] - record["rejected_logp"])
        assert record["margin"] == pytest.approx(margin, abs=1e-4)


def test_evaluate_takes_one_split_of_a_folder(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "train.jsonl", some_pairs(3))
    write_jsonl(tmp_path / "test.jsonl", some_pairs(5))
    arguments = ("--model", model_folder, "--data", tmp_path, "--json")
    assert command(capsys, "evaluate", *arguments, "--split", "test").json["pairs"] == 5
    assert "holds several splits" in complaint(command(capsys, "evaluate", *arguments))


def test_generate_prints_the_answer(capsys: Capture, adapter: Path, model_folder: Path) -> None:
    asked = ("--prompt", "Why is the sky [blue]?", "--max-tokens", 5)
    bare = command(capsys, "generate", "--model", model_folder, *asked, "--json")
    assert bare.json.keys() == {"prompt", "base"}
    plain = command(capsys, "generate", "--model", model_folder, *asked)
    assert plain.out == bare.json["base"] + "\n"
    both = command(capsys, "generate", "--adapter", adapter, *asked, "--json")
    assert both.json["prompt"] == "Why is the sky [blue]?"
    assert both.json["base"] == bare.json["base"]
    text = command(capsys, "generate", "--adapter", adapter, *asked)
    assert text.out == f"base: {both.json['base']}\nadapter: {both.json['adapter']}\n"


def test_inspect_shows_counts_and_one_pair_in_tokens(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    rows = some_pairs(4)
    rows[2]["prompt"] = "Say [bold] and :100: and [/]."
    data = write_jsonl(tmp_path / "pairs.jsonl", [*rows, {"prompt": "?"}])
    ran = command(capsys, "data", "inspect", data, "--model", model_folder, "--pair", 2)
    assert ran.status == 0
    for words in ("5 │ records", "4 │ pairs that can be used", "left out: missing answer"):
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
    assert ran.json["left_out"] == {"missing answer": 2}
    assert [q["source"] for q in ran.json["left_out_records"]] == [f"{data}:2", f"{data}:4"]


def test_inspect_names_row_100(capsys: Capture, model_folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", some_pairs(100))
    ran = command(capsys, "data", "inspect", data, "--model", model_folder, "--pair", 99)
    assert "p.jsonl:100: " in ran.out.replace("\n", "")


@pytest.mark.parametrize("folder", ["a[bold]b", "a[/x]"])
def test_inspect_shows_brackets_in_a_path(
    folder: str,
    capsys: Capture,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hub data sets too: their rows are called "name[split]:number"."""
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / folder / "p.jsonl"
    path.parent.mkdir(parents=True)
    with_bad_rows(path, 5, (5,))
    ran = command(capsys, "data", "inspect", path, "--model", model_folder)
    assert ran.status == 0
    assert f"e.g. {path}:6" in ran.out
    assert f"chosen of {path}:1" in ran.out


# --- help and version ------------------------------------------------------------------------


def test_version(capsys: Capture) -> None:
    assert command(capsys, "--version") == Ran(0, f"mlx-simpo {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], ["train", "evaluate", "generate", "data"]),
        (["train"], ["--json", "[CONFIG.yaml]", "name=value"]),
        (["evaluate"], ["--data", "--split", "--adapter", "--model", "--per-pair", "--json"]),
        (["generate"], ["--prompt", "--max-tokens", "--adapter", "--model", "--json"]),
        (["data"], ["inspect"]),
        (["data", "inspect"], ["--model", "--split", "--pair", "--json"]),
    ],
)
def test_help(capsys: Capture, arguments: list[str], options: list[str]) -> None:
    ran = command(capsys, *arguments, "--help")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(" ".join(["usage: mlx-simpo", *arguments]))
    assert all(option in ran.out for option in options)


def test_train_help_lists_every_setting_with_meaning_and_default(capsys: Capture) -> None:
    lines = command(capsys, "train", "--help").out.splitlines()
    for name, item, _ in all_settings(SimPOConfig):
        meaning = lines[lines.index(f"  {name}") + 1].strip()
        assert meaning.startswith(item.metadata["help"])
    listed = "\n".join(lines)
    for text in ("(required)", "(default 5e-05)", "(default null)", "(default all-linear)"):
        assert text in listed


@pytest.mark.parametrize(
    ("arguments", "needed"), [(["data", "inspect"], "DATA"), (["evaluate"], "--data")]
)
def test_the_usage_line_has_what_is_required(
    capsys: Capture, arguments: list[str], needed: str
) -> None:
    usage = command(capsys, *arguments, "--help").out.partition("\n\n")[0]
    assert needed.lower() in usage.removeprefix("usage: mlx-simpo data").lower()


# --- bad input -------------------------------------------------------------------------------


@pytest.fixture
def refused(
    capsys: Capture, tmp_path: Path, model_folder: Path, pairs_file: Path
) -> Callable[..., str]:
    """Train with settings that are wrong: the complaint, if nothing at all was left behind."""

    def run(*settings: object, model: Path = model_folder) -> str:
        before = sorted(tmp_path.rglob("*"))
        usual = small_run(model, pairs_file, tmp_path / "out")
        message = complaint(command(capsys, "train", *usual, *settings))
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.train=/no/such.jsonl"], "no such file, folder or data set: '/no/such.jsonl'"),
        (["data.train=null"], "data.train is missing"),
        (["data.train_split=test"], "a split ('test') is asked for"),
        (["data.subset=x"], "only Hub data has subsets"),
        (["data.valid=/no/such.jsonl"], "no such file, folder or data set"),
        (["data.chat_template=/no/such.jinja"], "data.chat_template is '/no/such.jinja'"),
        (["data.compat=official"], "this tokenizer has no BOS token"),
        (["model=/no/such/model"], "model is '/no/such/model'; there is no such folder"),
        (["model=./no-such-model"], "model is './no-such-model'; there is no such folder"),
        (["revision=main"], "revision is 'main', but"),
        (["lora.target_modules=[q_proj, nope]"], "lora.target_modules names 'nope'"),
        (["lora.num_layers=3"], "lora.num_layers is 3; the model has 2 blocks"),
        (["lora.init_from=/no/such"], "/no/such is no adapter folder"),
        (["lora.rank=0"], "lora.rank is 0; it must be greater than 0"),
        (["lora.rnk=4"], "unknown setting 'lora.rnk'; did you mean 'lora.rank'?"),
        (["gamma=1"], "did you mean objective.gamma_beta_ratio"),
        (["train.epochs=1"], "train.epochs and train.steps both set the length"),
        (["--learning-rate", "1e-5"], "unknown option '--learning-rate'"),
        (["a.yaml", "b.yaml"], "one configuration file at most, not a.yaml and b.yaml"),
        (["/no/such.yaml"], "cannot read the configuration '/no/such.yaml'"),
    ],
)
def test_wrong_settings(refused: Callable, settings: list[str], message: str) -> None:
    assert message in refused(*settings)


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        ("--learning-rate=1", "train.learning_rate"),
        ("--beta", "objective.beta"),
        ("--data.train", "data.train"),
        ("--lora-rank", "lora.rank"),
    ],
)
def test_an_unknown_option_shows_the_setting(refused: Callable, option: str, setting: str) -> None:
    assert refused(option).endswith(f"did you mean {setting!r}?")


SAME = "the same words again and again, " * 12
CONVERSATION = {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "is empty; it must hold at least one preference pair"),
        ("d.jsonl", b"\n\n", "is empty"),
        (
            "d.jsonl",
            b'{"prompt": "x"}\n[1]\nnot json\n',
            "3 of 3 records are unusable, all of them",
        ),
        ("d.jsonl", b"\xff\xfe\n", "no valid JSON"),
        ("d.jsonl.gz", b"not gzip", "cannot read"),
        ("d.parquet", b"not parquet", "as Parquet"),
        ("d.csv", b"prompt,chosen,rejected\n", "is of no known kind"),
    ],
)
def test_unusable_data(
    refused: Callable, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = refused(f"data.train={path}")
    assert message in found
    assert str(path) in found


def test_too_many_bad_rows_are_counted_and_named(refused: Callable, tmp_path: Path) -> None:
    data = with_bad_rows(tmp_path / "d.jsonl", 8, (2, 5))
    message = refused(f"data.train={data}")
    assert "2 of 10 records are unusable, more than data.max_quarantined=0.05" in message
    assert f"2 × missing answer, e.g. {data}:3 " in message


def test_a_folder_without_data(refused: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no data" in refused(f"data.train={tmp_path / 'empty'}")


def test_conversations_without_a_chat_template(
    refused: Callable, tmp_path: Path, bare_folder: Path
) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [CONVERSATION])
    message = refused(f"data.train={data}", model=bare_folder)
    assert message.startswith(f"{data}:1 is a conversation")
    assert "data.chat_template" in message


def test_truncation_that_leaves_no_difference(refused: Callable, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f"{SAME}yes", "rejected": f"{SAME}no"} for i in range(4)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    lengths = ("data.max_length=64", "data.max_prompt_length=32", "data.valid_fraction=0")
    message = refused(f"data.train={data}", *lengths)
    assert "4 of 4 records are unusable, all of them: 4 × identical answers" in message


def config_json(**changes: object) -> str:
    return json.dumps({**tiny_config(), **changes})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config__json": None}, "holds no config.json"),
        ({"config__json": '{"model_type": '}, "Expecting value"),
        ({"config__json": b"\xff\xfe{}"}, "codec can't decode"),
        ({"config__json": "{}"}, "model_type"),
        ({"config__json": config_json(model_type="bert")}, "Model type bert not supported"),
        ({"config__json": config_json(hidden_size=64)}, "received shape (512, 32)"),
        ({"model__safetensors": None}, "No safetensors found"),
        ({"config__json": config_json(hidden_size="x")}, "TypeError"),
        ({"tokenizer__json": None, "tokenizer_config__json": None}, "tokenizer"),
        ({"tokenizer__json": '{"a":'}, "tokenizer.json"),
        ({"tokenizer__json": '{"a": 1}'}, ""),
        ({"tokenizer_config__json": '{"a":'}, ""),
    ],
)
def test_a_broken_model_folder(
    refused: Callable, model_folder: Path, tmp_path: Path, files: dict, message: str
) -> None:
    broken = changed_copy(model_folder, tmp_path / "broken", **files)
    found = refused(model=broken)
    assert message in found
    assert str(broken) in found


@pytest.mark.parametrize(
    "files",
    [
        {"config__json": "[]"},
        {"config__json": config_json(num_attention_heads=0)},
        {"model__safetensors": b""},
        {"model__safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
        {"tokenizer_config__json": "[]"},
    ],
    ids=["config-is-a-list", "no-heads", "empty", "lfs-pointer", "tokenizer-list"],
)
def test_a_model_folder_broken_in_other_ways(
    refused: Callable, model_folder: Path, tmp_path: Path, files: dict
) -> None:
    broken = changed_copy(model_folder, tmp_path / "broken", **files)
    assert str(broken) in refused(model=broken)


def test_weights_of_which_half_was_fetched(
    refused: Callable, model_folder: Path, tmp_path: Path
) -> None:
    whole = (model_folder / "model.safetensors").read_bytes()
    half = {"model__safetensors": whole[: len(whole) // 2]}
    broken = changed_copy(model_folder, tmp_path / "broken", **half)
    assert str(broken) in refused(model=broken)


def with_weight(folder: Path, copy: Path, name: str, value: float) -> Path:
    """A copy of a model folder with one weight matrix multiplied by ``value``."""
    weights = dict(mx.load(str(folder / "model.safetensors")))
    weights[name] = weights[name] * value
    changed = changed_copy(folder, copy, model__safetensors=None)
    mx.save_safetensors(str(changed / "model.safetensors"), weights, {"format": "pt"})
    return changed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("valid", [0, 0.2])
def test_a_loss_that_is_no_number_names_the_step_and_the_pairs(
    refused: Callable,
    model_folder: Path,
    pairs_file: Path,
    tmp_path: Path,
    value: float,
    valid: float,
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = with_weight(model_folder, tmp_path / "broken", name, value)
    message = refused(f"data.valid_fraction={valid}", "train.eval_every=1", model=broken)
    begins = "the log-probabilities of 2 of 2" if valid else "the loss of step 1"
    assert message.startswith(begins)
    named = message.partition("at ")[2].removeprefix("the pairs ").partition(";")[0].split(", ")
    assert len(named) == (2 if valid else 4)
    assert set(named) <= {f"{pairs_file}:{line}" for line in range(1, 13)}


def test_only_the_pairs_that_are_at_fault_are_named(
    refused: Callable, tmp_path: Path, model_folder: Path
) -> None:
    """Embedding and head are apart here, and one token's embedding is NaN."""
    model = tiny_model(tie_word_embeddings=False)
    token = tiny_tokenizer().encode("~", add_special_tokens=False)[0]
    model.model.embed_tokens.weight[token] = mx.array(float("nan"))
    broken = changed_copy(
        model_folder, tmp_path / "broken", config__json=config_json(tie_word_embeddings=False)
    )
    model.save_weights(str(broken / "model.safetensors"))
    rows = some_pairs(6)
    rows[3]["rejected"] += "~ and on"
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    message = refused(
        f"data.train={data}", "data.valid_fraction=0", "train.batch_size=6", model=broken
    )
    assert f"the loss of step 1 is not a finite number, at the pairs {data}:4; " in message


def test_an_output_that_holds_a_run(
    capsys: Capture, adapter: Path, model_folder: Path, pairs_file: Path
) -> None:
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    ran = command(capsys, "train", *small_run(model_folder, pairs_file, adapter))
    assert "which holds a run already" in complaint(ran)
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before


@pytest.mark.parametrize("output", ["pairs.jsonl", "pairs.jsonl/run"])
def test_an_output_that_is_a_file_or_under_one(
    refused: Callable, pairs_file: Path, tmp_path: Path, output: str
) -> None:
    before = pairs_file.read_bytes()
    assert f"output is '{tmp_path / output}'" in refused(f"output={tmp_path / output}")
    assert pairs_file.read_bytes() == before


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        (["evaluate", "--data", "PAIRS"], "--model is missing"),
        (["evaluate", "--data", "PAIRS", "--adapter", "/no/such"], "--model is missing"),
        (["evaluate", "--model", "MODEL", "--data", "/no/such.jsonl"], "no such file"),
        (
            ["evaluate", "--model", "MODEL", "--data", "PAIRS", "--adapter", "/no"],
            "no adapter folder",
        ),
        (["evaluate", "--model", "MODEL", "--data", "PAIRS", "--nope"], "unknown option '--nope'"),
        (
            ["evaluate", "--model", "MODEL", "--data", "PAIRS", "recipe.yaml"],
            "'recipe.yaml' is not",
        ),
        (
            ["evaluate", "--model", "MODEL", "--data", "PAIRS", "--per-pair", "/no/x"],
            "cannot write",
        ),
        (["generate", "--prompt", "x"], "--model is missing"),
        (["generate", "--model", "/no/such", "--prompt", "x"], "there is no such folder"),
        (["generate", "--model", "MODEL", "--prompt", "x", "lora.rank=0"], "lora.rank is 0"),
        (["data", "inspect", "/no.jsonl", "--model", "MODEL"], "no such file"),
        (["data", "inspect", "PAIRS", "--model", "MODEL", "--pair", "12"], "it must be 0 to 11"),
        (["data", "inspect", "PAIRS", "--model", "MODEL", "--pair", "-1"], "it must be 0 to 11"),
        (["data", "inspect", "PAIRS", "--model", "MODEL", "--split", "x"], "a split ('x')"),
    ],
)
def test_bad_input_of_the_other_commands(
    capsys: Capture, model_folder: Path, pairs_file: Path, command_line: list[str], message: str
) -> None:
    places = {"PAIRS": str(pairs_file), "MODEL": str(model_folder)}
    assert message in complaint(command(capsys, *(places.get(a, a) for a in command_line)))


@pytest.mark.parametrize(
    "command_line",
    [
        [],
        ["nope"],
        ["evaluate"],
        ["generate", "--prompt"],
        ["generate", "--prompt", "x", "--max-tokens", "many"],
        ["data", "inspect", "--model", "x"],
    ],
)
def test_a_command_line_that_lacks_something(capsys: Capture, command_line: list[str]) -> None:
    assert complaint(command(capsys, *command_line))


@pytest.mark.parametrize(
    "reason", ["no config", "no weights", "peft", "missing", "shape", "broken"]
)
def test_a_broken_adapter(capsys: Capture, adapter: Path, tmp_path: Path, reason: str) -> None:
    weights = dict(mx.load(str(adapter / "adapters.safetensors")))
    first = min(weights)
    files: dict = {
        "no config": {"adapter_config__json": None},
        "no weights": {"adapters__safetensors": None},
        "peft": {"adapter_config__json": '{"peft_type": "LORA"}'},
        "broken": {"adapters__safetensors": (adapter / "adapters.safetensors").read_bytes()[:999]},
    }
    broken = changed_copy(adapter, tmp_path / "broken", **files.get(reason, {}))
    if reason == "missing":
        del weights[first]
    elif reason == "shape":
        weights[first] = mx.zeros((3, 3))
    if reason in ("missing", "shape"):
        mx.save_safetensors(str(broken / "adapters.safetensors"), weights)
    for arguments in (["generate", "--prompt", "x"], ["evaluate", "--data", tmp_path / "p.jsonl"]):
        write_jsonl(tmp_path / "p.jsonl", some_pairs(2))
        message = complaint(command(capsys, *arguments, "--adapter", broken, "--json"))
        assert str(broken) in message
        assert {"peft": "PEFT adapter", "missing": first, "shape": first}.get(reason, "") in message


@pytest.mark.parametrize(
    "setting",
    [f"{name}=~nosuchuser/x" for name in ("output", "model", "data.train", "lora.init_from")]
    + [f"{name}={'x' * 300}" for name in ("output", "model", "data.train")],
    ids=lambda text: text[:16],
)
def test_a_path_that_cannot_be(refused: Callable, setting: str) -> None:
    assert setting.partition("=")[2][:100] in refused(setting)


def test_a_huge_margin_trains(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    run = small_run(model_folder, pairs_file, tmp_path / "run", "train.steps=1")
    ran = command(capsys, "train", *run, "objective.beta=1000", "objective.gamma_beta_ratio=1")
    assert ran.status == 0


def test_evaluating_a_broken_model_says_so(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    broken = with_weight(model_folder, tmp_path / "b", "model.norm.weight", float("nan"))
    ran = command(capsys, "evaluate", "--model", broken, "--data", pairs_file, "--json")
    assert "finite" in complaint(ran)


@pytest.mark.parametrize(
    "more",
    [
        ["--prompt", "x", "--max-tokens", "0"],
        ["--prompt", "", "data.chat_template=none"],
        ["--prompt", "x", "data.chat_template={{ raise_exception('no system turn') }}"],
        ["--prompt", "x", "data.chat_template={% bad %}"],
    ],
)
def test_generate_with_nothing_to_do(capsys: Capture, model_folder: Path, more: list[str]) -> None:
    assert complaint(command(capsys, "generate", "--model", model_folder, *more))


def test_a_row_with_half_an_emoji_is_left_out(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    rows = [*some_pairs(5), {"prompt": "a \ud83d b", "chosen": "x", "rejected": "y"}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    ran = command(capsys, "data", "inspect", data, "--model", model_folder, "--json")
    assert (ran.json["pairs"], len(ran.json["left_out_records"])) == (5, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_a_file_name_that_is_no_text(capsys: Capture, model_folder: Path, tmp_path: Path) -> None:
    data = with_bad_rows(tmp_path / "p\udcff.jsonl", 30, (4,))
    run = small_run(model_folder, data, tmp_path / "run")
    assert command(capsys, "train", *run).status == 0
    assert json_lines(tmp_path / "run" / "quarantined.jsonl")[0]["reason"] == "missing answer"


# --- adapters with a run of their own --------------------------------------------------------


def test_a_run_on_a_hub_subset_can_be_evaluated_on_a_file(
    capsys: Capture, adapter: Path, pairs_file: Path, tmp_path: Path
) -> None:
    text = (adapter / "config.yaml").read_text("utf-8").replace("subset: null", "subset: some")
    copy = changed_copy(adapter, tmp_path / "run", config__yaml=text)
    ran = command(capsys, "evaluate", "--adapter", copy, "--data", pairs_file, "--json")
    assert ran.status == 0


@pytest.mark.parametrize("fate", ["changed", "gone"])
def test_the_template_of_training_is_the_template_of_evaluation(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path, fate: str
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}", "utf-8")
    run = small_run(model_folder, pairs_file, tmp_path / "run", f"data.valid={pairs_file}")
    trained = command(capsys, "train", "--json", *run, f"data.chat_template={template}")
    if fate == "gone":
        template.unlink()
    else:
        template.write_text("{{ messages[0]['content'] }} » {{ messages[-1]['content'] }}", "utf-8")
    arguments = ("--adapter", tmp_path / "run", "--data", pairs_file, "--json")
    ran = command(capsys, "evaluate", *arguments)
    assert ran.status == 0
    assert ran.json["loss"] == pytest.approx(trained.json["after"]["loss"], rel=1e-4)


# --- interrupted -----------------------------------------------------------------------------


def test_ctrl_c_before_the_first_step(
    capsys: Capture,
    model_folder: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_simpo.session.train_steps", interrupt)
    ran = command(capsys, "train", *small_run(model_folder, pairs_file, tmp_path / "run"))
    assert (ran.status, ran.out) == (130, "")
    assert ran.err.splitlines()[-1] == "mlx-simpo: interrupted"
    assert not (tmp_path / "run").exists()


# --- as a program ----------------------------------------------------------------------------


def program(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlx_simpo", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_program_prints_results_alone(model_folder: Path, pairs_file: Path) -> None:
    ended = program("data", "inspect", pairs_file, "--model", model_folder, "--json")
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["pairs"] == 12
    assert ended.stderr.splitlines()[-1] == "chat template: the tokenizer's own"


def test_the_program_refuses_in_one_line(pairs_file: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "no-model", pairs_file, tmp_path / "run")
    ended = program("train", *run)
    found = complaint(Ran(ended.returncode, ended.stdout, ended.stderr))
    assert found == f"model is '{tmp_path / 'no-model'}'; there is no such folder"
    assert not (tmp_path / "run").exists()
