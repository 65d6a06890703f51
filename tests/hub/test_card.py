"""The model card: what it says, what it must not say, and that nothing in a record can break it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import small_run
from helpers.shared_folders import (
    BASE,
    every_kind,
    peft_folder,
    record,
    run_copy,
    settings,
    whole_folder,
    write_json,
)
from helpers.tiny import some_pairs, write_jsonl
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from mlx_simpo import SimPOError, __version__, load_config, train
from mlx_simpo.hub.card import MARK, make_card, users_card
from mlx_simpo.hub.folders import open_folder, public_name
from mlx_simpo.hub.markdown import code, table

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


# --- what it says ----------------------------------------------------------------------------


def test_the_metadata_of_each_kind(adapter: Path, tmp_path: Path) -> None:
    found = {k: ModelCard(make_card(f, REPO)) for k, f in every_kind(adapter, tmp_path).items()}
    seen = {
        kind: (c.data.library_name, c.data.tags, c.data.to_dict().get("base_model_relation"))
        for kind, c in found.items()
    }
    assert seen == {
        "run": ("mlx", ["simpo", "lora", "mlx", "mlx-simpo"], None),  # a local base
        "peft": ("peft", ["simpo", "lora", "peft", "mlx-simpo"], "adapter"),
        "transformers": ("transformers", ["simpo", "lora", "mlx-simpo"], "finetune"),
        "mlx": ("mlx", ["simpo", "lora", "mlx", "mlx-simpo"], "finetune"),
    }
    for kind, card in found.items():
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
    card = card_of(peft_folder(tmp_path / "peft", record()))
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
    card = card_of(peft_folder(tmp_path / "peft", record(), base="Qwen/Qwen2.5-1.5B-Instruct"))
    assert card.data.base_model == "Qwen/Qwen2.5-1.5B-Instruct"
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
    assert card.data.base_model is None
    assert {"simpo", "lora"}.isdisjoint(card.data.tags)
    assert "No record of how it was trained" in card.text
    assert rows(card) == {}
    assert all(f"## {title}" not in card.text for title in ("Data", "Settings", "Results"))


def paths_in(value: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The place of everything in nested mappings."""
    if not isinstance(value, dict):
        return [place]
    inner = [p for key, item in value.items() for p in paths_in(item, (*place, key))]
    return [place, *inner]


@pytest.mark.parametrize("place", paths_in(record())[1:], ids=".".join)
@pytest.mark.parametrize("left", ["nothing", None, [], "text"], ids=str)
def test_any_part_of_the_record_may_be_missing(
    tmp_path: Path, place: tuple[str, ...], left: Any
) -> None:
    """Or null, or of a shape that only another version of the package knows."""
    changed = record()
    inner: Any = changed
    for name in place[:-1]:
        inner = inner[name]
    if left == "nothing":
        del inner[place[-1]]
    else:
        inner[place[-1]] = left
    card = card_of(whole_folder(tmp_path / "model", "pt", changed))
    assert "None" not in card.text
    assert yaml.safe_load(card.data.to_yaml())


def test_no_number_is_made_up(tmp_path: Path) -> None:
    """Every number in the tables is one of the record, or follows from it by a rule it names."""
    given = record(training={"config": {"objective": {"beta": 7}}})
    assert rows(card_of(whole_folder(tmp_path / "model", "pt", given))) == {
        "setting": ["value"],
        "---": ["---"],
        "objective.beta": ["7"],
        "SHA-256 of the chat template": [f"`{'ab' * 32}`"],
    }


def test_what_is_no_finite_number_is_not_shown(tmp_path: Path) -> None:
    summary = {"before": {"loss": float("nan"), "rewards/margins": True}, "steps": float("inf")}
    changed = record(training={"config": settings(), "summary": summary})
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
    recorded = record(
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
        assert card.data.base_model is None
        assert "`llama` (a local folder" in card.text
        assert "`pairs.jsonl` (a local file)" in card.text


def test_a_relative_path_is_known_from_where_the_training_stood(tmp_path: Path) -> None:
    """models/tiny could be a Hub id; it is none if it is there."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    run = tmp_path / "runs" / "mine"
    assert public_name("models/tiny", run) == ("tiny", False)
    assert public_name("models/other", run) == ("models/other", True)


@pytest.mark.parametrize("name", ["/", "..", "~", ".", "C:\\", "./ "])
def test_a_path_may_have_no_last_part(name: str, tmp_path: Path) -> None:
    assert public_name(name, tmp_path).on_hub is False
    assert "/" not in public_name(name, tmp_path).text


@pytest.mark.parametrize("name", ["pairs.jsonl", "data/pairs.jsonl.gz", "owner/pairs.parquet"])
def test_a_data_file_is_no_hub_id(name: str, tmp_path: Path) -> None:
    assert public_name(name, tmp_path) == (name.rpartition("/")[2], False)


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
    recorded = record(version=text, template_sha256=text)
    recorded["base"] |= {"model": text, "revision": text}
    values = {"revision": text, "dtype": text, "seed": text}
    values["data"] = {"train": text, "train_split": text, "subset": text, "valid": text}
    values["lora"] = {"target_modules": [text, "q_proj"]}
    recorded["training"] |= {"config": values}
    made = make_card(open_folder(peft_folder(tmp_path / "peft", recorded)), REPO)
    card = ModelCard(made)
    front = re.match(r"---\n(.*?)\n---\n", made, re.DOTALL)
    assert front
    assert yaml.safe_load(front[1]) == card.data.to_dict()
    assert "license" not in card.data.to_dict()
    assert card.data.base_model == BASE
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


@given(st.text(max_size=30))
def test_code_stays_within_its_line_and_fence(text: str) -> None:
    made = code(text)
    assert made.isprintable()
    fence = re.match("`+", made)
    assert fence or not text
    if text and fence and not set(text) <= {"`"}:
        assert made.endswith(fence[0])
        runs = re.findall("`+", made[len(fence[0]) : -len(fence[0])])
        assert all(len(run) < len(fence[0]) for run in runs)


def test_a_bar_does_not_end_a_cell() -> None:
    assert table(("a",), [("x|y",)]).splitlines()[-1] == r"| x\|y |"


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
    given = custom if template == "custom" else template
    pairs = write_jsonl(tmp_path / "pairs.jsonl", some_pairs())
    output = tmp_path / "run"
    more = f"data.chat_template={given}"
    train(load_config(None, small_run(model_folder, pairs, output, more)))
    card = card_of(output)
    assert isinstance(run_block(card, output, model_folder, monkeypatch), str)
    commands = "".join(blocks(card, "bash"))
    assert ("mlx_lm.generate" in commands) == (template != "custom")
    assert ("--ignore-chat-template" in commands) == (template == "none")
    assert ("chat_template.jinja" in blocks(card, "python")[0]) == (template == "custom")


def test_each_kind_has_its_own_way(adapter: Path, tmp_path: Path) -> None:
    found = {
        kind: "\n".join(blocks(ModelCard(make_card(f, REPO)), "python"))
        for kind, f in every_kind(adapter, tmp_path).items()
    }
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in found["peft"]
    assert f'from_pretrained("{BASE}", revision="v1.0")' in found["peft"]
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in found["transformers"]
    assert f'load("{REPO}")' in found["transformers"]
    assert f'load("{REPO}")' in found["mlx"]
    assert "transformers" not in found["mlx"]
    assert "peft" not in found["run"]


def test_the_branch_that_is_pushed_to_is_named(tmp_path: Path) -> None:
    card = card_of(whole_folder(tmp_path / "model", "pt", record()), "v2")
    assert f'AutoTokenizer.from_pretrained("{REPO}", revision="v2")' in card.text
    assert f'load("{REPO}", revision="v2")' in card.text


# --- cards that are there already ------------------------------------------------------------

OF_MLX_LM = "---\nlibrary_name: mlx\nlicense: apache-2.0\nlanguage: en\ntags:\n- mlx\n---\n"


@pytest.mark.parametrize("text", [OF_MLX_LM, OF_MLX_LM + "x using mlx-lm version **0.32**.\n"])
def test_a_card_of_mlx_lm_is_replaced_but_for_its_license(text: str, tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "mlx", record())
    (folder / "README.md").write_text(text)
    assert users_card(open_folder(folder)) is None
    data = card_of(folder).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert "language" not in data  # mlx-lm may have guessed it


def test_our_own_card_is_replaced_until_its_mark_is_gone(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "mlx", record())
    made = make_card(open_folder(folder), REPO)
    (folder / "README.md").write_text(made, encoding="utf-8")
    assert users_card(open_folder(folder)) is None
    mine = made.replace(MARK, "My words.")
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
def test_a_card_that_the_hub_would_refuse_is_refused_here(text: str, tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "mlx")
    (folder / "README.md").write_text(text)
    with pytest.raises(SimPOError, match=r"README\.md are not valid YAML"):
        users_card(open_folder(folder))


def test_a_license_file_is_pointed_to(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model", "pt", record())
    (folder / "LICENSE.txt").write_text("All mine.")
    data = card_of(folder).data.to_dict()
    assert (data["license"], data["license_link"]) == ("other", "LICENSE.txt")


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_models_that_see_are_loaded_whole(kind: str, tmp_path: Path) -> None:
    """AutoModelForCausalLM knows the text part alone, or nothing of them."""
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
