"""PEFT's configuration: patterns as PEFT matches them, and settings that are not supported. (The
same against PEFT itself: tests/parity/test_convert_adapters.py.)"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_simpo.convert.peft.config import (
    PeftConfig,
    read_peft_config,
    unsupported_settings,
)
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
        ({"lora_alpha": -1e6, "r": 65_536}, "q", (65_536, -1e6 / 65_536)),
        # A pattern is one whole, and matches whole parts up to the path's end.
        ({"rank_pattern": {"q|v": 4}}, "m.q", (4, 4.0)),
        ({"rank_pattern": {"q|v": 4}}, "m.q.x", (8, 2.0)),
        ({"rank_pattern": {"q|v": 4}}, "m.xv", (8, 2.0)),
        ({"rank_pattern": {"k": 2, "q": 4}}, "m.q", (4, 4.0)),
        ({"rank_pattern": None, "alpha_pattern": {}}, "q", (8, 2.0)),
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
        ({"target_modules": r".*\.1\.self_attn\.q"}, set()),
        (
            {"target_modules": [LAYERS[0], LAYERS[4]], "exclude_modules": r".*\.0\.|.*\.1\..*"},
            {"0.q"},
        ),
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
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [1],
                "layers_pattern": ["blocks", "(layers|h)"],
            },
            {"1.q"},
        ),
        (  # The whole path of a module is named, whatever its layer.
            {
                "target_modules": ["model.layers.2.self_attn.k_proj", "q_proj"],
                "layers_to_transform": [1],
            },
            {"1.q", "2.k"},
        ),
        ({"target_modules": ["lm_head"], "layers_to_transform": [1]}, {"lm_head"}),
        ({"target_modules": [], "layers_to_transform": [1]}, set()),
        ({"target_modules": "lm_.*", "exclude_modules": ["lm_head"]}, set()),
        ({"target_modules": ["lm_head"], "exclude_modules": ["head"]}, {"lm_head"}),
        (
            {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["q_proj"]},
            {f"{n}.k" for n in range(12)},
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": r".*\.\d\d\..*"},
            {f"{n}.q" for n in range(10)},
        ),
        ({"target_modules": "all-linear"}, {f"{n}.{p}" for n in range(12) for p in "qkvo"}),
        ({"target_modules": "ALL-Linear"}, {f"{n}.{p}" for n in range(12) for p in "qkvo"}),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
        ({"target_modules": None}, set()),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "layers",
)
def test_the_layers_that_settings_name(content: dict, expected: set[str]) -> None:
    assert targeted(**content) == expected


def test_the_first_number_after_a_name_is_the_layers() -> None:
    path = "model.layers.3.mlp.experts.1.w2"
    for layer, is_named in ((3, True), (1, False)):
        assert config(target_modules=["w2"], layers_to_transform=layer).is_named(path) == is_named
    assert not config(target_modules=["w2"], layers_to_transform=[1]).is_named("mlp.w2")
    whole = config(target_modules=["w2"], layers_to_transform=[3], layers_pattern="layers")
    assert whole.is_named("layers.3.w2")
    assert not whole.is_named("xlayers.3.w2")


def test_all_linear_names_linear_layers_only() -> None:
    modules = config(target_modules="all-linear").targeted(
        ["a", "embed", "head"], {"a", "head"}, ""
    )
    assert modules == {"a", "head"}


@pytest.mark.parametrize(
    ("content", "is_ignored"),
    [
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["k_proj"]}, True),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, True),
        ({"target_modules": "k.*"}, True),
        ({"target_modules": ".*k"}, True),
        ({"target_modules": "m.*"}, False),
        ({"target_modules": None}, False),
        ({"target_modules": None, "exclude_modules": ["q_proj"]}, False),
        ({"target_modules": []}, True),
        ({"target_modules": "all-linear"}, False),
        ({"target_modules": "All-Linear"}, False),
    ],
    ids=str,
)
def test_tensors_that_peft_would_ignore(content: dict, is_ignored: bool) -> None:
    assert config(**content).is_ignored("m.q_proj") == is_ignored


def test_target_parameters_are_whole_ends_of_paths() -> None:
    settings = config(target_parameters=["experts.down_proj"])
    assert settings.is_target_parameter("model.layers.0.mlp.experts.down_proj")
    assert not settings.is_target_parameter("model.layers.0.mlp.xexperts.down_proj")
    assert settings.is_target_parameter("experts.down_proj")
    assert not config().is_target_parameter("a.b")


# What is read, or what changes nothing, in PEFT 0.21.
UNDERSTOOD = [
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "init_lora_weights",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "bias is all"),
        ({"peft_type": ["y" * 99]}, f"peft_type is ['{'y' * 38}, only LORA"),
        ({"bias": "y" * 99}, f"bias is {'y' * 40}, only none"),
        ({"bias": "none"}, None),
        ({"bias": None}, "bias is None"),
        *(
            ({"init_lora_weights": name}, f"init_lora_weights is {name[:40]}, which changes the ba")
            for name in ("pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga", f"pissa{'y' * 99}")
        ),
        ({"init_lora_weights": "gaussian"}, None),
        ({"init_lora_weights": True}, None),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set: single tokens are"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set: layers are repeated"),
        ({"y" * 99: 1}, f"{'y' * 60} is set: it is not known"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set: whole layers"),
        ({"modules_to_save": []}, None),
        ({"lora_bias": True}, "lora_bias is set: biases are trained"),
        ({"use_qalora": True}, "use_qalora is set: it is not known"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"something_new_in_peft": {"x": 1}}, "something_new_in_peft is set: it is not known"),
        ({"something_new_in_peft": None}, None),
        (dict.fromkeys(UNDERSTOOD, "x"), None),
    ],
    ids=str,
)
def test_unsupported_settings(content: dict, message: str | None) -> None:
    reasons = list(unsupported_settings({"peft_type": "LORA", **content}))
    assert len(reasons) == (message is not None)
    assert all(message in reason for reason in reasons if message)


@pytest.mark.parametrize("rank", [0, 8.0, True, 65_537, None, "y" * 99], ids=str)
def test_a_rank_that_is_not_a_valid_number_is_rejected(rank: Any) -> None:
    message = f"^here.json: rank {str(rank)[:40]} of q; it must be 1 to 65536$"
    with pytest.raises(SimPOError, match=message):
        config(r=rank).scale("q")


@pytest.mark.parametrize("alpha", [1_000_001, math.nan, True, None, "y" * 99], ids=str)
def test_an_alpha_that_is_not_a_valid_number_is_rejected(alpha: Any) -> None:
    message = f"^here.json: lora_alpha {str(alpha)[:40]} of q; it must be a finite number .* 1e.06$"
    with pytest.raises(SimPOError, match=message):
        config(lora_alpha=alpha).scale("q")


TOO_MUCH = "is too long or repeats too much to be tried; list the modules by name"


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("q" * 1000, None),
        ("q" * 1001, TOO_MUCH),
        (".*" * 7, None),
        (".*.+.{2}" * 2 + ".*.*", TOO_MUCH),
        ("(a)?b", None),
        *((f"(a){end}", TOO_MUCH) for end in ("+", "*", "{2}")),
        ("[[a]", None),  # of which later versions of Python will warn
        ("(", "is not valid: missing )"),
        ("a{99999999999999999999}", "is not valid: the repetition number"),
        ("(" * 500 + ")" * 500, "is not valid: maximum recursion depth"),
    ],
    ids=range(12),
)
def test_patterns_are_not_trusted(pattern: str, reason: str | None) -> None:
    if reason is None:
        config(target_modules=pattern).is_named("x")
        return
    message = re.escape(f"here.json: the pattern {pattern[:80]!r} {reason}")
    with pytest.raises(SimPOError, match=f"^{message}"):
        config(target_modules=pattern).is_named("x")


def read(folder: Path, content: dict[str, Any], *files: str) -> PeftConfig:
    for name in files:
        (folder / name).write_bytes(b"")
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return read_peft_config(folder)


WEIGHTS = "adapter_model.safetensors"


def test_a_valid_configuration_is_read(tmp_path: Path) -> None:
    content = {
        "peft_type": "LORA",
        "target_modules": ["q_proj"],
        "exclude_modules": "k",
        "layers_to_transform": [0, 1],
        "layers_pattern": None,
        "rank_pattern": {},
        "use_rslora": True,
        "base_model_name_or_path": "x",
    }
    path = str(tmp_path / "adapter_config.json")
    assert read(tmp_path, content, WEIGHTS, "a.bin") == PeftConfig(content, path)


@pytest.mark.parametrize(
    ("content", "files", "message"),
    [
        ({}, [WEIGHTS], "adapter_config.json has no peft_type; is it a PEFT"),
        ({"peft_type": "LORA"}, ["a.json"], f" holds no {WEIGHTS}$"),
        (
            {"peft_type": "LORA"},
            ["adapter_model.BIN"],
            f"holds no {WEIGHTS}, only adapter_model.BIN, a pickle, which can run any code",
        ),
        (
            {"peft_type": "IA3", "bias": "all"},
            [WEIGHTS],
            "peft_type is IA3, only LORA is converted; bias is all, only none is converted. Merge",
        ),
        *(
            (
                {"peft_type": "LORA", name: value},
                [WEIGHTS],
                f"{name} is .{{1,40}}; it must be a {kind}",
            )
            for name, value, kind in (
                ("target_modules", {"y": "y" * 99}, "str or list$"),
                ("target_modules", ["q", 1], "str or list$"),
                ("exclude_modules", 1, "str or list$"),
                ("target_parameters", "q", "list$"),
                ("layers_to_transform", "1", "int or list$"),
                ("layers_to_transform", [True], "int or list$"),
                ("layers_pattern", [["h"]], "str or list$"),
                ("rank_pattern", ["q"], "dict$"),
                ("alpha_pattern", "q", "dict$"),
                ("use_rslora", 1, "bool$"),
                ("use_dora", "yes", "bool$"),
                ("base_model_name_or_path", 3, "str$"),
                ("revision", 3, "str$"),
            )
        ),
    ],
)
def test_configurations_that_are_not_read(
    content: dict, files: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SimPOError, match=message):
        read(tmp_path, content, *files)


@given(st.text(max_size=20))
def test_a_pattern_is_valid_or_an_error(pattern: str) -> None:
    try:
        config(rank_pattern={pattern: 4}).scale("model.layers.0.q_proj")
    except SimPOError as error:
        assert "here.json: the pattern" in str(error)  # noqa: PT017
