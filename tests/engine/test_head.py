"""The head as a product, a scale and a softcap; the model's own code where it is more than that."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import tiny_model

from mlx_simpo.engine import head as module
from mlx_simpo.engine.head import head_logits, resolve_head
from mlx_simpo.engine.token_logps import token_logps

GEMMA2 = {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}
COHERE = {"logit_scale": 0.25, "layer_norm_eps": 1e-5}


def not_capped(logits: mx.array) -> mx.array:
    """What a softcap of 5 was put on, but for the last thousandth."""
    return 5 * mx.arctanh(mx.clip(logits / 5, -0.999, 0.999))


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_as_said", {})


@pytest.mark.parametrize(
    ("name", "settings", "scale", "softcap"),
    [("llama", {}, 1.0, 0.0), ("gemma2", GEMMA2, 1.0, 5.0), ("cohere", COHERE, 0.25, 0.0)],
)
def test_the_usual_settings_are_read(
    name: str, settings: dict[str, Any], scale: float, softcap: float
) -> None:
    model = tiny_model(name, **settings)
    head = resolve_head(model)
    assert (head.scale, head.softcap) == (scale, softcap)
    rows = 5 * mx.random.normal((7, 32), key=mx.random.key(0))
    np.testing.assert_allclose(head.logits(rows), head_logits(model, rows), rtol=1e-5, atol=1e-5)


def another(kind: type, change: Any) -> type:
    """A kind of model whose logits are changed after all that its settings say."""

    class Another(kind):
        def __call__(self, *given: Any, **more: Any) -> mx.array:
            return change(kind.__call__(self, *given, **more))

    return Another


@pytest.mark.parametrize(
    ("name", "settings", "change", "dtype"),
    [
        ("llama", {}, lambda logits: 1.01 * logits, mx.float32),
        ("llama", {}, lambda logits: 30 * mx.tanh(logits / 30), mx.float32),
        ("gemma2", GEMMA2, not_capped, mx.float32),
        ("gemma2", GEMMA2, not_capped, mx.bfloat16),
    ],
)
def test_what_no_setting_says_is_noticed(
    name: str, settings: dict[str, Any], change: Any, dtype: mx.Dtype
) -> None:
    model = tiny_model(name, **settings)
    model.model.embed_tokens.weight *= 0.05  # a softcap does next to nothing to small logits
    model.set_dtype(dtype)
    model.__class__ = another(type(model), change)
    head = resolve_head(model)
    assert (head.scale, head.softcap, head.weight) == (1.0, 0.0, None)
    if dtype == mx.float32:
        rows = mx.random.normal((7, 32), key=mx.random.key(0))
        targets = mx.arange(7, dtype=mx.int32)
        plain = nn.log_softmax(head_logits(model, rows), axis=-1)
        expected = mx.take_along_axis(plain, targets[:, None], axis=-1)[:, 0]
        found = token_logps(model, rows, targets, training=False)
        np.testing.assert_allclose(found, expected, atol=1e-5)
