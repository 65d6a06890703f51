"""Bad input to every command: one clear line on stderr, and no file left behind."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import (
    changed_copy,
    command,
    complaint,
    json_lines,
    load_arrays,
    small_run,
    with_bad_rows,
)
from helpers.tiny import (
    assistant,
    some_pairs,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    user,
    write_jsonl,
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def train_error(
    capsys: Capture, tmp_path: Path, model_folder: Path, pairs_file: Path
) -> Callable[..., str]:
    """Train with settings that are wrong; return the error, after checking that no file is left but
    that of the pairs that were not finite."""

    def run(*settings: object, model: Path = model_folder) -> str:
        before = sorted(tmp_path.rglob("*"))
        output = tmp_path / "out"
        words = small_run(model, pairs_file, output, *map(str, settings))
        message = complaint(command(capsys, "train", *words))
        if "is not a finite number" in message:
            assert {"config.yaml", "nonfinite.jsonl"} <= {path.name for path in output.iterdir()}
            shutil.rmtree(output)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.train=/no/such.jsonl"], "no such file, folder or dataset: '/no/such.jsonl'"),
        (["data.train=null"], "data.train is missing"),
        (["data.train_split=test"], "the split is 'test'"),
        (["data.subset=x"], "data.subset is 'x', but "),
        (["data.valid=/no/such.jsonl"], "no such file, folder or dataset"),
        (["data.chat_template=/no/such.jinja"], "data.chat_template is '/no/such.jinja'"),
        (["data.compat=official"], "this tokenizer has no BOS token"),
        (["model=/no/such/model"], "model is '/no/such/model'; there is no such folder"),
        (["model=./no-such-model"], "model is './no-such-model'; there is no such folder"),
        (["revision=main"], "revision is 'main', but"),
        (["lora.target_modules=[q_proj, nope]"], "lora.target_modules names 'nope'"),
        (["lora.num_layers=3"], "lora.num_layers is 3; the model has 2 layers"),
        (["lora.init_from=/no/such"], "/no/such is not the folder of an adapter"),
        (["lora.rank=0"], "lora.rank is 0; it must be greater than 0"),
        (["lora.rnk=4"], "unknown setting 'lora.rnk'; did you mean 'lora.rank'?"),
        (["gamma=1"], "unknown setting 'gamma'; write objective.gamma_beta_ratio=0.5"),
        (["train.epochs=1"], "train.epochs and train.steps both set the length"),
        (["a.yaml", "b.yaml"], "one configuration file at most, not a.yaml and b.yaml"),
        (["/no/such.yaml"], "cannot read the configuration '/no/such.yaml'"),
    ],
)
def test_wrong_settings(train_error: Callable, settings: list[str], message: str) -> None:
    assert message in train_error(*settings)


SAME = "the same words again and again, " * 12
CONVERSATION = {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "is empty; it must hold at least one preference pair"),
        ("d.jsonl", b"\n\n", "is empty"),
        (
            "d.jsonl",
            b'{"prompt": "x", "chosen": "a", "rejected": "a"}\n[1]\nnot json\n',
            "3 of 3 records are quarantined, all of them",
        ),
        ("d.jsonl", b"\xff\n", "not UTF-8: byte 0xff in column 1"),
        ("d.jsonl", b"\xff\xfe\n", "is UTF-16, not UTF-8"),
        ("d.jsonl", b'{"prompt": "x"}\n', "no record has columns that are recognized"),
        ("d.jsonl.gz", b"not gzip", "cannot read"),
        ("d.parquet", b"not parquet", "as Parquet"),
        ("d.csv", b"prompt,chosen,rejected\n", "is empty"),
        ("d.xlsx", b"PK", "has an unknown type"),
    ],
)
def test_data_without_a_valid_record(
    train_error: Callable, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    error = train_error(f"data.train={path}")
    assert message in error
    assert str(path) in error


def test_too_many_bad_rows_are_counted_and_named(train_error: Callable, tmp_path: Path) -> None:
    data = with_bad_rows(tmp_path / "d.jsonl", 8, (2, 5))
    message = train_error(f"data.train={data}")
    assert "2 of 10 records are quarantined, more than data.max_quarantined=0.05" in message
    assert f"2 × missing response, e.g. {data}:3 " in message


def test_a_folder_without_data(train_error: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no data" in train_error(f"data.train={tmp_path / 'empty'}")


def test_conversations_without_a_chat_template(
    train_error: Callable, tmp_path: Path, bare_folder: Path
) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [CONVERSATION])
    message = train_error(f"data.train={data}", model=bare_folder)
    assert message.startswith(f"{data}:1 is a conversation")
    assert "data.chat_template" in message


def test_truncation_that_leaves_no_difference(train_error: Callable, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f"{SAME}yes", "rejected": f"{SAME}no"} for i in range(4)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    lengths = ("data.max_length=64", "data.max_prompt_length=32", "data.valid_fraction=0")
    message = train_error(f"data.train={data}", *lengths)
    assert "4 of 4 records are quarantined, all of them: 4 × identical responses" in message


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


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
        ({"model__safetensors": None}, "holds no model*.safetensors"),
        ({"config__json": config_json(hidden_size="x")}, "TypeError"),
        ({"tokenizer__json": None, "tokenizer_config__json": None}, "tokenizer"),
        ({"tokenizer__json": '{"a":'}, "tokenizer.json"),
        ({"tokenizer__json": '{"a": 1}'}, "no tokenizer that can be loaded: KeyError"),
        ({"tokenizer_config__json": '{"a":'}, "tokenizer_config.json: Expecting value"),
        ({"tokenizer_config__json": "[]"}, "tokenizer_config.json must hold a JSON object, not []"),
        ({"config__json": "[]"}, "config.json must hold a JSON object, not []"),
        ({"config__json": config_json(num_attention_heads=0)}, "ZeroDivisionError"),
        ({"model__safetensors": b""}, "header too small"),
        ({"model__safetensors": LFS_POINTER}, "header too large"),
    ],
)
def test_a_broken_model_folder(
    train_error: Callable, model_folder: Path, tmp_path: Path, files: dict, message: str
) -> None:
    broken = changed_copy(model_folder, tmp_path / "broken", **files)
    error = train_error(model=broken)
    assert message in error
    assert str(broken) in error


def test_weights_that_were_half_downloaded(
    train_error: Callable, model_folder: Path, tmp_path: Path
) -> None:
    whole = (model_folder / "model.safetensors").read_bytes()
    half = {"model__safetensors": whole[: len(whole) // 2]}
    broken = changed_copy(model_folder, tmp_path / "broken", **half)
    error = train_error(model=broken)
    assert str(broken) in error
    assert "file not fully covered" in error


def with_weight(folder: Path, copy: Path, name: str, value: float) -> Path:
    """A copy of a model folder with one weight matrix multiplied by ``value``."""
    weights = load_arrays(folder / "model.safetensors")
    weights[name] = weights[name] * value
    changed = changed_copy(folder, copy, model__safetensors=None)
    mx.save_safetensors(str(changed / "model.safetensors"), weights, {"format": "pt"})
    return changed


@pytest.mark.parametrize(("value", "valid"), [(float("nan"), 0), (float("inf"), 0.2)])
def test_a_loss_that_is_not_finite_names_the_step_and_the_pairs(
    train_error: Callable,
    model_folder: Path,
    pairs_file: Path,
    tmp_path: Path,
    value: float,
    valid: float,
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = with_weight(model_folder, tmp_path / "broken", name, value)
    message = train_error(f"data.valid_fraction={valid}", model=broken)
    begins = "the log-probabilities of 2 of 2" if valid else "the loss of step 1"
    assert message.startswith(begins)
    named = message.partition("(")[2].removeprefix("pairs: ").partition(")")[0].split(", ")
    assert len(named) == (2 if valid else 4)
    assert set(named) <= {f"{pairs_file}:{line}" for line in range(1, 13)}


def test_only_the_pairs_at_fault_are_named(
    train_error: Callable, tmp_path: Path, model_folder: Path
) -> None:
    """Embedding and head are not tied here, and one token's embedding is NaN."""
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
    message = train_error(
        f"data.train={data}", "data.valid_fraction=0", "train.batch_size=6", model=broken
    )
    assert f"the loss of step 1 is not a finite number (pairs: {data}:4)" in message


def test_an_output_folder_that_holds_a_run(
    capsys: Capture, adapter: Path, model_folder: Path, pairs_file: Path
) -> None:
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    ran = command(capsys, "train", *small_run(model_folder, pairs_file, adapter))
    assert "which holds a run already" in complaint(ran)
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("pairs.jsonl", "output is 'FOLDER/pairs.jsonl', which is a file"),
        ("pairs.jsonl/run", "FOLDER/pairs.jsonl/run cannot be a folder: FOLDER/pairs.jsonl is a"),
    ],
)
def test_an_output_that_is_a_file_or_under_one(
    train_error: Callable, pairs_file: Path, tmp_path: Path, output: str, message: str
) -> None:
    before = pairs_file.read_bytes()
    error = train_error(f"output={tmp_path / output}")
    assert error.startswith(message.replace("FOLDER", str(tmp_path)))
    assert pairs_file.read_bytes() == before


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        (["evaluate", "--data", "PAIRS"], "--model is missing"),
        (["evaluate", "--data", "PAIRS", "--adapter", "/no/such"], "not the folder of an adapter"),
        (["evaluate", "--model", "MODEL", "--data", "/no/such.jsonl"], "no such file"),
        (
            ["evaluate", "--model", "MODEL", "--data", "PAIRS", "--adapter", "/no"],
            "not the folder of an adapter",
        ),
        (["evaluate", "--model", "MODEL", "--data", "PAIRS", "--nope"], "unknown option '--nope'"),
        (
            ["evaluate", "--model", "MODEL", "--data", "PAIRS", "/no/recipe.yaml"],
            "cannot read the configuration '/no/recipe.yaml'",
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
        (["data", "inspect", "PAIRS", "--model", "MODEL", "--split", "x"], "the split is 'x'"),
    ],
)
def test_bad_input_of_the_other_commands(
    capsys: Capture, model_folder: Path, pairs_file: Path, command_line: list[str], message: str
) -> None:
    paths = {"PAIRS": str(pairs_file), "MODEL": str(model_folder)}
    assert message in complaint(command(capsys, *(paths.get(a, a) for a in command_line)))


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        (["nope"], "unknown command 'nope'; the commands are train, evaluate, generate, data, "),
        (["evaluate"], "--data is missing; name the pairs to evaluate on, or a folder"),
        (["generate", "--prompt"], "argument -p/--prompt: expected one argument"),
        (["generate", "--prompt", "x", "--max-tokens", "many"], "invalid int value: 'many'"),
        (["data", "convert"], "are required: SOURCE; see `mlx-simpo data convert --help`"),
        (
            ["data", "inspect", "--model", "x"],
            "there is nothing to look at; name a file, a folder or a Hugging Face dataset",
        ),
    ],
)
def test_an_incomplete_command_line(capsys: Capture, command_line: list[str], message: str) -> None:
    assert message in complaint(command(capsys, *command_line))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config__json": None}, "is not the folder of an adapter"),
        ({"adapters__safetensors": None}, "adapters.safetensors: there is no such file"),
        ({"adapter_config__json": '{"peft_type": "LORA"}'}, "holds a PEFT adapter"),
        ({"adapters__safetensors": b"\x09" + bytes(990)}, "adapters.safetensors"),
    ],
)
def test_a_broken_adapter(
    capsys: Capture, adapter: Path, tmp_path: Path, files: dict, message: str
) -> None:
    broken = changed_copy(adapter, tmp_path / "broken", **files)
    error = complaint(command(capsys, "generate", "--prompt", "x", "--adapter", broken))
    assert str(broken) in error
    assert message in error


@pytest.mark.parametrize("shape", [None, (3, 3)])
def test_an_adapter_of_which_a_weight_is_missing_or_does_not_fit(
    capsys: Capture, adapter: Path, pairs_file: Path, tmp_path: Path, shape: tuple | None
) -> None:
    weights = load_arrays(adapter / "adapters.safetensors")
    first = min(weights)
    del weights[first]
    weights |= {} if shape is None else {first: mx.zeros(shape)}
    broken = changed_copy(adapter, tmp_path / "broken", adapters__safetensors=None)
    mx.save_safetensors(str(broken / "adapters.safetensors"), weights)
    arguments = ("--data", pairs_file, "--adapter", broken, "--json")
    error = complaint(command(capsys, "evaluate", *arguments))
    assert str(broken) in error
    assert first in error
    assert ("1 missing" if shape is None else "adapter shape (3, 3) does not match") in error


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("output=~nosuchuser/x", "Could not determine home directory"),
        ("model=~nosuchuser/x", "Could not determine home directory"),
        ("data.train=~nosuchuser/x", "Could not determine home directory"),
        ("lora.init_from=~nosuchuser/x", "Could not determine home directory"),
        (f"model={'x' * 300}", "File name too long"),
    ],
    ids=lambda text: text[:16],
)
def test_a_path_that_is_not_valid(train_error: Callable, setting: str, reason: str) -> None:
    error = train_error(setting)
    assert f"not a valid path: {setting.partition('=')[2]!r}" in error
    assert reason in error


def test_a_huge_margin_trains(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    run = small_run(model_folder, pairs_file, tmp_path / "run", "train.steps=1")
    ran = command(capsys, "train", *run, "objective.beta=1000", "objective.gamma_beta_ratio=1")
    assert ran.status == 0


def test_evaluating_a_broken_model_is_an_error(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    broken = with_weight(model_folder, tmp_path / "b", "model.norm.weight", float("nan"))
    ran = command(capsys, "evaluate", "--model", broken, "--data", pairs_file, "--json")
    assert "the log-probabilities of 12 of 12 pairs are not finite numbers" in complaint(ran)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--max-tokens", "0"], "--max-tokens is 0; it must be 1 or greater"),
        (["", "data.chat_template=none"], "the prompt is empty"),
        (["x", "data.chat_template={{ raise_exception('no system turn') }}"], "no system turn"),
        (["x", "data.chat_template={% bad %}"], "unknown tag 'bad'"),
    ],
)
def test_a_prompt_from_which_nothing_can_be_generated(
    capsys: Capture, model_folder: Path, arguments: list[str], message: str
) -> None:
    ran = command(capsys, "generate", "--model", model_folder, "--prompt", *arguments)
    assert message in complaint(ran)


def test_a_record_with_half_an_emoji_is_quarantined(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    rows = [*some_pairs(5), {"prompt": "a \ud83d b", "chosen": "x", "rejected": "y"}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    ran = command(capsys, "data", "inspect", data, "--model", model_folder, "--json")
    assert (ran.json["pairs"], len(ran.json["quarantined_records"])) == (5, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_a_file_name_that_is_not_valid_unicode(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    data = with_bad_rows(tmp_path / "p\udcff.jsonl", 30, (4,))
    run = small_run(model_folder, data, tmp_path / "run")
    assert command(capsys, "train", *run).status == 0
    assert json_lines(tmp_path / "run" / "quarantined.jsonl")[0]["reason"] == "missing response"
