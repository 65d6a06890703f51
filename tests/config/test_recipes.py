"""The shipped configurations: they load, they say what the authors published, and the templates
that stand in for the authors' give their texts."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_simpo import load_config
from mlx_simpo.data.render import Renderer

CONFIGS = Path(__file__).parents[2] / "configs"
# beta, gamma_beta_ratio, max_length, max_prompt_length, full fine-tuning rate: SimPO's README and
# training_configs/.
PUBLISHED = {
    "mistral-7b-base": (2.0, 0.8, 1024, 512, 3e-7),
    "mistral-7b-instruct": (2.5, 0.1, 2048, 1800, 5e-7),
    "llama-3-8b-base": (2.0, 0.5, 2048, 1800, 6e-7),
    "llama-3-8b-instruct": (2.5, 0.55, 2048, 1800, 1e-6),
    "llama-3-8b-instruct-v2": (10.0, 0.3, 2048, 1800, 1e-6),
    "gemma-2-9b-it": (10.0, 0.5, 2048, 1800, 8e-7),
}
TURNS = [
    {"role": "system", "content": ""},
    {"role": "user", "content": " How?\n"},
    {"role": "assistant", "content": " So. "},
    {"role": "user", "content": "And?"},
]


def test_every_recipe_is_covered() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PUBLISHED, "demo"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    beta, ratio, length, prompt_length, rate = PUBLISHED[name]
    assert (config.objective.beta, config.objective.gamma_beta_ratio) == (beta, ratio)
    assert (config.data.max_length, config.data.max_prompt_length) == (length, prompt_length)
    train = config.train
    assert train.batch_size * train.gradient_accumulation_steps == 128
    assert train.learning_rate == pytest.approx(20 * rate)
    assert (train.schedule, train.warmup_ratio, train.epochs, config.seed) == ("cosine", 0.1, 1, 42)
    assert config.data.compat == "official"
    assert f"rate of {rate:.0e}".replace("e-0", "e-") in (CONFIGS / f"{name}.yaml").read_text()


def rendered(name: str, turns: list[dict], *, generation: bool = False) -> str:
    from helpers.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer(None, bos="<s>")._tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    config = load_config(CONFIGS / f"{name}.yaml")
    return Renderer(tokenizer, config.data.chat_template).render(turns, generation=generation)


def test_mistral_template() -> None:
    """User turns in [INST], answers after a space and followed by one and EOS, all stripped."""
    found = rendered("mistral-7b-instruct", TURNS)
    assert found == "[INST] How? [/INST] So. </s>[INST] And? [/INST]"
    with_system = [{"role": "system", "content": " Be brief. "}, *TURNS[1:2]]
    assert rendered("mistral-7b-instruct", with_system) == "[INST] Be brief.\n\n How? [/INST]"


def test_gemma_template() -> None:
    """Gemma's turns after BOS; a system turn goes in front of the first user turn."""
    turn = "<start_of_turn>{}\n{}<end_of_turn>\n".format
    expected = "<s>" + turn("user", "How?") + turn("model", "So.") + turn("user", "And?")
    assert rendered("gemma-2-9b-it", TURNS) == expected
    asked = rendered("gemma-2-9b-it", TURNS, generation=True)
    assert asked == expected + "<start_of_turn>model\n"
    with_system = [{"role": "system", "content": " Be brief. "}, *TURNS[1:2]]
    found = rendered("gemma-2-9b-it", with_system)
    assert found == "<s>" + turn("user", "Be brief.\n\n How?")
