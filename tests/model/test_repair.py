"""Names that transformers 5 writes and mlx-lm does not read. (Logits of such folders against
transformers: tests/parity/test_convert_zoo.py.)"""

import pytest

from mlx_simpo.model.repair import config_repairs


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"model_type": "llama", "num_local_experts": 4}, {}),
        ({"model_type": "qwen3_moe", "num_local_experts": 4}, {"num_experts": 4}),
        ({"model_type": "qwen3_moe", "num_local_experts": 4, "num_experts": 8}, {}),
        ({"model_type": "lfm2", "hidden_size": 64}, {"block_dim": 64}),
        ({"model_type": "qwen3_5_text"}, {"model_type": "qwen3_5"}),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"1": {"head_dim": 32}}},
            {"global_head_dim": 32},
        ),
        (
            {
                "model_type": "gemma4_text",
                "per_layer_config": {"1": {"head_dim": 32, "num_key_value_heads": 1}},
                "global_head_dim": 64,
            },
            {"num_global_key_value_heads": 1},
        ),
        # A model that sees: mlx-lm reads these from other places than transformers writes them to.
        (
            {"model_type": "gemma3", "text_config": {"vocab_size": 9}},
            {"vocab_size": 9},
        ),
        ({"model_type": "gemma3", "vocab_size": 7, "text_config": {"vocab_size": 9}}, {}),
        (
            {
                "model_type": "gemma4",
                "text_config": {"a": 1, "per_layer_config": {"1": {"head_dim": 32}}},
            },
            {
                "text_config": {
                    "a": 1,
                    "per_layer_config": {"1": {"head_dim": 32}},
                    "global_head_dim": 32,
                }
            },
        ),
        # Two widths cannot be said in one word; mlx-lm then refuses the shapes.
        (
            {
                "model_type": "gemma4_text",
                "per_layer_config": {"1": {"head_dim": 32}, "2": {"head_dim": 64}},
            },
            {},
        ),
        (
            {
                "model_type": "qwen3_moe",
                "num_local_experts": 4,
                "rope_parameters": {"rope_theta": 7},
            },
            {"num_experts": 4, "rope_theta": 7},
        ),
    ],
)
def test_changes(config: dict, changes: dict) -> None:
    assert config_repairs(config) == changes
