"""Responses: those of mlx_lm's own generation, greedy and sampled, token by token."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from helpers.tiny import tiny_model, tiny_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_sampler

from mlx_simpo import DataConfig, SamplingSettings, SimPOError
from mlx_simpo.config.simpo_config import SimPOConfig
from mlx_simpo.data.encode import Encoder
from mlx_simpo.generation import load_responder
from mlx_simpo.sampling import generate as generation_module
from mlx_simpo.sampling.generate import generate_response, stream_response
from mlx_simpo.sampling.prompts import NamedPrompt, prompt_tokens

PROMPT = "Why is the sky blue?"
SHORT = SamplingSettings(max_tokens=12)


def tokens_of(tokenizer: Any, prompt: str = PROMPT) -> list[int]:
    return prompt_tokens(Encoder(tokenizer, DataConfig()), NamedPrompt(prompt))


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


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 2.0, "top_k": 20, "min_p": 0.02},
    ],
)
def test_the_response_is_mlx_lms_with_the_adapter(
    options: dict[str, Any], model_folder: Path, strong_adapter: Path
) -> None:
    model, tokenizer = mlx_lm.load(str(model_folder), adapter_path=str(strong_adapter))[:2]
    text = tokenizer.apply_chat_template([user(PROMPT)], add_generation_prompt=True)
    names = {"temperature": "temp"}
    sampler = make_sampler(**{names.get(name, name): value for name, value in options.items()})
    mx.random.seed(3)
    expected = mlx_lm.generate(model, tokenizer, text, max_tokens=12, sampler=sampler).strip()
    ours = load_responder(SimPOConfig(model=str(model_folder)), strong_adapter)
    assert ours.tokenizer is not tokenizer
    tokens = tokens_of(ours.tokenizer)
    sampling = SamplingSettings(max_tokens=12, **options)
    responses = {}
    for source in ("adapter", "base"):
        ours.use(source)
        responses[source] = generate_response(ours.model, ours.tokenizer, tokens, sampling, seed=3)
    assert responses["adapter"].text == expected != responses["base"].text
    assert responses["adapter"].seed == (None if sampling.is_greedy else 3)


def test_the_response_is_decoded_greedily(model_folder: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    response = generate_response(model, tokenizer, tokens_of(tokenizer), SHORT)
    assert response.text == greedy(model, tokenizer, tokens_of(tokenizer), 12)
    assert response.text
    assert (len(response.tokens), response.finish_reason) == (12, "length")


def test_the_seed_decides_what_is_sampled() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    sampling = SamplingSettings(max_tokens=12, temperature=1.0)
    texts = [
        generate_response(model, tokenizer, tokens_of(tokenizer), sampling, seed=seed).text
        for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_draws_random_numbers_beside_it_does_not_notice(temperature: float) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    mx.random.seed(11)
    expected = np.array(mx.random.normal((4,)))
    mx.random.seed(11)
    sampling = SamplingSettings(max_tokens=4, temperature=temperature)
    generate_response(model, tokenizer, tokens_of(tokenizer), sampling, seed=5)
    np.testing.assert_array_equal(np.array(mx.random.normal((4,))), expected)


def test_a_response_that_is_left_half_way_restores_the_random_state() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    mx.random.seed(11)
    expected = np.array(mx.random.normal((4,)))
    mx.random.seed(11)
    sampling = SamplingSettings(max_tokens=9, temperature=1.0)
    for _ in stream_response(model, tokenizer, tokens_of(tokenizer), sampling, seed=5):
        break
    np.testing.assert_array_equal(np.array(mx.random.normal((4,))), expected)


def test_the_end_token_is_not_part_of_the_response() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokens = generate_response(model, tokenizer, tokens_of(tokenizer), SHORT).tokens
    end = next(i for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    tokenizer.eos_token_ids = {tokens[end]}
    *parts, last = stream_response(model, tokenizer, tokens_of(tokenizer), SHORT)
    assert last.response is not None
    assert last.response.tokens == tokens[:end]
    assert (last.response.is_complete, last.response.finish_reason) == (True, "stop")
    assert [part.token for part in (*parts, last)] == list(tokens[: end + 1])
    assert last.response.as_dict() == {
        "text": last.response.text,
        "tokens": end,
        "finish_reason": "stop",
    }


# --- the text, as it comes -------------------------------------------------------------------


class Script(nn.Module):
    """A model whose likeliest next tokens are those of a script."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.script, self.layers, self.position = tokens, [], 0

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        # The prompt has two tokens: the first is read alone, the second predicts the first token.
        self.position += 1
        index = min(self.position - 2, len(self.script) - 1)
        logits = mx.zeros((1, inputs.shape[1], 600))
        logits[..., self.script[max(0, index)]] = 9.0
        return logits


TOKENIZER = tiny_tokenizer()


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), st.booleans())
def test_the_parts_are_the_text_whatever_its_characters(text: str, is_cut: bool) -> None:
    """No half characters, no white space around it, and nothing lost: with the model's logits
    replaced so that it writes a given text."""
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    ended = tokens if is_cut else [*tokens, TOKENIZER.eos_token_id]
    model = Script(ended)
    parts = list(stream_response(model, TOKENIZER, [5, 6], SamplingSettings(len(ended))))
    expected = TOKENIZER.decode(tokens).strip()
    assert "".join(part.text for part in parts) == expected
    response = parts[-1].response
    assert response is not None
    assert (response.text, list(response.tokens)) == (expected, tokens)
    for part in parts[:-1]:
        assert part.response is None
        assert "\ufffd" not in part.text or "\ufffd" in text


def test_half_a_character_at_the_end_is_shown_as_missing() -> None:
    tokens = TOKENIZER.encode("ok 😀", add_special_tokens=False)
    model = Script(tokens[:-1])
    *_, last = stream_response(model, TOKENIZER, [5, 6], SamplingSettings(len(tokens) - 1))
    assert last.response is not None
    assert last.response.text.startswith("ok")
    assert last.response.text.endswith("\ufffd")


def test_the_options_reach_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, Any] = {}

    def stream_generate(*arguments: Any, **options: Any) -> Any:
        received.update(options)
        raise SimPOError("seen")

    monkeypatch.setattr(generation_module, "stream_generate", stream_generate)
    cache: list[Any] = []
    with pytest.raises(SimPOError, match="seen"):
        list(stream_response(tiny_model(), TOKENIZER, [1], SHORT, prompt_cache=cache))
    assert received["max_tokens"] == 12
    assert received["prompt_cache"] is cache
