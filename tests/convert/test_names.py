"""Names of layers in MLX, in checkpoints and in PEFT. (Against transformers: tests/parity.)"""

import mlx.nn as nn
import pytest
from helpers.mlx_folders import MIXTRAL
from helpers.tiny import tiny_model

from mlx_simpo import SimPOError
from mlx_simpo.convert.architectures import TABLE
from mlx_simpo.convert.names import (
    TEXT_PREFIXES,
    Target,
    adaptable_layers,
    check_not_tied,
    layer_shape,
    peft_target,
    peft_targets,
    single_expert_target,
    transformers_name,
)

QWEN3_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
Q = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("model_type", "changes"), [("mixtral", MIXTRAL), ("qwen3_moe", QWEN3_MOE)]
)
def test_every_layer_has_a_name_of_its_own(model_type: str, changes: dict) -> None:
    layers = adaptable_layers(tiny_model(model_type, **changes))
    rule = TABLE[model_type]
    targets = [peft_target(path, rule) for path in layers]
    assert len(set(targets)) == len(layers)
    stacked = [path for path in layers if "switch" in path]
    single = {single_expert_target(path, n, rule).module for path in stacked for n in range(4)}
    assert len(single) == 4 * len(stacked) > 0


@pytest.mark.parametrize(
    ("model_type", "path", "expected"),
    [
        ("llama", f"model.{Q}", Target(f"model.{Q}")),
        ("qwen3_5_text", f"language_model.model.{Q}", Target(f"model.{Q}")),
        ("qwen3_5", f"language_model.model.{Q}", Target(f"model.language_model.{Q}")),
        ("qwen3_5", "language_model.lm_head", Target("lm_head")),
        (
            "mixtral",
            "model.layers.0.block_sparse_moe.switch_mlp.up_proj",
            Target("model.layers.0.mlp.experts", "gate_up_proj", (1, 2)),
        ),
        (
            "mixtral",
            "model.layers.0.block_sparse_moe.gate",
            Target("model.layers.0.mlp.gate", "weight"),
        ),
    ],
)
def test_names_in_peft(model_type: str, path: str, expected: Target) -> None:
    assert peft_target(path, TABLE[model_type]) == expected


@pytest.mark.parametrize("prefix", TEXT_PREFIXES)
def test_an_adapters_modules_tell_where_it_has_the_text_part(prefix: str) -> None:
    paths = [f"language_model.model.{Q}"]
    targets = peft_targets(paths, TABLE["gemma3"], [f"{prefix}{Q}"])
    assert targets == {paths[0]: Target(f"{prefix}{Q}")}
    assert transformers_name(paths[0], prefix) == f"{prefix}{Q}"


def test_the_shape_of_a_layer_is_that_of_its_weight_before_quantization() -> None:
    linear, embedding = nn.Linear(64, 32), nn.Embedding(96, 64)
    assert layer_shape(linear) == layer_shape(nn.QuantizedLinear.from_linear(linear)) == (32, 64)
    assert layer_shape(embedding) == layer_shape(embedding.to_quantized(bits=8)) == (96, 64)


@pytest.mark.parametrize(("tied", "path"), [(True, "model.embed_tokens"), (False, None)])
def test_an_adapter_on_a_tied_embedding_is_rejected(tied: bool, path: str | None) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    check_not_tied([f"model.{Q}"], model)
    if path is None:
        check_not_tied(["model.embed_tokens", "lm_head"], model)
        return
    with pytest.raises(SimPOError, match=r"embed_tokens, which is also the output layer .* fuse"):
        check_not_tied([path], model)
