"""The shared-prefix engine against the reference: the same numbers and gradients in every
architecture that it is offered for, through training and evaluation; and planted defects."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import float64
from helpers.architectures import (
    ARCHITECTURES,
    RECURRENT,
    architecture_with_lora,
    with_lora,
)
from helpers.chat_templates import template_tokenizer
from helpers.chunks import recorded_sizes
from helpers.gradients import greatest_difference, run
from helpers.states import no_fork, overwrite
from helpers.tiny import assistant, tiny_model, user
from helpers.tiny import token_pair as pair
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.lora import LoRALinear

from mlx_simpo import (
    DataConfig,
    ObjectiveConfig,
    SimPOConfig,
    TrainConfig,
    evaluate_pairs,
    load_pairs,
    train_steps,
)
from mlx_simpo.data.encode import EncodedPair, Encoder, encode_pairs
from mlx_simpo.data.records import Pair
from mlx_simpo.engine import attention, choice, prefix_cache, shared_prefix, token_logps
from mlx_simpo.engine.choice import REFERENCE, Engine, choose_engine, shared_prefix_engine
from mlx_simpo.engine.figures import CPU
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
from mlx_simpo.engine.head import is_head_frozen
from mlx_simpo.model.loading import load_model
from mlx_simpo.training.step import GradientFunction, collate_step, step_gradients

EXAMPLES = Path(__file__).parents[2] / "examples" / "train.jsonl"
PAIRS = [pair(40, 20, 7), pair(35, 3, 60), pair(70, 11, 12)]
SIZE = st.integers(1, 50)
BOTH_WAYS = (nullcontext, gradient_checkpointing)


def run_shared(
    model: nn.Module, pairs: list[EncodedPair] = PAIRS, **options: Any
) -> dict[str, np.ndarray]:
    return run(model, shared_prefix_engine(model, **options), pairs)


def assert_equal_to_the_reference(
    model: nn.Module, engine: Engine, pairs: list[EncodedPair], contexts: Any = BOTH_WAYS
) -> None:
    expected = run(model, REFERENCE, pairs)
    for checkpointing in contexts:
        with checkpointing(model):
            actual = run(model, engine, pairs)
        np.testing.assert_allclose(actual["logps"], expected["logps"], atol=1e-5)
        assert greatest_difference(actual, expected) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_reference(name: str) -> None:
    model = architecture_with_lora(name)
    engine = choose_engine("shared_prefix", model)
    assert engine.name == "shared_prefix", engine.note
    assert_equal_to_the_reference(model, engine, PAIRS)


@pytest.mark.parametrize("name", RECURRENT)
def test_states_that_are_younger_than_a_convolution(name: str) -> None:
    """Prefixes of 0 to 3 tokens, shorter than the convolutions' kernels; responses of one token,
    in a pass with longer ones and alone."""
    model = architecture_with_lora(name)
    engine = shared_prefix_engine(model)
    for prompt in (1, 2, 3, 4):
        pairs = [pair(prompt, 1, 6), pair(prompt + 2, 4, 1)]
        assert engine.collate(pairs).arrays[0].shape == (2, prompt - 1)
        assert_equal_to_the_reference(model, engine, pairs, BOTH_WAYS[prompt % 2 :][:1])
    one_token = [pair(5, 1, 1)]
    assert [group[0].shape for group in engine.collate(one_token).arrays[1]] == [(2, 1)]
    assert_equal_to_the_reference(model, engine, one_token)


@pytest.mark.parametrize("prompt", [22, 23, 24, 25, 26, 47, 48, 49])
@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_at_the_window_and_beyond(name: str, prompt: int) -> None:
    """Prefixes that end just before and behind the window of 24, responses that leave it."""
    model = architecture_with_lora(name)
    pairs = [pair(prompt, 1, 3), pair(prompt, 30, 24)]
    assert greatest_difference(run_shared(model, pairs), run(model, REFERENCE, pairs)) < 1e-4


def test_gradients_are_those_of_the_loss_in_float64() -> None:
    """Against finite differences of an independent implementation, tests/helpers/float64.py."""
    model = architecture_with_lora()
    engine, pairs = shared_prefix_engine(model), [*PAIRS, pair(1, 5, 2)]
    options = {"beta": 2.5, "gamma_beta_ratio": 0.55}
    gradients_of = GradientFunction(model, options, engine, compiled=False)
    step = collate_step(pairs, engine, TrainConfig(batch_size=2, gradient_accumulation_steps=2))
    assert len(step.micro_batches) > 1
    parts, gradient = step_gradients(gradients_of, step)
    loss = np.concatenate([np.array(part["loss"]) for part in parts]).mean()

    weights = {k: np.array(v, np.float64) for k, v in tree_flatten(model.parameters())}
    sequences = [
        ((p.chosen.tokens, p.chosen.score_start), (p.rejected.tokens, p.rejected.score_start))
        for p in pairs
    ]
    shape: dict[str, Any] = {"heads": 4, "kv_heads": 2, "rope_theta": 1e4, "eps": 1e-5}

    def exact(weights: dict[str, np.ndarray]) -> float:
        return float64.simpo_loss(weights, sequences, **options, **shape, lora_scale=2.0)

    assert loss == pytest.approx(exact(weights), abs=1e-5)
    actual: dict[str, Any] = {name: np.array(g) for name, g in tree_flatten(gradient)}
    largest = max(float(np.abs(g).max()) for g in actual.values())
    for name, g in actual.items():
        index = np.unravel_index(np.abs(g).argmax(), g.shape)
        expected = float64.finite_difference(exact, weights, name, index)
        assert g[index] == pytest.approx(expected, rel=1e-4, abs=1e-5 * largest), name


@pytest.mark.parametrize("checkpointing", BOTH_WAYS)
def test_real_pairs_on_a_real_model(smollm2_folder: Path, checkpointing: Callable) -> None:
    """Two of the examples, or of a file of yours: PARITY_PAIRS=some.jsonl."""
    model, tokenizer, *_ = load_model(str(smollm2_folder))
    data = os.environ.get("PARITY_PAIRS", str(EXAMPLES))
    pairs, _ = encode_pairs(Encoder(tokenizer, DataConfig()), load_pairs(data).pairs[:2])
    model = with_lora(model)
    expected = run(model, REFERENCE, pairs)
    with checkpointing(model):
        actual = run_shared(model, pairs)
    np.testing.assert_allclose(actual["logps"], expected["logps"], atol=1e-5)
    assert greatest_difference(actual, expected) < 1e-4


def test_responses_whose_scoring_starts_apart() -> None:
    """Only one has thinking: before the other, the template writes an empty block, not scored."""
    tokenizer = template_tokenizer("qwen3")
    thinking = [assistant("No", reasoning_content="Let me see.")]
    plain = [assistant("Because.")]
    pairs = [Pair([user("Why?")], thinking, plain), Pair([user("So?")], plain, thinking)]
    encoded, _ = encode_pairs(Encoder(tokenizer, DataConfig()), pairs)
    for one in encoded:
        assert abs(one.chosen.score_start - one.rejected.score_start) == one.template_tokens == 4
    model = with_lora(tiny_model(vocab_size=len(tokenizer)))
    expected, actual = run(model, REFERENCE, encoded), run_shared(model, encoded)
    np.testing.assert_allclose(actual["logps"], expected["logps"], atol=1e-5)
    assert greatest_difference(actual, expected) < 1e-4


@given(st.lists(st.builds(pair, SIZE, SIZE, SIZE), min_size=1, max_size=4))
@settings(deadline=None, max_examples=15)
def test_any_lengths(pairs: list[EncodedPair]) -> None:
    model = architecture_with_lora()
    assert greatest_difference(run_shared(model, pairs), run(model, REFERENCE, pairs)) < 1e-4


@pytest.mark.parametrize("settings", [{"dora": True}, {"num_layers": 1}], ids=["dora", "one-layer"])
def test_other_adapters(settings: dict) -> None:
    model = architecture_with_lora(**settings)
    assert greatest_difference(run_shared(model), run(model, REFERENCE, PAIRS)) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_base_and_head(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied, hidden_size=64, intermediate_size=64)
    nn.quantize(model, 32, 8)
    model = with_lora(model)
    assert greatest_difference(run_shared(model), run(model, REFERENCE, PAIRS)) < 1e-4


SMALLEST_CHUNKS = replace(CPU, chunk_logits=1)


def model_with_trained_head(kind: str) -> Any:
    """A model whose head trains: as the tied embedding, as a matrix, through LoRA, or its norm."""
    model = with_lora(tiny_model("llama", tie_word_embeddings=kind == "tied"))
    if kind == "tied":
        model.model.embed_tokens.unfreeze()
    elif kind == "dense":
        model.lm_head.unfreeze()
    elif kind == "norm":
        model.model.norm.unfreeze()
    else:
        model.lm_head = LoRALinear.from_base(model.lm_head, r=4)
        model.lm_head.lora_b = mx.random.normal(model.lm_head.lora_b.shape)
    return model


@pytest.mark.parametrize("kind", ["tied", "dense", "lora", "norm"])
def test_a_head_that_trains_gets_its_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several chunks, each of which adds its part to the weights' gradient.
    sizes = recorded_sizes(16, monkeypatch)
    model = model_with_trained_head(kind)
    assert not is_head_frozen(model)
    expected = run(model, REFERENCE, PAIRS)
    for checkpointing in BOTH_WAYS:
        with checkpointing(model):
            actual = run_shared(model, figures=SMALLEST_CHUNKS)
            assert greatest_difference(actual, expected) < 1e-4
    assert max(sizes) <= 16


def test_an_engine_stays_right_when_the_head_changes_after_the_choice() -> None:
    """New weights and LoRA in the head, as `evaluate` loads them after the base model's turn."""
    model = with_lora(tiny_model("llama", tie_word_embeddings=False))
    engine = choose_engine("shared_prefix", model)
    model.lm_head.weight = 1.5 * model.lm_head.weight
    assert greatest_difference(run(model, engine, PAIRS), run(model, REFERENCE, PAIRS)) < 1e-4
    model.lm_head = LoRALinear.from_base(model.lm_head, r=4)
    model.lm_head.lora_b = mx.random.normal(model.lm_head.lora_b.shape)
    assert greatest_difference(run(model, engine, PAIRS), run(model, REFERENCE, PAIRS)) < 1e-4


@pytest.mark.parametrize("saved_scores", [0, attention.MAX_SAVED_SCORES])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_size_of_attentions_tiles_changes_nothing(
    name: str, saved_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = architecture_with_lora(name)
    monkeypatch.setattr(attention, "MIN_TILE_ROWS", 4)
    monkeypatch.setattr(attention, "MAX_SAVED_SCORES", saved_scores)
    engine = shared_prefix_engine(model, figures=replace(CPU, tile_scores=1))
    assert_equal_to_the_reference(model, engine, [pair(20, 9, 15), pair(25, 11, 3)])


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_size_of_a_chunk_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = architecture_with_lora()
    with monkeypatch.context() as whole:
        sizes = recorded_sizes(1000, whole)
        expected = run_shared(model)
        assert sizes == [sum(p.chosen.num_scored + p.rejected.num_scored for p in PAIRS)]
    sizes = recorded_sizes(rows, monkeypatch)
    actual = run_shared(model, figures=SMALLEST_CHUNKS)
    assert sizes[0] in range(1, rows + 1)
    assert greatest_difference(actual, expected) < 1e-5


# --- planted defects -------------------------------------------------------------------------


def test_a_trained_head_taken_for_a_frozen_one_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head's gradient is lost and nothing else changes: the comparison above must see that."""
    model = model_with_trained_head("dense")
    expected = run(model, REFERENCE, PAIRS)
    assert greatest_difference(run_shared(model), expected) < 1e-4
    monkeypatch.setattr(token_logps, "is_head_frozen", lambda model: True)
    actual = run_shared(model)
    assert greatest_difference(actual, expected) == pytest.approx(1.0)
    head = "lm_head.weight"
    assert not actual.pop(head).any()
    assert np.abs(expected.pop(head)).max() > 1e-3
    assert greatest_difference(actual, expected) < 1e-4


# A layer of each kind: keys and values; convolution and recurrence; both in one layer.
KINDS = ["llama", "mamba", "lfm2", "qwen3_5", "falcon_h1"]
# Two passes of one row each, which follow the same prefix.
LEAKY = [pair(20, 9, 40)]


@pytest.mark.parametrize("name", KINDS)
def test_a_prefix_without_gradients_would_be_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = architecture_with_lora(name)
    expected = run(model, REFERENCE, PAIRS)
    original = prefix_cache.cache_arrays
    monkeypatch.setattr(
        prefix_cache, "cache_arrays", lambda cache: tree_map(mx.stop_gradient, original(cache))
    )
    actual = run_shared(model)
    np.testing.assert_allclose(actual["logps"], expected["logps"], atol=1e-5)
    assert greatest_difference(actual, expected) > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_that_a_checkpointed_layer_changes_would_be_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = architecture_with_lora(name)
    expected = run(model, REFERENCE, PAIRS)
    name = "mlx_simpo.engine.gradient_checkpointing.is_prefix_cache"
    monkeypatch.setattr(name, lambda value: False)
    with gradient_checkpointing(model):
        assert greatest_difference(run_shared(model), expected) > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_a_state_that_leaks_from_chosen_to_rejected_would_be_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefix's caches themselves instead of forks: the second pass follows the first."""
    monkeypatch.setattr(choice, "can_extend_prefix", lambda model: False)
    model = architecture_with_lora(name)
    expected = run(model, REFERENCE, LEAKY)
    assert greatest_difference(run_shared(model, LEAKY), expected) < 1e-4
    monkeypatch.setattr(prefix_cache, "with_arrays", no_fork)
    actual = run_shared(model, LEAKY)
    chosen, rejected = actual["logps"] - expected["logps"]
    # The longer response runs first.
    assert abs(rejected) < 1e-5
    assert abs(chosen) > 1e-3
    assert greatest_difference(actual, expected) > 1e-2


@pytest.mark.parametrize("name", RECURRENT)
def test_padding_that_reaches_a_state_would_be_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a state that is used again: a prefix's, with two tokens of padding behind it, which
    attention does not see."""
    model = architecture_with_lora(name)
    expected = run(model, REFERENCE, LEAKY)
    original = shared_prefix.run_prefix

    def padded(model: nn.Module, tokens: mx.array) -> list:
        with_padding = original(model, mx.pad(tokens, [(0, 0), (0, 2)]))
        for cache, without in zip(with_padding, original(model, tokens), strict=True):
            inner = zip(
                getattr(cache, "caches", [cache]),
                getattr(without, "caches", [without]),
                strict=True,
            )
            for one, other in inner:
                if isinstance(one, prefix_cache.PrefixKVCache):
                    prefix_cache.set_arrays(one, prefix_cache.cache_arrays(other))
        return with_padding

    monkeypatch.setattr(shared_prefix, "run_prefix", padded)
    actual = run_shared(model, LEAKY)
    assert np.abs(actual["logps"] - expected["logps"]).max() > 1e-3
    assert greatest_difference(actual, expected) > 1e-2


@pytest.mark.parametrize("name", ["mamba", "qwen3_5", "falcon_h1"])
def test_a_fork_that_aliases_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer may write into the arrays of its states: no other pass sees it. It would see it if a
    fork held the same arrays."""
    model = architecture_with_lora(name)
    expected = run(model, REFERENCE, LEAKY)
    monkeypatch.setattr(prefix_cache.PrefixStates, "__setitem__", overwrite)
    for checkpointing in BOTH_WAYS:
        with checkpointing(model):
            assert greatest_difference(run_shared(model, LEAKY), expected) < 1e-4

    monkeypatch.setattr(prefix_cache, "tree_map", lambda fork, arrays: arrays)
    actual = run_shared(model, LEAKY)
    assert np.abs(actual["logps"] - expected["logps"]).max() > 1e-3


# --- through training and evaluation ---------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [None, 150])
def test_training_is_the_same(max_tokens: int | None) -> None:
    def trained(choose: Callable[[nn.Module], Engine], limit: int | None) -> dict[str, np.ndarray]:
        options = TrainConfig(
            batch_size=2,
            gradient_accumulation_steps=2,
            steps=3,
            learning_rate=1e-3,
            adam_epsilon=1e-2,  # without the sign of rounding noise in the first steps
            max_tokens_per_step=limit,
        )
        model = architecture_with_lora()
        pairs = [*PAIRS, pair(9, 4, 30), pair(33, 17, 2)]
        config = SimPOConfig(model="tiny", train=options)
        steps = train_steps(model, pairs, config, choose(model))
        losses = [step.metrics["loss"] for step in steps]
        weights = {k: np.array(v) for k, v in tree_flatten(model.trainable_parameters())}
        return weights | {"losses": np.array(losses)}

    expected = trained(lambda model: REFERENCE, None)
    assert greatest_difference(trained(shared_prefix_engine, max_tokens), expected) < 1e-4


def test_evaluation_is_the_same() -> None:
    model = architecture_with_lora()
    actual, expected = (
        # Of PAIRS alone the margins are near 0, and what is left of them is rounding.
        evaluate_pairs(model, [*PAIRS, pair(3, 5, 4)], ObjectiveConfig(), 2, engine=engine)
        for engine in (shared_prefix_engine(model), REFERENCE)
    )
    assert actual.metrics == pytest.approx(expected.metrics, rel=1e-5)
    np.testing.assert_allclose(actual.margins, expected.margins, atol=1e-5)
