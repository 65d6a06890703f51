"""The shipped configurations: every setting is the published one, or ours where none was published;
the chat templates that stand in for the authors' own produce the same texts."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from mlx_simpo import load_config
from mlx_simpo.data.render import Renderer

CONFIGS = Path(__file__).parents[2] / "configs"
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"


class Published(NamedTuple):
    """What princeton-nlp/SimPO says of one recipe in training_configs/<name>-simpo.yaml (v2:
    <name>-simpo-v2.yaml); the dataset of mistral-7b-instruct is the one of its README.

    rate: of full fine-tuning. template: whether the recipe, or run_simpo.py, brings its own.
    """

    model: str
    data: str
    beta: float
    gamma_beta_ratio: float
    rate: float
    max_length: int = 2048
    max_prompt_length: int = 1800
    splits: tuple[str, str] = ("train", "test")
    template: bool = False


PUBLISHED = {
    "mistral-7b-base": Published(
        "alignment-handbook/zephyr-7b-sft-full",
        ULTRAFEEDBACK,
        beta=2.0,
        gamma_beta_ratio=0.8,
        rate=3e-7,
        max_length=1024,
        max_prompt_length=512,
        splits=("train_prefs", "test_prefs"),
    ),
    "mistral-7b-instruct": Published(
        "mistralai/Mistral-7B-Instruct-v0.2",
        "princeton-nlp/mistral-instruct-ultrafeedback",
        beta=2.5,
        gamma_beta_ratio=0.1,
        rate=5e-7,
        template=True,
    ),
    "llama-3-8b-base": Published(
        "princeton-nlp/Llama-3-Base-8B-SFT",
        ULTRAFEEDBACK,
        beta=2.0,
        gamma_beta_ratio=0.5,
        rate=6e-7,
        splits=("train_prefs", "test_prefs"),
    ),
    "llama-3-8b-instruct": Published(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "princeton-nlp/llama3-ultrafeedback",
        beta=2.5,
        gamma_beta_ratio=0.55,
        rate=1e-6,
    ),
    "llama-3-8b-instruct-v2": Published(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "princeton-nlp/llama3-ultrafeedback-armorm",
        beta=10.0,
        gamma_beta_ratio=0.3,
        rate=1e-6,
    ),
    "gemma-2-9b-it": Published(
        "google/gemma-2-9b-it",
        "princeton-nlp/gemma2-ultrafeedback-armorm",
        beta=10.0,
        gamma_beta_ratio=0.5,
        rate=8e-7,
        template=True,
    ),
}
TURNS = [
    {"role": "system", "content": ""},
    {"role": "user", "content": " How?\n"},
    {"role": "assistant", "content": " So. "},
    {"role": "user", "content": "And?"},
]


def resolved_settings(name: str) -> dict[str, Any]:
    """All settings of a published recipe, defaults included, except the template's text."""
    recipe = PUBLISHED[name]
    return {
        "model": recipe.model,
        "revision": None,
        "trust_remote_code": False,
        "dtype": "auto",
        "output": f"runs/{name}",
        "seed": 42,
        "data": {
            "train": recipe.data,
            "train_split": recipe.splits[0],
            "valid": recipe.data,
            "valid_split": recipe.splits[1],
            "valid_main": None,
            "folder": None,
            "subset": None,
            "columns": None,
            "max_samples": None,
            "valid_max": 500,  # ours
            "valid_fraction": 0.05,  # not used, as data.valid is set
            "max_length": recipe.max_length,
            "max_prompt_length": recipe.max_prompt_length,
            "template_args": None,
            "score": "all",
            "compat": "official",
            "implicit_string_prompts": False,
            "max_quarantined": 0.05,
        },
        "objective": {
            "beta": recipe.beta,
            "gamma_beta_ratio": recipe.gamma_beta_ratio,
            "loss_type": "sigmoid",
            "label_smoothing": 0.0,
            "sft_weight": 0.0,
        },
        "lora": {  # ours
            "rank": 16,
            "lora_alpha": 32.0,
            "scale": None,
            "dropout": 0.0,
            "rslora": False,
            "dora": False,
            "target_modules": "all-linear",
            "num_layers": -1,
            "init_from": None,
        },
        "train": {
            "engine": "shared_prefix",
            # 128 pairs per step: arXiv:2405.14734, the appendix on training details.
            "batch_size": 2,
            "max_tokens_per_step": None,
            "gradient_accumulation_steps": 64,
            "epochs": 1.0,
            "steps": None,
            "learning_rate": pytest.approx(20 * recipe.rate),  # ours, for LoRA
            "schedule": "cosine",
            "warmup_ratio": 0.1,
            # optim: adamw_torch, with the defaults of transformers' TrainingArguments.
            "weight_decay": 0.0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "max_grad_norm": 1.0,
            "gradient_checkpointing": False,
            "compile": None,
            "on_nonfinite": "stop",
            "max_skipped": 10,
            "eval_every": 100,
            "early_stopping": {"metric": "loss", "patience": None, "min_delta": 0.0},
            "sample_prompts": [],
            "sample_tokens": 100,
            "save_every": None,
            "save_minutes": 10.0,
            "keep_checkpoints": 2,
            "resume": "never",
            "memory_check": "error",
            "keep_awake": None,
        },
        "logps": {"impl": "auto"},
        "engine": {"attention": "auto", "calibration": "auto"},
        "memory": {"limit_gb": None, "cache_limit_gb": None, "wired_limit_gb": None},
    }


def test_every_recipe_is_covered() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PUBLISHED, "demo"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_settings(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml").as_dict()
    template = config["data"].pop("chat_template")
    assert config == resolved_settings(name)
    assert (template != "auto") == PUBLISHED[name].template


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_states_the_published_learning_rate(name: str) -> None:
    rate = f"{PUBLISHED[name].rate:.0e}".replace("e-0", "e-")
    text = (CONFIGS / f"{name}.yaml").read_text("utf-8")
    assert f"with a learning rate of {rate}" in text


def rendered(name: str, turns: list[dict], *, generation: bool = False) -> str:
    tokenizer = tiny_tokenizer(None, bos="<s>")._tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    config = load_config(CONFIGS / f"{name}.yaml")
    return Renderer(tokenizer, config.data.chat_template).render(turns, generation=generation)


@pytest.mark.parametrize("generation", [False, True])
def test_the_mistral_template(generation: bool) -> None:
    """User turns in [INST]; responses between spaces, and then EOS; no generation prompt."""
    expected = "[INST] How? [/INST] So. </s>[INST] And? [/INST]"
    assert rendered("mistral-7b-instruct", TURNS, generation=generation) == expected
    with_system = [{"role": "system", "content": " Be brief. "}, *TURNS[1:]]
    expected = "[INST] Be brief.\n\n How? [/INST] So. </s>[INST] And? [/INST]"
    assert rendered("mistral-7b-instruct", with_system, generation=generation) == expected


@pytest.mark.parametrize("generation", [False, True])
def test_the_gemma_template(generation: bool) -> None:
    """Gemma's turns after BOS; a system turn is put in front of the first user turn."""
    turn = "<start_of_turn>{}\n{}<end_of_turn>\n".format
    rest = turn("model", "So.") + turn("user", "And?")
    rest += "<start_of_turn>model\n" if generation else ""
    expected = "<s>" + turn("user", "How?") + rest
    assert rendered("gemma-2-9b-it", TURNS, generation=generation) == expected
    with_system = [{"role": "system", "content": " Be brief. "}, *TURNS[1:]]
    expected = "<s>" + turn("user", "Be brief.\n\n How?") + rest
    assert rendered("gemma-2-9b-it", with_system, generation=generation) == expected


def test_the_demo_trains_on_the_examples() -> None:
    config = load_config(CONFIGS / "demo.yaml")
    for name in (config.data.train, config.data.valid):
        assert isinstance(name, str)
        assert (CONFIGS.parent / name).is_file()
    assert config.train.step_pairs * (config.train.steps or 0) == 112
