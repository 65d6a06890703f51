"""Token ids beyond the model's vocabulary are found before MLX looks them up."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import ARCHITECTURES, architecture
from helpers.tiny import tiny_model
from mlx_lm.tuner.lora import LoRAEmbedding

from mlx_simpo import SimPOError
from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.data.tokens import TokenizedPairs, TokenWriter
from mlx_simpo.engine.vocabulary import check_prompt_ids, check_token_ids, vocabulary_size

GPT2: dict[str, Any] = {
    "n_ctx": 900,
    "n_positions": 900,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "layer_norm_epsilon": 1e-5,
}


def pair_of(*tokens: int, source: str = "f.jsonl:1") -> EncodedPair:
    """A pair whose chosen response has these tokens."""
    chosen = TokenizedSequence(np.array([1, 2, *tokens], np.int32), 2)
    return EncodedPair(chosen, TokenizedSequence(np.array([1, 2, 3], np.int32), 2), 0, source)


# --- the vocabulary --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_vocabulary_is_that_of_the_embedding(name: str) -> None:
    assert vocabulary_size(architecture(name, vocab_size=300)) == 300


def test_positions_are_not_tokens() -> None:
    """A table of 900 positions does not make token 600 valid, nor one of 100 token 200 invalid."""
    assert vocabulary_size(tiny_model("gpt2", **GPT2)) == 512
    assert vocabulary_size(tiny_model("gpt2", **{**GPT2, "n_positions": 100})) == 512


def test_quantized_and_adapted_embeddings_count_their_rows() -> None:
    model = tiny_model(hidden_size=64, head_dim=16, intermediate_size=64, vocab_size=320)
    nn.quantize(model, group_size=32, bits=4)
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    assert vocabulary_size(model) == 320
    untied = tiny_model(vocab_size=320, tie_word_embeddings=False)
    untied.model.embed_tokens = LoRAEmbedding.from_base(untied.model.embed_tokens)
    untied.lm_head.weight = mx.zeros((400, 32))
    assert vocabulary_size(untied) == 320


def test_a_narrower_head_counts() -> None:
    """Every token but the first is a target too, an index into the logits."""
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.weight = model.lm_head.weight[:200]
    assert vocabulary_size(model) == 200


def test_nothing_is_computed() -> None:
    model = tiny_model()
    weight = mx.zeros((512, 32)) + mx.array(float("nan"))
    model.model.embed_tokens.weight = weight
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert vocabulary_size(model) == 512
    assert mx.get_active_memory() - before < 512 * 32


# --- pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [512, 70_000, 2**31 - 1, -1, -(2**31)])
def test_a_token_outside_is_named_with_its_pair(token: int, tmp_path: Path) -> None:
    pairs = [pair_of(511), pair_of(5, token, 0, source="f.jsonl:7"), pair_of(0), pair_of(600)]
    expected = (
        f"f.jsonl:7 (and 1 more pairs) has token {token}, but some/model has a vocabulary of 512 "
        "(0 to 511): the tokenizer belongs to another model; use the tokenizer that the model "
        "came with"
    )
    with TokenWriter(tmp_path) as writer:
        for pair in pairs:
            writer.add(pair, b"")
    stored = TokenizedPairs(tmp_path)
    for sequence in (pairs, stored):
        with pytest.raises(SimPOError) as error:
            check_token_ids(sequence, tiny_model(), "some/model")
        assert str(error.value) == expected
    check_token_ids(pairs[::2], tiny_model())
    check_token_ids(stored.take(np.array([2, 0, 2])), tiny_model())
    with pytest.raises(SimPOError, match=r"f.jsonl:1 has token 600, but the model has"):
        check_token_ids(stored.take(np.array([2, 3, 0])), tiny_model())


def test_a_rejected_response_is_checked_too() -> None:
    pair = pair_of(1)
    with pytest.raises(SimPOError, match="pair 1 has token 999"):
        check_token_ids([pair, EncodedPair(pair.rejected, pair_of(999).chosen)], tiny_model())


def test_no_pairs_are_within_any_vocabulary(tmp_path: Path) -> None:
    check_token_ids([], tiny_model())
    with TokenWriter(tmp_path):
        pass
    check_token_ids(TokenizedPairs(tmp_path), tiny_model())


# --- prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [512, -1, 2**40])
def test_a_prompts_tokens_are_checked(token: int) -> None:
    check_prompt_ids([0, 511], tiny_model())
    with pytest.raises(SimPOError, match=rf"^the prompt has token {token}, but x has a vocabulary"):
        check_prompt_ids([0, token, 5], tiny_model(), "x")
