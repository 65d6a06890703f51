"""Responses: those of mlx_lm's own greedy generation, from prompts as in training."""

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
from mlx_simpo.sampling.generate import generate_response

PROMPT = "Why is the sky blue?"


class Adapted(NamedTuple):
    """A model folder and an adapter for it that changes its responses."""

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
    """Greedy decoding without a cache."""
    text = tokenizer.detokenizer
    for _ in range(count):
        token = int(model(mx.array([tokens]))[0, -1].argmax())
        if token in tokenizer.eos_token_ids:
            break
        tokens = [*tokens, token]
        text.add_token(token)
    text.finalize()
    return text.text.strip()


def test_the_response_is_mlx_lms_with_the_adapter(adapted: Adapted) -> None:
    model, tokenizer = mlx_lm.load(adapted.model, adapter_path=adapted.adapter)[:2]
    text = tokenizer.apply_chat_template([user(PROMPT)], add_generation_prompt=True)
    expected = mlx_lm.generate(model, tokenizer, text, max_tokens=12).strip()
    loaded = load_model(adapted.model)
    encoder = Encoder(loaded.tokenizer, DataConfig())
    base = generate_response(loaded.model, loaded.tokenizer, encoder, PROMPT, 12)
    load_adapter(loaded.model, adapted.adapter)
    assert (
        generate_response(loaded.model, loaded.tokenizer, encoder, PROMPT, 12) == expected != base
    )


def test_the_response_is_decoded_greedily(adapted: Adapted) -> None:
    loaded = load_model(adapted.model)
    load_adapter(loaded.model, adapted.adapter)
    encoder = Encoder(loaded.tokenizer, DataConfig())
    response = generate_response(loaded.model, loaded.tokenizer, encoder, PROMPT, 12)
    tokens = encoder.prompt_tokens(PROMPT)
    assert response == greedy(loaded.model, loaded.tokenizer, tokens, 12)
    assert response


def test_the_response_does_not_depend_on_the_seed_or_on_dropout(adapted: Adapted) -> None:
    loaded = load_model(adapted.model)
    load_adapter(loaded.model, adapted.adapter)
    encoder = Encoder(loaded.tokenizer, DataConfig())
    responses = set()
    for seed in range(3):
        mx.random.seed(seed)
        loaded.model.train()
        responses.add(generate_response(loaded.model, loaded.tokenizer, encoder, PROMPT, 12))
    assert len(responses) == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(training: bool) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.train(training)
    generate_response(model, tokenizer, Encoder(tokenizer, DataConfig()), PROMPT, 2)
    assert model.training == training


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that mlx_lm's generate is called with; its response has spaces around it."""
    received: list[list[int]] = []

    def generate(model: nn.Module, tokenizer: Any, prompt: list[int], **options: Any) -> str:
        received.append(list(prompt))
        return "  a response\n"

    monkeypatch.setattr(generation_module, "generate", generate)
    return received


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
    response = generate_response(tiny_model(), tokenizer, Encoder(tokenizer, DataConfig()), PROMPT)
    (tokens,) = prompts
    assert tokenizer.decode(tokens) == text
    assert response == "a response"


def test_the_prompt_is_that_of_a_training_pair(prompts: list[list[int]], pairs_file: Path) -> None:
    """With the assistant's header, after which the scored tokens begin."""
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, DataConfig())
    pair = encoder.encode(load_pairs(str(pairs_file)).pairs[3])
    generate_response(tiny_model(), tokenizer, encoder, some_pairs()[3]["prompt"])
    assert prompts == [pair.chosen.tokens[: pair.chosen.score_start].tolist()]


@pytest.mark.parametrize("count", [0, -1])
def test_max_tokens_below_1_is_an_error(count: int, prompts: list[list[int]]) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(SimPOError, match=f"max_tokens is {count}; it must be 1 or greater"):
        generate_response(tiny_model(), tokenizer, Encoder(tokenizer, DataConfig()), PROMPT, count)
    assert prompts == []


def test_an_empty_prompt_is_an_error(prompts: list[list[int]]) -> None:
    tokenizer = tiny_tokenizer(None)
    with pytest.raises(SimPOError, match="the prompt is empty; it must have at least one token"):
        generate_response(tiny_model(), tokenizer, Encoder(tokenizer, DataConfig()), "")
    assert prompts == []


def test_a_template_that_rejects_the_prompt_is_an_error() -> None:
    tokenizer = tiny_tokenizer("{{ raise_exception('not today') }}")
    with pytest.raises(SimPOError, match=r"cannot be used: .*not today"):
        generate_response(tiny_model(), tokenizer, Encoder(tokenizer, DataConfig()), PROMPT)


def test_a_prompt_with_tokens_that_the_model_does_not_have_is_an_error(
    prompts: list[list[int]],
) -> None:
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, DataConfig())
    with pytest.raises(
        SimPOError, match=r"the prompt has token \d+, but the model has a vocabulary"
    ):
        generate_response(tiny_model(vocab_size=100), tokenizer, encoder, PROMPT)
    assert prompts == []
