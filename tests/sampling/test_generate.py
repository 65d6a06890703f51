"""Answers: those of mlx_lm's own greedy generation, on the prompt that training used."""

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from helpers.tiny import BARE, CHATML, INST, some_pairs, tiny_model, tiny_tokenizer, user
from mlx.utils import tree_map

from mlx_simpo import DataConfig, LoRAConfig, SimPOError, load_pairs
from mlx_simpo.data.encode import Encoder
from mlx_simpo.model.adapters import load_adapter, save_adapter
from mlx_simpo.model.loading import load_model
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.sampling import generate as generation_module
from mlx_simpo.sampling.generate import answer

PROMPT = "Why is the sky blue?"


class Adapted(NamedTuple):
    """A model folder and an adapter for it that changes what it says."""

    model: str
    adapter: str


@pytest.fixture(scope="module")
def adapted(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    model = load_model(str(model_folder)).model
    config = attach_lora(model, LoRAConfig(rank=4, dropout=0.5), seed=0)
    mx.random.seed(7)
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.3, model.trainable_parameters()))
    folder = save_adapter(tmp_path_factory.mktemp("adapter"), model, config)
    return Adapted(str(model_folder), str(folder))


def greedy(model: nn.Module, tokenizer: Any, tokens: list[int], count: int) -> str:
    """Greedy decoding without a cache, the long way."""
    text = tokenizer.detokenizer
    for _ in range(count):
        token = int(model(mx.array([tokens]))[0, -1].argmax())
        if token in tokenizer.eos_token_ids:
            break
        tokens = [*tokens, token]
        text.add_token(token)
    text.finalize()
    return text.text.strip()


def test_the_answer_is_mlx_lms_with_the_adapter(adapted: Adapted) -> None:
    model, tokenizer = mlx_lm.load(adapted.model, adapter_path=adapted.adapter)[:2]
    text = tokenizer.apply_chat_template([user(PROMPT)], add_generation_prompt=True)
    expected = mlx_lm.generate(model, tokenizer, text, max_tokens=12).strip()
    loaded = load_model(adapted.model)
    encoder = Encoder(loaded.tokenizer, DataConfig())
    base = answer(loaded.model, loaded.tokenizer, encoder, PROMPT, 12)
    load_adapter(loaded.model, adapted.adapter)
    assert answer(loaded.model, loaded.tokenizer, encoder, PROMPT, 12) == expected != base


def test_the_answer_is_the_most_likely_one(adapted: Adapted) -> None:
    loaded = load_model(adapted.model)
    load_adapter(loaded.model, adapted.adapter)
    encoder = Encoder(loaded.tokenizer, DataConfig())
    found = answer(loaded.model, loaded.tokenizer, encoder, PROMPT, 12)
    tokens = encoder.prompt_tokens(PROMPT)
    assert found == greedy(loaded.model, loaded.tokenizer, tokens, 12)
    assert found


def test_the_answer_does_not_depend_on_the_seed_nor_on_dropout(adapted: Adapted) -> None:
    loaded = load_model(adapted.model)
    load_adapter(loaded.model, adapted.adapter)
    encoder = Encoder(loaded.tokenizer, DataConfig())
    answers = set()
    for seed in range(3):
        mx.random.seed(seed)
        loaded.model.train()
        answers.add(answer(loaded.model, loaded.tokenizer, encoder, PROMPT, 12))
    assert len(answers) == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_kept(training: bool) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.train(training)
    answer(model, tokenizer, Encoder(tokenizer, DataConfig()), PROMPT, 2)
    assert model.training == training


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What mlx_lm was asked to go on from; it answers with spaces around."""
    asked: list[list[int]] = []

    def generate(model: nn.Module, tokenizer: Any, prompt: list[int], **options: Any) -> str:
        asked.append(list(prompt))
        return "  an answer\n"

    monkeypatch.setattr(generation_module, "generate", generate)
    return asked


TOKENIZERS: dict[str, dict[str, Any]] = {
    "chatml": {"template": CHATML},
    "inst": {"template": INST, "bos": "<s>", "adds_bos": True},
    "bare": {"template": BARE},
    "no-template": {"template": None, "bos": "<s>", "adds_bos": True},
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        ("inst", f"<s>[INST] {PROMPT} [/INST]"),
        ("bare", f"user: {PROMPT}\nassistant: "),
        ("no-template", f"<s>{PROMPT}"),
    ],
)
def test_the_prompt_is_templated_once(name: str, text: str, prompts: list[list[int]]) -> None:
    tokenizer = tiny_tokenizer(**TOKENIZERS[name])
    found = answer(tiny_model(), tokenizer, Encoder(tokenizer, DataConfig()), PROMPT)
    (tokens,) = prompts
    assert tokenizer.decode(tokens) == text
    assert found == "an answer"


def test_the_prompt_is_that_of_a_training_pair(prompts: list[list[int]], pairs_file: Path) -> None:
    """Up to the assistant's header, which is where scoring begins."""
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, DataConfig())
    pair = encoder.encode(load_pairs(str(pairs_file)).pairs[3])
    answer(tiny_model(), tokenizer, encoder, some_pairs()[3]["prompt"])
    assert prompts == [pair.chosen.tokens[: pair.chosen.score_start].tolist()]


@pytest.mark.parametrize("count", [0, -1])
def test_an_answer_has_a_token_at_least(count: int, prompts: list[list[int]]) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(SimPOError, match=f"max_tokens is {count}; it must be 1 or greater"):
        answer(tiny_model(), tokenizer, Encoder(tokenizer, DataConfig()), PROMPT, count)
    assert prompts == []


def test_nothing_to_answer(prompts: list[list[int]]) -> None:
    tokenizer = tiny_tokenizer(None)
    with pytest.raises(SimPOError, match="the prompt is empty"):
        answer(tiny_model(), tokenizer, Encoder(tokenizer, DataConfig()), "")
    assert prompts == []


def test_a_template_that_refuses_the_prompt() -> None:
    tokenizer = tiny_tokenizer("{{ raise_exception('not today') }}")
    with pytest.raises(SimPOError, match=r"cannot be used: .*not today"):
        answer(tiny_model(), tokenizer, Encoder(tokenizer, DataConfig()), PROMPT)
