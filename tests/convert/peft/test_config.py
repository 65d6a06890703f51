"""PEFT's configuration: patterns as PEFT matches them, and settings that are not supported. (The
same against PEFT itself: tests/parity/test_convert_adapters.py.)"""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_simpo.convert.peft.config import PeftConfig, unsupported_settings
from mlx_simpo.errors import SimPOError

LAYERS = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(12) for p in "qkvo"]


def config(**content: Any) -> PeftConfig:
    return PeftConfig({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **content}, "here.json")


def targeted(**content: Any) -> set[str]:
    """The layers that these settings name, as "3.q" for the q_proj of layer 3."""
    modules = config(**content).targeted([*LAYERS, "lm_head"], {*LAYERS, "lm_head"}, "lm_head")
    return {
        p.replace("model.layers.", "").replace("self_attn.", "").replace("_proj", "")
        for p in modules
    }


@pytest.mark.parametrize(
    ("content", "path", "expected"),
    [
        ({}, "a.q_proj", (8, 2.0)),
        ({"use_rslora": True}, "a.q_proj", (8, 16 / math.sqrt(8))),
        ({"rank_pattern": {"q_proj": 4}}, "a.q_proj", (4, 4.0)),
        ({"rank_pattern": {"q_proj": 4}}, "a.xq_proj", (8, 2.0)),
        ({"rank_pattern": {"layers.1.*q": 2}}, "m.layers.1.q", (2, 8.0)),
        ({"rank_pattern": {r"m\\.layers\\.1\\..*": 2}}, "m.layers.11.q", (8, 2.0)),
        # The first match counts, not the longest.
        ({"alpha_pattern": {"q": 4, "a.q": 2}}, "a.q", (8, 0.5)),
        (
            {"rank_pattern": {"q": 2}, "alpha_pattern": {"q": 2}, "use_rslora": True},
            "q",
            (2, 2**0.5),
        ),
        ({"lora_alpha": 1.5}, "q", (8, 0.1875)),
    ],
)
def test_rank_and_scale_of_a_layer(content: dict, path: str, expected: tuple[int, float]) -> None:
    assert config(**content).scale(path) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {f"{n}.q" for n in range(12)}),
        ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, {"1.q"}),
        ({"target_modules": ["proj"]}, set()),
        ({"target_modules": r".*\.1\.self_attn\.[qv]_proj"}, {"1.q", "1.v"}),
        ({"target_modules": r"\.1\.self_attn\.q_proj"}, set()),  # the whole path must match
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 11]}, {"0.q", "11.q"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 3}, {"3.q"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, {f"{n}.q" for n in range(12)}),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
            {"1.q"},
        ),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [1],
                "layers_pattern": ["blocks"],
            },
            set(),
        ),
        (
            {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["q_proj"]},
            {f"{n}.k" for n in range(12)},
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": r".*\.\d\d\..*"},
            {f"{n}.q" for n in range(10)},
        ),
        ({"target_modules": "all-linear"}, {f"{n}.{p}" for n in range(12) for p in "qkvo"}),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
        ({"target_modules": None}, set()),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "layers",
)
def test_the_layers_that_settings_name(content: dict, expected: set[str]) -> None:
    assert targeted(**content) == expected


def test_target_parameters_are_whole_ends_of_paths() -> None:
    settings = config(target_parameters=["experts.down_proj"])
    assert settings.is_target_parameter("model.layers.0.mlp.experts.down_proj")
    assert not settings.is_target_parameter("model.layers.0.mlp.xexperts.down_proj")
    assert not config().is_target_parameter("a.b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "bias is all"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"init_lora_weights": "gaussian"}, None),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set: whole layers"),
        ({"modules_to_save": []}, None),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora is set: it is not known"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"something_new_in_peft": {"x": 1}}, "something_new_in_peft"),
        ({"something_new_in_peft": None}, None),
        ({"peft_version": "9", "task_type": "CAUSAL_LM", "revision": "x"}, None),
    ],
    ids=str,
)
def test_unsupported_settings(content: dict, message: str | None) -> None:
    reasons = list(unsupported_settings({"peft_type": "LORA", **content}))
    assert len(reasons) == (message is not None)
    assert all(message in reason for reason in reasons if message)


@pytest.mark.parametrize("content", [{"r": 0}, {"r": 8.0}, {"r": True}, {"r": 2**40}, {"r": None}])
def test_a_rank_that_is_not_a_valid_number_is_rejected(content: dict) -> None:
    with pytest.raises(SimPOError, match=r"here\.json: rank .* must be 1 to"):
        config(**content).scale("q")


@given(st.text(max_size=20))
def test_a_pattern_is_valid_or_an_error(pattern: str) -> None:
    try:
        config(rank_pattern={pattern: 4}).scale("model.layers.0.q_proj")
    except SimPOError as error:
        assert "here.json: the pattern" in str(error)  # noqa: PT017
