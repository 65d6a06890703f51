"""What a model's layers ask of attention, as they are seen to ask it."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.architectures import ARCHITECTURES, architecture_with_lora, with_lora
from helpers.tiny import tiny_model
from mlx.utils import tree_map

from mlx_simpo.engine.attention_shapes import (
    AttentionShape,
    attention_shape,
    mask_kind,
    observe_attention,
)
from mlx_simpo.engine.operations import AttentionCall
from mlx_simpo.randomness import random_state

PLAIN = AttentionShape(4, 2, 8, 8, mx.float32, 8**-0.5)
WINDOW = PLAIN._replace(mask="window")
EXPECTED: dict[str, list[AttentionShape]] = {
    "llama": [PLAIN],
    "phi3": [PLAIN],
    "mistral": [WINDOW, PLAIN],
    "gemma3_text": [WINDOW._replace(scale=0.0625), PLAIN._replace(scale=0.0625)],
    # Its layers with windows have smaller heads than the others.
    "gemma4_text": [
        WINDOW._replace(scale=1.0),
        PLAIN._replace(scale=1.0, head_size=16, value_size=16),
    ],
    "granite": [PLAIN._replace(scale=0.3)],
    "gpt_bigcode": [PLAIN._replace(kv_heads=1)],
    # Some layers or a part of each are recurrent.
    "qwen3_next": [PLAIN],
    "qwen3_5": [PLAIN],
    "falcon_h1": [PLAIN],
    "recurrent_gemma": [WINDOW._replace(kv_heads=1)],
    "mamba": [],
    # Its softcap is in code of its own.
    "gemma2": [],
}
# Multi-head latent attention: a part of the scores comes as an additive mask, and keys and values
# are not of the same size.
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 2,
    "rope_scaling": None,
}
GPT_OSS: dict[str, Any] = {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_shapes_are_those_of_the_layers(name: str) -> None:
    """Each kind once; a window is seen though three tokens are fewer than it."""
    model = architecture_with_lora(name)
    assert list(observe_attention(model)) == EXPECTED[name]


def test_every_architecture_can_be_observed() -> None:
    """Latent attention, lists of caches, windows of chunks and recurrent layers too."""
    kinds = {
        name: {shape.mask for shape in observe_attention(architecture_with_lora(name))}
        for name in ARCHITECTURES
    }
    assert set.union(*kinds.values()) == {"causal", "window", "other"}
    assert sum(not seen for seen in kinds.values()) < len(kinds) / 4


def test_masks_that_add_to_the_scores() -> None:
    (shape,) = observe_attention(tiny_model("deepseek_v3", **DEEPSEEK))
    assert shape.mask == "other"
    assert not shape.is_plain


def test_attention_sinks() -> None:
    shapes = observe_attention(tiny_model("gpt_oss", **GPT_OSS))
    assert [(shape.sinks, shape.mask) for shape in shapes] == [(True, "window"), (True, "causal")]
    assert not any(shape.is_plain for shape in shapes)


def test_the_dtype_is_what_the_layers_compute_with() -> None:
    """LoRA in float32 on a model in bfloat16 makes float32 of what it is attached to."""
    model = tiny_model()
    model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
    assert [shape.dtype for shape in observe_attention(model)] == [mx.bfloat16]
    lora = with_lora(model)
    lora.update(tree_map(lambda p: p.astype(mx.float32), lora.trainable_parameters()))
    hidden = lora.model.layers[0].self_attn.q_proj(mx.zeros((1, 1, 32), mx.bfloat16))
    assert observe_attention(lora)[0].dtype == hidden.dtype


def test_nothing_is_drawn_or_changed() -> None:
    model = architecture_with_lora(dropout=0.5).train()
    before, tokens = random_state(), mx.arange(9)[None]
    expected = np.array(model.eval()(tokens))
    observe_attention(model.train())
    np.testing.assert_array_equal(random_state(), before)
    np.testing.assert_array_equal(model.eval()(tokens), expected)


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (None, "causal"),
        ("causal", "causal"),
        (mx.ones((4, 6), mx.bool_), "window"),
        (mx.ones((2, 1, 4, 6), mx.bool_), "other"),
        (mx.ones((4, 6)), "other"),
    ],
)
def test_kinds_of_masks(mask: Any, kind: str) -> None:
    assert mask_kind(mask) == kind
    queries, keys, values = mx.zeros((1, 4, 4, 8)), mx.zeros((1, 2, 6, 8)), mx.zeros((1, 2, 6, 5))
    call = AttentionCall(queries, keys, values.astype(mx.float16), 0.5, mask)
    shape = attention_shape(call)
    assert shape == AttentionShape(4, 2, 8, 5, mx.float32, 0.5, False, kind)  # type: ignore[arg-type]
    assert shape.description == "head size 8/5 in float32"
    assert PLAIN.description == "head size 8 in float32"
