"""Where models keep their trunk and their embedding."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.architectures import ARCHITECTURES, architecture
from helpers.tiny import tiny_model

from mlx_simpo.engine.head import model_logits
from mlx_simpo.engine.prefix_cache import empty_caches
from mlx_simpo.engine.trunk import embedding_of, run_trunk, text_model, trunk_of, trunk_path

PATHS = {
    "llama": ("model",),
    "mamba": ("backbone",),
    "exaone": ("transformer",),
    "gemma3": ("language_model", "model"),
    "qwen3_5": ("language_model", "model"),
    "nemotron_h": ("backbone",),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_path_leads_to_the_trunk(name: str) -> None:
    model: Any = architecture(name)
    path = PATHS[name]
    assert trunk_path(model) == path
    assert text_model(model) is (model.language_model if len(path) == 2 else model)
    assert trunk_of(model) is getattr(text_model(model), path[-1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trunk_and_head_make_the_models_logits(name: str) -> None:
    """With empty caches, as a prefix begins; and the embedding is that of the tokens."""
    model = architecture(name)
    tokens = mx.array([[5, 9, 2, 7, 300, 8]])
    hidden = run_trunk(model, tokens, empty_caches(model))
    assert hidden.shape == (1, 6, 32)
    np.testing.assert_allclose(model_logits(model, hidden), model(tokens), 1e-5, 1e-4)
    some = model_logits(model, hidden[0, 2:4])
    np.testing.assert_allclose(some, model_logits(model, hidden)[0, 2:4], 1e-5, 1e-4)
    assert embedding_of(model).weight.shape == (512, 32)


def test_a_model_without_a_trunk_has_no_path() -> None:
    model = tiny_model()
    del model["model"]
    assert trunk_path(model) is None
    wrapper: Any = architecture("gemma3")
    del wrapper.language_model["model"]
    assert trunk_path(wrapper) is None


def test_a_trunk_without_an_embedding_of_a_known_name_has_none() -> None:
    model = tiny_model()
    del model.model["embed_tokens"]
    assert embedding_of(model) is None
