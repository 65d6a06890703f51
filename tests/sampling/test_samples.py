"""Sample responses: those of `generate_response`, measured; and when they are a warning."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import tiny_model, tiny_tokenizer
from mlx.utils import tree_flatten

from mlx_simpo import DataConfig, LoRAConfig, SamplingSettings, SimPOError
from mlx_simpo.data.encode import Encoder
from mlx_simpo.model.loading import load_model
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.sampling.generate import generate_response
from mlx_simpo.sampling.prompts import NamedPrompt, prompt_tokens
from mlx_simpo.sampling.repetition import repeated_share
from mlx_simpo.sampling.samples import Sample, sample_responses, sample_warning

PROMPTS = ("Why is the sky blue?", "Be kind.", "numbers 0 1 2 3")


def test_the_samples_are_the_models_responses_with_their_measures(model_folder: Path) -> None:
    loaded = load_model(str(model_folder))
    model, tokenizer = loaded.model, loaded.tokenizer
    encoder = Encoder(tokenizer, DataConfig())
    samples = sample_responses(model, tokenizer, encoder, PROMPTS, 12)
    assert [sample.prompt for sample in samples] == list(PROMPTS)
    for sample in samples:
        tokens = prompt_tokens(encoder, NamedPrompt(sample.prompt))
        expected = generate_response(model, tokenizer, tokens, SamplingSettings(12))
        assert sample.response == expected.text
        assert sample.tokens == 12
        assert not sample.is_complete
        assert json.loads(json.dumps(sample.as_dict())) == sample.as_dict()


def greedy(model, encoder: Encoder, prompt: str, count: int) -> list[int]:
    """The tokens of greedy decoding without a cache."""
    tokens = list(encoder.prompt_tokens(prompt))
    start = len(tokens)
    while len(tokens) < start + count:
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax()))
    return tokens[start:]


def test_length_and_repetition_are_those_of_the_tokens_up_to_the_end() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    encoder = Encoder(tokenizer, DataConfig())
    tokens = greedy(model, encoder, PROMPTS[0], 16)
    (sample,) = sample_responses(model, tokenizer, encoder, PROMPTS[:1], 16)
    assert (sample.tokens, sample.is_complete) == (16, False)
    assert sample.repetition == repeated_share(tokens)
    end = next(i for i, token in enumerate(tokens) if i > 4 and token not in tokens[:i])
    tokenizer.eos_token_ids = {tokens[end]}
    (sample,) = sample_responses(model, tokenizer, encoder, PROMPTS[:1], 16)
    assert (sample.tokens, sample.is_complete) == (end, True)
    assert sample.repetition == repeated_share(tokens[:end])
    assert sample.response == tokenizer.decode(tokens[:end]).strip()


def test_a_response_may_be_empty() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    encoder = Encoder(tokenizer, DataConfig())
    tokenizer.eos_token_ids = {greedy(model, encoder, PROMPTS[0], 1)[0]}
    (sample,) = sample_responses(model, tokenizer, encoder, PROMPTS[:1], 16)
    assert sample == Sample(PROMPTS[0], "", 0, True, 0.0)


@pytest.mark.parametrize("training", [True, False])
def test_a_training_goes_on_as_if_nothing_had_been_generated(training: bool) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    attach_lora(model, LoRAConfig(rank=4, dropout=0.5), seed=0)
    model.train(training)
    mx.random.seed(3)
    before = np.array(mx.random.state[0])  # type: ignore[index]
    weights = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    sample_responses(model, tokenizer, Encoder(tokenizer, DataConfig()), PROMPTS, 8)
    assert model.training == training
    assert (np.array(mx.random.state[0]) == before).all()  # type: ignore[index]
    after = dict(tree_flatten(model.parameters()))
    assert weights.keys() == after.keys()
    assert all((np.array(after[name]) == value).all() for name, value in weights.items())


def test_the_mode_is_restored_if_generating_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("mlx_simpo.sampling.generate.stream_generate", fail)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.train(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample_responses(model, tokenizer, Encoder(tokenizer, DataConfig()), PROMPTS, 8)
    assert model.training


def test_an_invalid_prompt_is_an_error_before_anything_is_generated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[object] = []
    monkeypatch.setattr("mlx_simpo.sampling.generate.stream_generate", calls.append)
    tokenizer = tiny_tokenizer(None)
    encoder = Encoder(tokenizer, DataConfig())
    with pytest.raises(SimPOError, match="prompt 2 is empty; write what the model should"):
        sample_responses(tiny_model(), tokenizer, encoder, ["fine", ""], 8)
    with pytest.raises(SimPOError, match="max_tokens is 0; it must be 1 or greater"):
        sample_responses(tiny_model(), tokenizer, encoder, ["fine"], 0)
    assert calls == []


# --- the warning -----------------------------------------------------------------------------

GOOD = Sample("a prompt", "short", 20, True, 0.0)
LONG = Sample("a prompt", "long and without repetition", 100, False, 0.2)
LIST = Sample("a prompt", "a list with much repetition", 60, True, 0.7)
BAD = Sample("a prompt", "short short short …", 100, False, 0.99)


@pytest.mark.parametrize(
    ("before", "now", "counts"),
    [
        ([GOOD] * 3, [BAD] * 3, ("3 of 3", "0")),
        ([GOOD, GOOD, BAD], [GOOD, BAD, BAD], ("2 of 3", "1")),
        ([GOOD] * 3, [GOOD, GOOD, BAD], None),
        ([GOOD] * 2, [GOOD, BAD], None),  # half are not most
        ([GOOD] * 3, [LONG] * 3, None),
        ([GOOD] * 3, [LIST] * 3, None),
        ([BAD] * 3, [BAD] * 3, None),  # it was like that before
        ([], [], None),
    ],
)
def test_most_responses_that_go_on_and_repeat_themselves_are_a_warning(
    before: list[Sample], now: list[Sample], counts: tuple[str, str] | None
) -> None:
    expected = None
    if counts:
        expected = (
            f"{counts[0]} sample responses repeat themselves up to the maximum length (before "
            f"training {counts[1]}); the model is degenerating: lower train.learning_rate, raise "
            "objective.beta, or set objective.sft_weight above 0"
        )
    assert sample_warning(before, now) == expected
