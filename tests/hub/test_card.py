"""The model card: what it says, what it must not say, and that no record can break it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import small_run
from helpers.shared_folders import (
    BASE,
    card_data,
    evaluation,
    every_kind,
    peft_folder,
    run_copy,
    settings,
    training_record,
    whole_folder,
    write_json,
)
from helpers.tiny import some_pairs, write_jsonl
from huggingface_hub import ModelCard
from jinja2 import Environment
from jinja2.meta import find_undeclared_variables

from mlx_simpo import SimPOError, __version__, load_config, train
from mlx_simpo.hub.card import MARK, TEMPLATE, make_card, users_card
from mlx_simpo.hub.card_values import card_values
from mlx_simpo.hub.folders import open_folder

REPO = "ann/tiny-simpo"


def card_of(folder: Path, revision: str | None = None) -> ModelCard:
    """The card of a folder, as the Hub reads it."""
    return ModelCard(make_card(open_folder(folder), REPO, revision))


def rows(card: ModelCard) -> dict[str, list[str]]:
    """The cells of all tables by their first one."""
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return {first.strip().strip("`"): [c.strip() for c in rest] for first, *rest in cells}


def blocks(card: ModelCard, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)


def test_the_template_uses_exactly_the_values(tmp_path: Path) -> None:
    """jinja2 would fill in nothing for a name that is not there."""
    folder = open_folder(whole_folder(tmp_path / "model", "pt"))
    used = find_undeclared_variables(Environment().parse(TEMPLATE.read_text("utf-8")))
    assert used == {"card_data", "mark", *card_values(folder, REPO, None)}


# --- what it says ----------------------------------------------------------------------------


def test_the_metadata_of_each_kind(adapter: Path, tmp_path: Path) -> None:
    cards = {k: ModelCard(make_card(f, REPO)) for k, f in every_kind(adapter, tmp_path).items()}
    metadata = {kind: card_data(card) for kind, card in cards.items()}
    fields = {
        kind: (data.library_name, data.tags, data.to_dict().get("base_model_relation"))
        for kind, data in metadata.items()
    }
    assert fields == {
        "run": ("mlx", ["simpo", "lora", "mlx", "mlx-simpo"], None),  # a local base
        "peft": ("peft", ["simpo", "lora", "peft", "mlx-simpo"], "adapter"),
        "transformers": ("transformers", ["simpo", "lora", "mlx-simpo"], "finetune"),
        "mlx": ("mlx", ["simpo", "lora", "mlx", "mlx-simpo"], "finetune"),
    }
    for kind, card in cards.items():
        data = card.data.to_dict()
        assert data["pipeline_tag"] == "text-generation"
        assert {"language", "license"}.isdisjoint(data)
        assert data.get("base_model") == (None if kind == "run" else BASE)
        assert data.get("datasets") == (None if kind == "run" else ["trl-lib/ultrafeedback"])


def test_a_run_says_what_its_files_say(adapter: Path) -> None:
    summary = json.loads((adapter / "summary.json").read_text())
    seen = rows(card_of(adapter))
    assert seen["objective.beta"] == ["2.0"]
    assert seen["train.learning_rate"] == ["0.01"]
    assert seen["pairs per optimizer step"] == ["2 × 2 = 4"]
    assert seen["scale of the LoRA delta"] == ["2.0"]
    assert seen["lora.target_modules"] == ["`all-linear`"]
    assert seen["optimizer steps done"] == ["3"]
    assert seen["target margin γ (beta × gamma_beta_ratio)"] == ["1.0"]
    count = summary["after"]["pairs"]
    assert seen["metric"] == [f"before ({count} pairs)", f"after ({count} pairs)"]
    assert seen["loss"] == [f"{summary[when]['loss']:.4f}" for when in ("before", "after")]
    bounds = [summary[when]["rewards/accuracies_interval"] for when in ("before", "after")]
    assert seen["95 % bootstrap interval of it"] == [f"{a:.1%} to {b:.1%}" for a, b in bounds]
    assert "train.epochs" not in seen  # null in the settings: not set


def test_a_record_says_the_same_in_an_export(tmp_path: Path) -> None:
    card = card_of(peft_folder(tmp_path / "peft", training_record()))
    seen = rows(card)
    assert seen["rewards/accuracies"] == ["52.0%", "84.0%"]
    assert seen["95 % bootstrap interval of it"] == ["47.0% to 57.0%", "79.0% to 89.0%"]
    assert seen["metric"] == ["before (50 pairs)", "after (50 pairs)"]
    assert seen["scale of the LoRA delta"] == ["2.0"]
    assert seen["SHA-256 of the chat template"] == [f"`{'ab' * 32}`"]
    assert f"[{BASE}](https://huggingface.co/{BASE}) at revision `v1.0`" in card.text
    assert "quantized to 4 bits in groups of 64" in card.text
    assert "[trl-lib/ultrafeedback](https://huggingface.co/datasets/trl-lib/ultrafeedback)" in (
        card.text
    )
    assert "before it was converted to these files" in card.text
    assert "arxiv.org/abs/2405.14734" in card.text
    assert __version__ in card.text


def test_a_peft_adapter_may_belong_to_another_form_of_the_model(tmp_path: Path) -> None:
    original = "Qwen/Qwen2.5-1.5B-Instruct"
    card = card_of(peft_folder(tmp_path / "peft", training_record(), base=original))
    assert card_data(card).base_model == original
    assert f"It was trained on [{BASE}]" in card.text
    assert "revision" not in blocks(card, "python")[0]  # known of the other one only


def test_an_interrupted_run_says_so(adapter: Path, tmp_path: Path) -> None:
    folder = run_copy(adapter, tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    write_json(folder / "summary.json", {**summary, "interrupted": True, "after": None})
    card = card_of(folder)
    assert "interrupted before its end" in card.text
    assert len(rows(card)["metric"]) == 1


@pytest.mark.parametrize("format", ["pt", "mlx"])
def test_nothing_is_claimed_without_a_record(tmp_path: Path, format: str) -> None:
    card = card_of(whole_folder(tmp_path / "model", format))
    assert card_data(card).base_model is None
    tags = card_data(card).tags
    assert tags is not None
    assert {"simpo", "lora"}.isdisjoint(tags)
    assert "No record of how it was trained" in card.text
    assert rows(card) == {}
    assert all(f"## {title}" not in card.text for title in ("Data", "Settings", "Results"))


def paths_in(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of everything in nested mappings."""
    if not isinstance(value, dict):
        return [path]
    inner = [p for key, item in value.items() for p in paths_in(item, (*path, key))]
    return [path, *inner]


@pytest.mark.parametrize("path", paths_in(training_record())[1:], ids=".".join)
def test_any_part_of_the_record_may_be_missing(tmp_path: Path, path: tuple[str, ...]) -> None:
    """Or null, or of a type that only another version of the package knows."""
    folder = whole_folder(tmp_path / "model", "pt")
    for value in ("missing", None, [], "text", 7):
        record = training_record()
        inner: Any = record
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        if value == "missing":
            del inner[path[-1]]
        write_json(folder / "mlx_simpo.json", record)
        card = card_of(folder)
        assert "None" not in card.text
        assert yaml.safe_load(card.data.to_yaml())


def test_no_number_is_invented(tmp_path: Path) -> None:
    """Every number in the tables is in the record, or follows from it by a rule that is named."""
    record = training_record(training={"config": {"objective": {"beta": 7}}})
    assert rows(card_of(whole_folder(tmp_path / "model", "pt", record))) == {
        "setting": ["value"],
        "---": ["---"],
        "objective.beta": ["7"],
        "SHA-256 of the chat template": [f"`{'ab' * 32}`"],
    }


def test_values_that_are_not_finite_numbers_are_not_shown(tmp_path: Path) -> None:
    summary = {"before": {"loss": float("nan"), "rewards/margins": True}, "steps": float("inf")}
    changed = training_record(training={"config": settings(), "summary": summary})
    card = card_of(whole_folder(tmp_path / "model", "pt", changed))
    assert "## Results" not in card.text
    assert "optimizer steps done" not in card.text


# --- what others must not see ----------------------------------------------------------------

LOCAL = [
    "/home/ann/secret-client/llama",
    "~/secret-client/llama",
    "./secret-client/llama",
    "../secret-client/llama",
    "secret-client/deep/llama",
    r"C:\Users\ann\secret-client\llama",
    "C:/secret-client/llama",
    r"\\server\secret-client\llama",
    "file:///secret-client/llama",
]


@pytest.mark.parametrize("path", LOCAL)
def test_a_local_path_is_its_last_part(path: str, tmp_path: Path) -> None:
    recorded = training_record(
        base={"model": path},
        training={
            "config": {
                "model": path,
                "output": path,
                "data": {"train": f"{path}/pairs.jsonl", "valid": path, "chat_template": path},
                "lora": {"init_from": path},
            }
        },
    )
    folders = [
        peft_folder(tmp_path / "peft", recorded, base=path),
        whole_folder(tmp_path / "hf", "pt", recorded),
    ]
    for folder in folders:
        card = card_of(folder)
        assert "secret-client" not in str(card)
        assert "ann/" not in str(card).replace(REPO, "")
        assert card_data(card).base_model is None
        assert "`llama` (a folder on the machine" in card.text
        assert "`pairs.jsonl` (a local file)" in card.text


SOURCES = [
    {"path": "ann/chat", "split": "train", "subset": "english", "weight": 2},
    {"path": "/home/ann/secret-client/code.jsonl", "weight": 0.5},
    {"path": "ann/chat", "split": "more", "weight": 1},
]


def test_several_sources_and_validation_sets_are_listed(tmp_path: Path) -> None:
    recorded = training_record()
    sets = {"chat": {"path": "bob/chat", "split": "test"}, "code": {"path": "../secret/c.csv"}}
    config = recorded["training"]["config"]
    config["data"] |= {"train": SOURCES, "valid": sets}
    results = {"before": evaluation(1.5, 0.5), "after": evaluation(0.5, 0.9)}
    recorded["training"]["summary"]["valid_sets"] = {"chat": results, "code": results}
    card = card_of(peft_folder(tmp_path / "peft", recorded))
    assert card.data.to_dict()["datasets"] == ["ann/chat"]
    link = "https://huggingface.co/datasets"
    lines = card.text.partition("## Data\n")[2].partition("\n## ")[0].split("\n")
    assert [line for line in lines if line] == [
        f"- Pairs: [ann/chat]({link}/ann/chat), subset `english`, split `train`, weight 2",
        "- Pairs: `code.jsonl` (a local file), weight 0.5",
        f"- Pairs: [ann/chat]({link}/ann/chat), split `more`, weight 1",
        f"- Evaluation (`chat`): [bob/chat]({link}/bob/chat), split `test`",
        "- Evaluation (`code`): `c.csv` (a local file)",
        "- Pairs trained on: 950",
    ]
    assert "secret" not in str(card)
    assert rows(card)["metric"] == [
        f"`{name}`, {when} (50 pairs)" for name in ("chat", "code") for when in ("before", "after")
    ]
    assert rows(card)["loss"] == ["1.5000", "0.5000"] * 2


def test_a_folder_is_named_as_a_local_one(tmp_path: Path) -> None:
    recorded = training_record()
    recorded["training"]["config"]["data"] |= {"train": None, "folder": "secret/pairs"}
    card = card_of(peft_folder(tmp_path / "peft", recorded))
    assert "- Pairs: `pairs` (a local file)\n" in card.text
    assert "secret" not in str(card)
    assert "datasets" not in card.data.to_dict()


# --- what cannot break it --------------------------------------------------------------------

NASTY = [
    "a|b",
    "a`b``c",
    "---\nlicense: mit\n---",
    "x\n\n## Results\n\n| loss | 0.0 |",
    "<script>alert(1)</script>",
    "[click](https://example.com)",
    "```\nrm -rf\n```",
    '"; import os #',
    "\ud83d",
    "\u202egnp.exe",
    "a\u2028b",
    "{{ 7 * 7 }}",
]


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_no_text_of_a_record_breaks_the_card(text: str, tmp_path: Path) -> None:
    recorded = training_record(version=text, template_sha256=text)
    recorded["base"] |= {"model": text, "revision": text}
    values: dict[str, Any] = {"revision": text, "dtype": text, "seed": text}
    source = {"path": text, "split": text, "subset": text, "weight": text}
    values["data"] = {"train": [text, source], "train_split": text, "valid": {text: source}}
    recorded["training"]["summary"]["valid_sets"] = {text: {"before": evaluation(1.0, 0.5)}}
    values["lora"] = {"target_modules": [text, "q_proj"]}
    recorded["training"] |= {"config": values}
    text_of_card = make_card(open_folder(peft_folder(tmp_path / "peft", recorded)), REPO)
    card = ModelCard(text_of_card)
    front = re.match(r"---\n(.*?)\n---\n", text_of_card, re.DOTALL)
    assert front
    assert yaml.safe_load(front[1]) == card.data.to_dict()
    assert "license" not in card.data.to_dict()
    assert card_data(card).base_model == BASE
    assert [line for line in card.text.splitlines() if line.startswith("## ")] == [
        "## Data",
        "## Settings",
        "## Results",
        "## How to use it",
        "## About",
    ]
    for line in card.text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4)
    outside = re.sub(r"(`+) ?.*?\1", "", card.text.replace(MARK, ""))
    assert "<script" not in outside
    assert "example.com" not in outside
    assert len(re.findall("^```", card.text, re.MULTILINE)) == 2
    for block in blocks(card, "python"):
        compile(block, "card", "exec")


# --- how to use it ---------------------------------------------------------------------------


def run_block(card: ModelCard, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the card's Python prints, the Hub standing for ``folder``."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(folder))
    printed: list[str] = []
    text = blocks(card, "python")[0].replace("path/to/base-model", str(base))
    exec(compile(text, "card", "exec"), {"print": printed.append})
    return printed[0]


@pytest.mark.parametrize("template", ["auto", "none", "custom"])
def test_the_code_of_a_run_works(
    template: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    custom = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    setting = custom if template == "custom" else template
    pairs = write_jsonl(tmp_path / "pairs.jsonl", some_pairs())
    output = tmp_path / "run"
    more = f"data.chat_template={setting}"
    train(load_config(None, small_run(model_folder, pairs, output, more)))
    card = card_of(output)
    assert isinstance(run_block(card, output, model_folder, monkeypatch), str)
    commands = "".join(blocks(card, "bash"))
    assert ("mlx_lm.generate" in commands) == (template != "custom")
    assert ("--ignore-chat-template" in commands) == (template == "none")
    assert ("chat_template.jinja" in blocks(card, "python")[0]) == (template == "custom")


def test_each_kind_is_loaded_with_its_own_library(adapter: Path, tmp_path: Path) -> None:
    code = {
        kind: "\n".join(blocks(ModelCard(make_card(f, REPO)), "python"))
        for kind, f in every_kind(adapter, tmp_path).items()
    }
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in code["peft"]
    assert f'from_pretrained("{BASE}", revision="v1.0")' in code["peft"]
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in code["transformers"]
    assert f'load("{REPO}")' in code["transformers"]
    assert f'load("{REPO}")' in code["mlx"]
    assert "transformers" not in code["mlx"]
    assert "peft" not in code["run"]


def test_the_branch_that_is_pushed_to_is_named(tmp_path: Path) -> None:
    card = card_of(whole_folder(tmp_path / "model", "pt", training_record()), "v2")
    assert f'AutoTokenizer.from_pretrained("{REPO}", revision="v2")' in card.text
    assert f'load("{REPO}", revision="v2")' in card.text


# --- cards that are there already ------------------------------------------------------------

OF_MLX_LM = "---\nlibrary_name: mlx\nlicense: apache-2.0\nlanguage: en\ntags:\n- mlx\n---\n"


@pytest.mark.parametrize("text", [OF_MLX_LM, OF_MLX_LM + "x using mlx-lm version **0.32**.\n"])
def test_a_card_of_mlx_lm_is_replaced_but_for_its_license(text: str, tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "mlx", training_record())
    (folder / "README.md").write_text(text)
    assert users_card(open_folder(folder)) is None
    data = card_of(folder).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert "language" not in data  # mlx-lm may have guessed it


def test_our_own_card_is_replaced_until_its_mark_is_gone(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "mlx", training_record())
    card = make_card(open_folder(folder), REPO)
    (folder / "README.md").write_text(card, encoding="utf-8")
    assert users_card(open_folder(folder)) is None
    mine = card.replace(MARK, "My words.")
    (folder / "README.md").write_text(mine, encoding="utf-8")
    assert users_card(open_folder(folder)) == mine


@pytest.mark.parametrize(
    "text", ["# Mine\n", "---\nlibrary_name: mlx\n---\n# Mine\n", "---\n---\n"]
)
def test_a_card_of_the_user_is_kept(text: str, tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "mlx")
    (folder / "README.md").write_text(text)
    assert users_card(open_folder(folder)) == text


@pytest.mark.parametrize("text", ["---\na: [\n---\n", "---\n- a\n---\n"])
def test_a_card_that_the_hub_would_reject_is_rejected_here(text: str, tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "mlx")
    (folder / "README.md").write_text(text)
    with pytest.raises(SimPOError, match=r"README\.md are not valid YAML: .*; fix them, or remove"):
        users_card(open_folder(folder))


def test_a_license_file_is_pointed_to(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "pt", training_record())
    (folder / "LICENSE.txt").write_text("All mine.")
    data = card_of(folder).data.to_dict()
    assert (data["license"], data["license_link"]) == ("other", "LICENSE.txt")


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_models_that_take_images_are_loaded_whole(kind: str, tmp_path: Path) -> None:
    """AutoModelForCausalLM would load the text part alone, or fail."""
    if kind == "peft":
        folder = peft_folder(tmp_path / kind)
        change = {"target_modules": ["model.language_model.layers.0.mlp.up_proj"]}
    else:
        folder, change = whole_folder(tmp_path / kind, "pt"), {"vision_config": {}}
    file = folder / ("adapter_config.json" if kind == "peft" else "config.json")
    write_json(file, json.loads(file.read_text()) | change)
    card = make_card(open_folder(folder), REPO, None)
    assert "AutoModelForImageTextToText.from_pretrained(" in card
    assert "AutoModelForCausalLM" not in card


def test_an_adapter_without_a_run_has_its_record_in_it(adapter: Path, tmp_path: Path) -> None:
    """As Session.save leaves it on the way, or a conversion: no config.yaml, no summary."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("adapters.safetensors", "adapter_config.json"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    card, whole = (make_card(open_folder(f), REPO, None) for f in (folder, adapter))
    assert "`objective.beta`" in card
    line = next(line for line in whole.splitlines() if "train.learning_rate" in line)
    assert line in card


def test_a_token_in_a_record_is_not_in_the_card(tmp_path: Path) -> None:
    """A record may come from elsewhere, or from another version."""
    token = "hf_plantedSecretToken0123456789"
    recorded = training_record()
    recorded["training"]["config"]["data"]["train_split"] = token
    recorded["base"]["revision"] = token
    card = make_card(open_folder(peft_folder(tmp_path / "peft", recorded)), "ann/x")
    assert token not in card
    assert "split `…`" in card
