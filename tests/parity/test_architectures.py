"""Checkpoints as transformers 5 saves them, loaded by us: logits of tiny random models of many
architectures against those of transformers. mlx-lm alone misreads the rotary base of most of them.

Not compared, because mlx-lm 0.32.2 itself differs: the sliding windows of Mistral and Gemma 2 (it
attends to everything; here the window is longer than the sequence), and Starcoder 2, for its GELU.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.tiny import tiny_tokenizer
from parity.zoo import COMMON as ZOO_COMMON
from transformers import AutoConfig, AutoModelForCausalLM

from mlx_simpo.model.loading import load_model

# Whether the output layer is tied is left to the default of each type.
COMMON = {name: value for name, value in ZOO_COMMON.items() if name != "tie_word_embeddings"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 3333.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 3333.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 222.0},
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 16, "rope_parameters": GEMMA3, "num_hidden_layers": 7},
    ),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model_type, changes = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(COMMON | changes))
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path)
    tiny_tokenizer()._tokenizer.save_pretrained(tmp_path)

    tokens = np.random.default_rng(1).integers(3, 512, (2, 48))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = np.array(load_model(str(tmp_path)).model(mx.array(tokens)).astype(mx.float32))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(ours, expected, atol=2e-4 * max(1.0, np.abs(expected).max()))
