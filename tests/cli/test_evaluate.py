"""`mlx-simpo evaluate`: its table, JSON and lines per pair, and where its settings come from."""

import re
from pathlib import Path

import pytest
from helpers.commands import (
    changed_copy,
    command,
    complaint,
    json_lines,
    small_run,
    with_bad_rows,
)
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import evaluate, load_config

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


def test_evaluate_prints_a_table_with_all_metrics(
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
    # The adapter's run has another batch size, and another batch rounds differently.
    rest = ("--data", pairs_file, "--json", "train.batch_size=2")
    ran = command(capsys, "evaluate", "--adapter", adapter, *rest)
    assert ran.status == 0
    assert ran.json["adapter"] == str(adapter)
    base = command(capsys, "evaluate", "--model", model_folder, *rest)
    expected = {key: base.json[key] for key in EVALUATION_KEYS}
    assert {key: ran.json["base"][key] for key in EVALUATION_KEYS} == pytest.approx(expected)
    assert ran.json["loss"] != pytest.approx(base.json["loss"], abs=1e-4)  # the adapter's own


def test_evaluate_takes_the_settings_of_the_adapters_run(
    capsys: Capture, adapter: Path, pairs_file: Path
) -> None:
    command_line = ("evaluate", "--adapter", adapter, "--data", pairs_file, "--json")
    plain = command(capsys, *command_line).json
    changed = command(capsys, *command_line, "objective.beta=20").json
    assert changed["rewards/chosen"] == pytest.approx(10 * plain["rewards/chosen"])


def test_evaluate_writes_one_line_per_pair_in_input_order(
    capsys: Capture, adapter: Path, tmp_path: Path
) -> None:
    data = with_bad_rows(tmp_path / "pairs.jsonl", 12, (0, 4, 5))
    per_pair = tmp_path / "per-pair.jsonl"
    arguments = ("--data", data, "--per-pair", per_pair, "--json", "data.max_quarantined=0.5")
    ran = command(capsys, "evaluate", "--adapter", adapter, *arguments)
    assert ran.status == 0
    assert "3 records quarantined" in ran.err
    records = json_lines(per_pair)
    assert [r["index"] for r in records] == [1, 2, 3, *range(6, 15)]
    numbers = {f"{name}_{what}" for name in ("chosen", "rejected") for what in ("logp", "tokens")}
    assert all(r.keys() == numbers | {"index", "margin"} for r in records)
    assert ran.json["pairs"] == len(records)
    for name in ("chosen", "rejected"):
        mean = sum(r[f"{name}_logp"] for r in records) / len(records)
        assert mean == pytest.approx(ran.json[f"logps/{name}"])
    for record in records:
        margin = 2.0 * (record["chosen_logp"] - record["rejected_logp"])
        assert record["margin"] == pytest.approx(margin, abs=1e-4)


def test_the_split_in_a_settings_file_is_not_that_of_data(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "recipe.yaml"
    data = "{train: x, valid: elsewhere, valid_split: test}"
    settings.write_text(f"model: {model_folder}\ndata: {data}\nobjective: {{beta: 4}}\n")
    ran = command(capsys, "evaluate", "--data", str(pairs_file), "--json", str(settings))
    assert ran.status == 0, ran.err
    assert ran.json["pairs"] == 12
    assert ran.json["rewards/chosen"] == pytest.approx(4 * ran.json["logps/chosen"], rel=1e-5)


def test_evaluate_takes_one_split_of_a_folder(
    capsys: Capture, model_folder: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "train.jsonl", some_pairs(3))
    write_jsonl(tmp_path / "test.jsonl", some_pairs(5))
    arguments = ("--model", model_folder, "--data", tmp_path, "--json")
    assert command(capsys, "evaluate", *arguments, "--split", "test").json["pairs"] == 5
    assert "holds several splits" in complaint(command(capsys, "evaluate", *arguments))


def test_evaluate_takes_the_validation_files_of_a_folder(
    capsys: Capture, model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    for name, size in (("train", 3), ("dev", 4), ("test", 5)):
        write_jsonl(tmp_path / f"{name}.jsonl", some_pairs(size))
    for arguments in (("--model", model_folder), ("--adapter", adapter)):
        words = ("evaluate", *arguments, f"data.folder={tmp_path}", "--json")
        assert command(capsys, *words).json["pairs"] == 4
        assert command(capsys, *words, "--split", "test").json["pairs"] == 5
    (tmp_path / "dev.jsonl").unlink()
    assert complaint(command(capsys, *words)) == (
        f"data.folder is '{tmp_path}', which has no validation file (valid.jsonl); it has "
        "test.jsonl, train.jsonl: name one of its splits with data.valid_split=test"
    )


def test_data_takes_the_place_of_a_settings_files_folder_and_sets(
    capsys: Capture, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "recipe.yaml"
    for data in ("{folder: nowhere}", "{valid: {chat: nowhere}, valid_main: chat}"):
        settings.write_text(f"model: {model_folder}\ndata: {data}\n")
        ran = command(capsys, "evaluate", "--data", pairs_file, "--json", settings)
        assert ran.json["pairs"] == 12


def test_evaluate_needs_data(capsys: Capture, adapter: Path, tmp_path: Path) -> None:
    expected = (
        "--data is missing; name the pairs to evaluate on, or a folder with data.folder=…; see "
        "`mlx-simpo evaluate --help`"
    )
    assert complaint(command(capsys, "evaluate", "--adapter", adapter)) == expected
    settings = tmp_path / "recipe.yaml"
    settings.write_text("model: nobody/nothing\n")
    assert complaint(command(capsys, "evaluate", settings)) == expected


def test_several_sets_have_tables_and_records_of_their_own(
    capsys: Capture, adapter: Path, pairs_file: Path, tmp_path: Path
) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", some_pairs(3))
    sets = f"data.valid={{chat: {{path: {pairs_file}}}, code: {{path: {few}}}}}"
    words = ("evaluate", "--adapter", adapter, sets, "--per-pair", tmp_path / "per-pair.jsonl")
    ran = command(capsys, *words)
    assert ran.status == 0, ran.err
    assert "chat: 12 pairs" in ran.out
    assert "code: 3 pairs" in ran.out
    records = json_lines(tmp_path / "per-pair.jsonl")
    assert [(r["set"], r["index"]) for r in records] == [
        *(("chat", i) for i in range(12)),
        *(("code", i) for i in range(3)),
    ]
    result = command(capsys, *words, "--json").json
    assert result.keys() == {"adapter", "valid_sets"}
    for name, path in (("chat", pairs_file), ("code", few)):
        alone = command(capsys, "evaluate", "--adapter", adapter, "--data", path, "--json").json
        assert result["valid_sets"][name] == {k: v for k, v in alone.items() if k != "adapter"}


def test_a_run_on_a_hub_subset_can_be_evaluated_on_a_file(
    capsys: Capture, adapter: Path, pairs_file: Path, tmp_path: Path
) -> None:
    text = (adapter / "config.yaml").read_text("utf-8").replace("subset: null", "subset: some")
    text = re.sub("  train: .*pairs.jsonl", "  train: owner/name", text)
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


@pytest.mark.parametrize("command_name", ["evaluate", "generate"])
def test_an_adapters_folder_cannot_allow_a_models_code(
    capsys: Capture, adapter: Path, pairs_file: Path, tmp_path: Path, command_name: str
) -> None:
    """It may come from somebody else; the word of whoever runs the command counts."""
    text = (adapter / "config.yaml").read_text("utf-8")
    text = text.replace("trust_remote_code: false", "trust_remote_code: true")
    copy = changed_copy(adapter, tmp_path / "run", config__yaml=text)
    more = {
        "evaluate": ("--data", pairs_file),
        "generate": ("--prompt", "Hi", "--max-tokens", 1),
    }[command_name]
    arguments = (command_name, "--adapter", copy, *more)
    message = complaint(command(capsys, *arguments))
    assert f"{copy}/config.yaml has trust_remote_code: true, which runs code" in message
    assert "if you trust that model, add trust_remote_code=true to the command" in message
    for value in ("true", "false"):
        assert command(capsys, *arguments, f"trust_remote_code={value}").status == 0
