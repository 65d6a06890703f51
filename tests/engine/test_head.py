"""The head as a product, a scale and a softcap; the model's own code where it is more than that."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import ARCHITECTURES, architecture, with_lora
from helpers.tiny import tiny_model
from mlx_lm.tuner.lora import LoRALinear

from mlx_simpo.engine.head import (
    MODELS_OWN_CODE,
    Head,
    is_head_frozen,
    model_logits,
    resolve_head,
    weights_outside_layers,
)
from mlx_simpo.engine.token_logps import token_logps

GEMMA2, COHERE = ARCHITECTURES["gemma2"], ARCHITECTURES["cohere"]
RECURRENT_GEMMA = ARCHITECTURES["recurrent_gemma"]


def without_softcap(logits: mx.array) -> mx.array:
    """What a softcap of 5 was applied to, but for the last thousandth."""
    return 5 * mx.arctanh(mx.clip(logits / 5, -0.999, 0.999))


def clipped(logits: mx.array) -> mx.array:
    """What a softcap of 5 was applied to, clipped to 5 instead: the same where it is far above."""
    return mx.clip(without_softcap(logits), -5, 5)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("llama", {}, Head(1.0, 0.0, is_projection=True)),
        ("llama", {"tie_word_embeddings": False}, Head(1.0, 0.0, is_projection=True)),
        ("gemma2", GEMMA2, Head(1.0, 5.0, is_projection=True)),
        ("cohere", COHERE, Head(0.25, 0.0, is_projection=True)),
        ("granite", ARCHITECTURES["granite"], Head(0.25, 0.0, is_projection=True)),
        ("recurrent_gemma", RECURRENT_GEMMA, Head(1.0, 5.0, is_projection=True)),
        ("mamba", ARCHITECTURES["mamba"], Head(1.0, 0.0, is_projection=True)),
        ("qwen3_5", ARCHITECTURES["qwen3_5"], Head(1.0, 0.0, is_projection=True)),
        ("exaone", ARCHITECTURES["exaone"], Head(1.0, 0.0, is_projection=True)),
    ],
)
def test_the_usual_settings_are_read(name: str, settings: dict[str, Any], expected: Head) -> None:
    model = tiny_model(name, **settings)
    head = resolve_head(model)
    assert head == expected
    hidden = 5 * mx.random.normal((2, 4, 32), key=mx.random.key(0))
    logits = model_logits(model, hidden)
    np.testing.assert_allclose(head.logits(model, hidden), logits, rtol=1e-5, atol=1e-5)


def model_with_head(kind: str, dtype: mx.Dtype) -> Any:
    """A model of that dtype, whose head is of that kind."""
    name = {"softcap": "gemma2", "scaled": "cohere"}.get(kind, "llama")
    is_tied = kind in ("tied", "softcap", "scaled", "quantized tied")
    changes = {"tie_word_embeddings": is_tied, "intermediate_size": 64}
    model = tiny_model(name, **ARCHITECTURES[name], **changes)
    if kind == "bias":
        model.lm_head.bias = 10 * mx.random.normal((512,))
    elif kind.startswith("quantized"):
        nn.quantize(model, 32, 8)
    elif kind == "lora":
        model.lm_head = LoRALinear.from_base(model.lm_head, r=4)
        model.lm_head.lora_b = mx.random.normal(model.lm_head.lora_b.shape)
    model.set_dtype(dtype)
    return model


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", ["tied", "untied", "scaled"])
def test_in_half_precision_each_row_is_shifted_by_its_targets_logit_before_it_is_rounded(
    kind: str, dtype: mx.Dtype
) -> None:
    """So that the target's log-probability is several times nearer to that of exact logits."""
    model = model_with_head(kind, dtype)
    head = resolve_head(model)
    weight = model.lm_head.weight if kind == "untied" else model.model.embed_tokens.weight
    targets = mx.array([0, 511, *range(7)], mx.int32)
    noise = 2 * mx.random.normal((9, 32), key=mx.random.key(1))
    hidden = (noise + 10 * weight[targets]).astype(dtype)  # logits of 5 to 22 at the targets
    shifted = head.shifted_raw_logits(model, hidden, targets)
    assert shifted.dtype == dtype
    own = (np.arange(9), np.array(targets))

    def in_float64(array: mx.array) -> np.ndarray:
        return np.array(array.astype(mx.float32), np.float64)

    def logps(raw_logits: np.ndarray) -> np.ndarray:
        logits = head.scale * raw_logits
        return (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))[own]

    exact = in_float64(hidden) @ in_float64(weight).T
    error, error_unshifted = (
        np.std(logps(in_float64(raw_logits)) - logps(exact))
        for raw_logits in (shifted, head.raw_logits(model, hidden))
    )
    assert error < error_unshifted / 8
    rounding = 2.0 ** (-8 if dtype == mx.bfloat16 else -11)
    assert (np.abs(in_float64(shifted)[own]) <= rounding * np.abs(exact[own])).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    "kind", ["bias", "quantized", "quantized tied", "lora", "softcap", "own code", "untied"]
)
def test_nothing_is_shifted_where_the_head_does_more_or_nothing_is_lost(
    kind: str, dtype: mx.Dtype
) -> None:
    model = model_with_head(kind, dtype)
    head = MODELS_OWN_CODE if kind == "own code" else resolve_head(model)
    assert head.is_projection == (kind != "own code")
    hidden = mx.random.normal((7, 32), key=mx.random.key(0)).astype(dtype)
    targets = mx.arange(7, dtype=mx.int32)
    shifted = head.shifted_raw_logits(model, hidden, targets)
    raw_logits = head.raw_logits(model, hidden)
    if kind == "untied" and dtype == mx.bfloat16:
        assert not mx.array_equal(shifted, raw_logits)
    else:
        assert mx.array_equal(shifted, raw_logits)


def subclass_with_changed_logits(model_class: type, change: Callable) -> type:
    """A kind of model whose logits are changed after all that its settings describe."""

    class Changed(model_class):
        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            return change(model_class.__call__(self, *args, **kwargs))

    return Changed


@pytest.mark.parametrize(
    ("name", "settings", "change", "size", "dtype"),
    [
        ("llama", {}, lambda logits: 1.01 * logits, 0.05, mx.float32),
        # A softcap does next to nothing to small logits.
        ("llama", {}, lambda logits: 30 * mx.tanh(logits / 30), 0.05, mx.float32),
        ("gemma2", GEMMA2, without_softcap, 0.05, mx.float32),
        ("gemma2", GEMMA2, without_softcap, 0.05, mx.bfloat16),
        ("gemma2", GEMMA2, clipped, 100, mx.float32),
    ],
)
def test_what_no_setting_describes_is_noticed(
    name: str, settings: dict[str, Any], change: Callable, size: float, dtype: mx.Dtype
) -> None:
    model = tiny_model(name, **settings)
    model.model.embed_tokens.weight *= size
    model.set_dtype(dtype)
    model.__class__ = subclass_with_changed_logits(type(model), change)
    head = resolve_head(model)
    assert head == MODELS_OWN_CODE
    if dtype == mx.float32:
        hidden = mx.random.normal((7, 32), key=mx.random.key(0))
        targets = mx.arange(7, dtype=mx.int32)
        logps = nn.log_softmax(model_logits(model, hidden), axis=-1)
        expected = mx.take_along_axis(logps, targets[:, None], axis=-1)[:, 0]
        actual = token_logps(model, head, hidden, targets, training=False)
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["nanochat", "falcon_h1"])
def test_a_head_of_other_settings_is_the_models_own_code(name: str) -> None:
    """nanochat's softcap is in no setting, Falcon-H1's multipliers have names of their own."""
    model = architecture(name)
    assert resolve_head(model) == MODELS_OWN_CODE
    hidden = mx.random.normal((7, 32), key=mx.random.key(0))
    expected = model_logits(model, hidden)
    np.testing.assert_array_equal(MODELS_OWN_CODE.logits(model, hidden), expected)


def test_two_models_of_a_kind_are_told_apart() -> None:
    """What was learned of one model is not believed of another of the same class and settings."""
    plain, doubled = tiny_model(), tiny_model()

    model_class: Any = type(plain)

    class Scaled(model_class):
        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            return self.factor * model_class.__call__(self, *args, **kwargs)

    for model, factor in ((plain, 1.0), (doubled, 2.0)):
        model.__class__ = Scaled
        model.factor = factor
    assert resolve_head(plain).is_projection
    assert resolve_head(doubled) == MODELS_OWN_CODE


def test_a_trunk_without_an_embedding_runs_the_models_own_code() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    del model.model["embed_tokens"]
    assert resolve_head(model) == MODELS_OWN_CODE


@pytest.mark.parametrize("tied", [True, False])
def test_weights_outside_layers_are_those_of_head_embedding_and_norm(tied: bool) -> None:
    model = with_lora(tiny_model("llama", tie_word_embeddings=tied))
    assert weights_outside_layers(model) == {}
    assert is_head_frozen(model)
    model.unfreeze()
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    assert weights_outside_layers(model).keys() == names | (set() if tied else {"lm_head.weight"})
    assert not is_head_frozen(model)
