"""The shared-prefix engine against the reference: the same numbers and gradients, in every
architecture that it is offered for, and the defects it could have, planted."""

import io
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import float64
from helpers.gradients import greatest_difference, run
from helpers.tiny import tiny_model
from helpers.tiny import token_pair as pair
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear

from mlx_simpo import (
    DataConfig,
    LoRAConfig,
    ObjectiveConfig,
    SimPOConfig,
    TrainConfig,
    evaluate_pairs,
    load_pairs,
    train_steps,
)
from mlx_simpo.data.encode import EncodedPair, Encoder, encode_pairs
from mlx_simpo.engine import attention
from mlx_simpo.engine import prefix_cache as prefix
from mlx_simpo.engine import token_logps as logps
from mlx_simpo.engine.choice import REFERENCE, SHARED_PREFIX, Engine, choose_engine
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
from mlx_simpo.engine.head import is_head_frozen
from mlx_simpo.engine.token_logps import token_logps
from mlx_simpo.model.loading import load_model
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.training.step import GradientFunction, collate_step, step_gradients

EXAMPLES = Path(__file__).parents[2] / "examples" / "train.jsonl"
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    # mlx-lm reads Mistral's window from a list of layer types only; a third as long as the pairs.
    "mistral": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 24, "sliding_window_pattern": 2, "num_hidden_layers": 4},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**MOE, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "olmo2": {},
    "granite": {
        "logits_scaling": 4.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "cohere": {"logit_scale": 0.25, "layer_norm_eps": 1e-5},
    "smollm3": {},
}

PAIRS = [pair(40, 20, 7), pair(35, 3, 60), pair(70, 11, 12)]


def with_lora(model: nn.Module, **lora: Any) -> nn.Module:
    attach_lora(model, LoRAConfig(rank=4, **lora), seed=0)
    noise = tree_map(lambda p: p + 0.05 * mx.random.normal(p.shape), model.trainable_parameters())
    model.update(noise)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_reference(name: str) -> None:
    model = with_lora(tiny_model(name, **ARCHITECTURES[name]))
    assert choose_engine("shared_prefix", model).name == "shared_prefix"
    expected = run(model, REFERENCE, PAIRS)
    for checkpointing in (nullcontext, gradient_checkpointing):
        with checkpointing(model):
            found = run(model, SHARED_PREFIX, PAIRS)
        np.testing.assert_allclose(found["logps"], expected["logps"], atol=1e-5)
        assert greatest_difference(found, expected) < 1e-4


@pytest.mark.parametrize("prompt", [22, 23, 24, 25, 26, 47, 48, 49])
@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_at_the_window_and_beyond(name: str, prompt: int) -> None:
    """Prefixes that end just before and behind the window of 24, answers that leave it."""
    model = with_lora(tiny_model(name, **ARCHITECTURES[name]))
    pairs = [pair(prompt, 1, 3), pair(prompt, 30, 24)]
    found, expected = run(model, SHARED_PREFIX, pairs), run(model, REFERENCE, pairs)
    assert greatest_difference(found, expected) < 1e-4


def test_slopes_are_those_of_the_loss_in_float64() -> None:
    """Against finite differences of an implementation of its own, tests/float64.py."""
    model = with_lora(tiny_model())
    engine, pairs = SHARED_PREFIX, [*PAIRS, pair(1, 5, 2)]
    options = {"beta": 2.5, "gamma_beta_ratio": 0.55}
    gradients_of = GradientFunction(model, options, engine, compiled=False)
    step = collate_step(pairs, engine, TrainConfig(batch_size=2, gradient_accumulation_steps=2))
    assert len(step.micro_batches) > 1
    parts, gradient = step_gradients(gradients_of, step)
    loss = np.concatenate([np.array(part["loss"]) for part in parts]).mean()

    weights = {k: np.array(v, np.float64) for k, v in tree_flatten(model.parameters())}
    sides = [
        ((p.chosen.tokens, p.chosen.score_start), (p.rejected.tokens, p.rejected.score_start))
        for p in pairs
    ]
    shape: dict[str, Any] = {"heads": 4, "kv_heads": 2, "rope_theta": 1e4, "eps": 1e-5}

    def exact(weights: dict[str, np.ndarray]) -> float:
        return float64.simpo_loss(weights, sides, **options, **shape, lora_scale=2.0)

    assert loss == pytest.approx(exact(weights), abs=1e-5)
    found: dict[str, Any] = {name: np.array(g) for name, g in tree_flatten(gradient)}
    steepest = max(float(np.abs(g).max()) for g in found.values())
    for name, g in found.items():
        place = np.unravel_index(np.abs(g).argmax(), g.shape)
        slope = float64.finite_difference(exact, weights, name, place)
        assert g[place] == pytest.approx(slope, rel=1e-4, abs=1e-5 * steepest), name


@pytest.mark.parametrize("checkpointing", [nullcontext, gradient_checkpointing])
def test_real_pairs_on_a_real_model(smollm2_folder: Path, checkpointing: Callable) -> None:
    """Two of the examples, or of a file of yours: PARITY_PAIRS=some.jsonl."""
    model, tokenizer, *_ = load_model(str(smollm2_folder))
    data = os.environ.get("PARITY_PAIRS", str(EXAMPLES))
    pairs, _ = encode_pairs(Encoder(tokenizer, DataConfig()), load_pairs(data).pairs[:2])
    model = with_lora(model)
    expected = run(model, REFERENCE, pairs)
    with checkpointing(model):
        found = run(model, SHARED_PREFIX, pairs)
    np.testing.assert_allclose(found["logps"], expected["logps"], atol=1e-5)
    assert greatest_difference(found, expected) < 1e-4


SIZE = st.integers(1, 50)


@given(st.lists(st.builds(pair, SIZE, SIZE, SIZE), min_size=1, max_size=4))
@settings(deadline=None, max_examples=15)
def test_any_lengths(pairs: list[EncodedPair]) -> None:
    model = with_lora(tiny_model())
    found, expected = run(model, SHARED_PREFIX, pairs), run(model, REFERENCE, pairs)
    assert greatest_difference(found, expected) < 1e-4


@pytest.mark.parametrize("settings", [{"dora": True}, {"num_layers": 1}], ids=["dora", "one-block"])
def test_other_adapters(settings: dict) -> None:
    model = with_lora(tiny_model(), **settings)
    found, expected = run(model, SHARED_PREFIX, PAIRS), run(model, REFERENCE, PAIRS)
    assert greatest_difference(found, expected) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_base_and_head(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied, hidden_size=64, intermediate_size=64)
    nn.quantize(model, 32, 8)
    model = with_lora(model)
    found, expected = run(model, SHARED_PREFIX, PAIRS), run(model, REFERENCE, PAIRS)
    assert greatest_difference(found, expected) < 1e-4


def trained_head(kind: str) -> nn.Module:
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
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 1)  # several chunks, each with its share
    model = trained_head(kind)
    assert not is_head_frozen(model)
    found, expected = run(model, SHARED_PREFIX, PAIRS), run(model, REFERENCE, PAIRS)
    assert greatest_difference(found, expected) < 1e-4
    with gradient_checkpointing(model):
        assert greatest_difference(run(model, SHARED_PREFIX, PAIRS), expected) < 1e-4


def test_a_trained_head_taken_for_a_frozen_one_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trained_head("dense")
    expected = run(model, REFERENCE, PAIRS)
    monkeypatch.setattr(logps, "is_head_frozen", lambda model: True)
    found = run(model, SHARED_PREFIX, PAIRS)
    assert np.abs(expected["lm_head.weight"]).max() > 1e-3
    assert not found["lm_head.weight"].any()


def products(output: Any) -> int:
    """Matrix products with a whole vocabulary in them that ``output`` waits for."""
    graph = io.StringIO()
    mx.export_to_dot(graph, output)
    return len(re.findall(r'label ="(?:Quantized)?Matmul"|label ="AddMM"', graph.getvalue()))


def test_products_of_the_head() -> None:
    """One to evaluate, two to train, and the reference's three for a head that trains."""
    model = with_lora(tiny_model("llama", tie_word_embeddings=False))
    rows, targets = mx.random.normal((5, 32)), mx.arange(5)
    mx.eval(rows, targets)

    def slope(model: nn.Module) -> mx.array:
        return mx.grad(lambda rows: token_logps(model, rows, targets, training=True).sum())(rows)

    assert products(token_logps(model, rows, targets, training=False)) == 1
    assert products(slope(model)) == 2
    assert products(slope(trained_head("dense"))) == 3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whose_attention_is_made_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every architecture's, but Gemma 2's, which has a softcap in code of its own; and that of no
    other cache."""
    model, calls = tiny_model(name, **ARCHITECTURES[name]), []

    def counted(*given: Any) -> mx.array:
        calls.append(given)
        return attention.attention(*given)

    monkeypatch.setattr(prefix, "attention", counted)
    run(with_lora(model), SHARED_PREFIX, PAIRS[:1])
    assert bool(calls) == (name != "gemma2")
    calls.clear()
    mx.eval(model(mx.arange(9)[None], cache=make_prompt_cache(model)), model(mx.arange(9)[None]))
    assert calls == []


@pytest.mark.parametrize("kept", [0, attention.KEPT])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_size_of_attentions_blocks_changes_nothing(
    name: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(tiny_model(name, **ARCHITECTURES[name]))
    pairs = [pair(20, 9, 15), pair(25, 11, 3)]
    expected = run(model, REFERENCE, pairs)
    for constant, value in {"BLOCK_CPU": 1, "ROWS": 4, "KEPT": kept}.items():
        monkeypatch.setattr(attention, constant, value)
    for checkpointing in (nullcontext, gradient_checkpointing):
        with checkpointing(model):
            assert greatest_difference(run(model, SHARED_PREFIX, pairs), expected) < 1e-4


def test_the_size_of_a_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(tiny_model())
    expected = run(model, SHARED_PREFIX, PAIRS)
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 1)
    assert greatest_difference(run(model, SHARED_PREFIX, PAIRS), expected) < 1e-5


RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {
        "state_size": 4,
        "intermediate_size": 48,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "qwen3_next": {  # gated delta rule in one layer, attention in the other, as in Qwen 3.5
        **MOE,
        "full_attention_interval": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.5,
    },
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_state_that_cannot_be_forked_takes_the_reference_and_says_so(name: str) -> None:
    model = with_lora(tiny_model(name, **RECURRENT[name]))
    engine = choose_engine("shared_prefix", model)
    assert engine.name == "reference"
    assert "ArraysCache" in engine.note
    found = run(model, engine, PAIRS[:1])
    assert all(np.isfinite(value).all() for value in found.values())
    assert any(value.any() for key, value in found.items() if key != "logps")


def test_an_architecture_that_computes_otherwise_takes_the_reference_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix.Layer, "make_mask", lambda *args, **kwargs: None)
    engine = choose_engine("shared_prefix", tiny_model())
    assert engine.name == "reference"
    assert "differ by" in engine.note


# --- planted defects -------------------------------------------------------------------------


def test_a_prefix_without_gradients_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(prefix.Layer):
        def arrays(self) -> tuple:
            return tuple(mx.stop_gradient(a) for a in super().arrays())

    model = with_lora(tiny_model())
    expected = run(model, REFERENCE, PAIRS)
    monkeypatch.setattr(prefix, "Layer", Cut)
    assert greatest_difference(run(model, SHARED_PREFIX, PAIRS), expected) > 1e-2


def test_a_cache_that_a_checkpointed_block_changes_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_lora(tiny_model())
    expected = run(model, REFERENCE, PAIRS)
    monkeypatch.setattr("mlx_simpo.engine.gradient_checkpointing.Layer", type("NoLayer", (), {}))
    with gradient_checkpointing(model):
        assert greatest_difference(run(model, SHARED_PREFIX, PAIRS), expected) > 1e-2


def test_a_chosen_token_in_the_rejected_answer_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_lora(tiny_model())
    expected = run(model, REFERENCE, PAIRS)
    honest = prefix.Layer.update_and_fetch
    seen: list[tuple[mx.array, mx.array]] = []

    def leaking(self: Any, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        behind = self.offset > 0
        keys, values = honest(self, keys, values)
        if behind and seen and seen[0][0].shape == keys.shape:
            keys, values = (0.5 * a + 0.5 * b for a, b in zip((keys, values), seen[0], strict=True))
        seen.extend([(keys, values)] if behind else [])
        return keys, values

    monkeypatch.setattr(prefix.Layer, "update_and_fetch", leaking)
    assert greatest_difference(run(model, SHARED_PREFIX, PAIRS), expected) > 1e-2


# --- the way through training ----------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [None, 150])
def test_training_is_the_same(max_tokens: int | None) -> None:
    def trained(engine: Engine) -> dict[str, np.ndarray]:
        options = TrainConfig(
            batch_size=2,
            gradient_accumulation_steps=2,
            steps=3,
            learning_rate=1e-3,
            adam_epsilon=1e-2,  # without the sign of rounding noise in the first steps
            max_tokens_per_step=max_tokens if engine is SHARED_PREFIX else None,
        )
        model = with_lora(tiny_model())
        pairs = [*PAIRS, pair(9, 4, 30), pair(33, 17, 2)]
        config = SimPOConfig(model="tiny", train=options)
        losses = [step.metrics["loss"] for step in train_steps(model, pairs, config, engine)]
        weights = {k: np.array(v) for k, v in tree_flatten(model.trainable_parameters())}
        return weights | {"losses": np.array(losses)}

    assert greatest_difference(trained(SHARED_PREFIX), trained(REFERENCE)) < 1e-4


def test_evaluation_is_the_same() -> None:
    model = with_lora(tiny_model())
    found, expected = (
        evaluate_pairs(model, PAIRS, ObjectiveConfig(), 2, engine=engine)
        for engine in (SHARED_PREFIX, REFERENCE)
    )
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    np.testing.assert_allclose(found.margins, expected.margins, atol=1e-5)
