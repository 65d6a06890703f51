"""Model folders that are broken or malicious: one error that says what is wrong."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hostile import (
    ADAPTER_CONFIG,
    HUGE_INTEGER,
    MODEL_CONFIG,
    SOURCE,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Corrupt,
    Reject,
    assert_mentions,
    convert,
    model_conversions,
    run_program,
    set_json,
    time_limit,
)

from mlx_simpo.convert.verify.compare import check, compare
from mlx_simpo.errors import SimPOError

# Every error of loading names the folder; much of the rest is mlx-lm's, transformers' or Python's.
LOAD, RUN = ("source", "loaded"), ("run",)
# Entries of config.json → parts of the message.
MODEL_SETTINGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    # Our own check, before mlx-lm imports a module of this name.
    *(
        ({"model_type": kind}, (*LOAD, "model_type", repr(str(kind)), "config.json"))
        for kind in ("../../os", "os.path", "", 17, None, "llama\n", ["llama"])
    ),
    # Names of modules that mlx-lm has and that are not models, or that it does not have.
    *(
        ({"model_type": kind}, (*LOAD, f"'mlx_lm.models.{kind}'", "'Model'"))
        for kind in ("base", "__init__", "cache")
    ),
    ({"model_type": "x" * 5000}, (*LOAD, "Model type xxxx")),
    ({"model_type": "evil"}, (*LOAD, "Model type evil not supported")),
    *(
        ({"model_file": file}, (*LOAD, "custom module", str(file), "trust_remote_code"))
        for file in ("../../evil.py", "/tmp/evil.py", 5, "evil.py")
    ),
    ({"architectures": 5}, (*LOAD, "'int'")),
    *(({"hidden_size": size}, (*LOAD, "normal()")) for size in (10**30, 1e300)),
    ({"hidden_size": 2**31 - 1}, (*LOAD, "(512, 2147483647)", "embed_tokens")),
    ({"hidden_size": -1}, (*LOAD, "ValueError", "domain")),
    ({"hidden_size": 0}, (*LOAD, "ZeroDivisionError")),
    ({"hidden_size": "32"}, (*LOAD, "TypeError", "'str'")),
    ({"hidden_size": None}, (*LOAD, "TypeError", "'NoneType'")),
    ({"hidden_size": 48}, (*LOAD, "(512, 48)", "(512, 32)", "embed_tokens")),
    *(({"num_hidden_layers": n}, (*LOAD, "ValueError", "full_attention")) for n in (0, -1)),
    ({"num_hidden_layers": 3}, (*LOAD, "Missing 9 parameters", "model.layers.2")),
    ({"num_hidden_layers": 10**9}, (*LOAD, "num_hidden_layers", str(10**9), "tensors")),
    ({"num_hidden_layers": 1e9}, (*LOAD, "TypeError", "'float'")),
    ({"num_hidden_layers": "2"}, (*LOAD, "TypeError", "'str'")),
    ({"num_attention_heads": 0}, (*LOAD, "ZeroDivisionError")),
    ({"num_attention_heads": -1}, (*LOAD, "Negative")),
    ({"num_attention_heads": 2**40}, (*LOAD, "OverflowError", str(2**40 * 8))),
    ({"num_key_value_heads": 0}, (*LOAD, "(0, 32)", "(16, 32)", "k_proj")),
    ({"vocab_size": 2**40}, (*LOAD, "OverflowError", str(2**40))),
    ({"vocab_size": "512"}, (*LOAD, "TypeError", "'str'")),
    ({"vocab_size": 100}, (*LOAD, "(100, 32)", "(512, 32)", "embed_tokens")),
    *(({"vocab_size": size}, (*LOAD, "AssertionError")) for size in (0, -5)),
    ({"rms_norm_eps": "x"}, (*LOAD, "TypeError", "'str'")),
    *(
        ({"rope_parameters": value}, (*LOAD, f"'{type(value).__name__}'", "'values'"))
        for value in ("x", 5, [1])
    ),
    ({"rope_scaling": "x"}, (*LOAD, "'str'", "'get'")),
    ({"rope_scaling": {"type": "../x"}}, (*LOAD, "RoPE type ../x")),
    ({"rope_scaling": {"type": "linear"}}, (*LOAD, "KeyError", "factor")),
    *(({"quantization": value}, (*LOAD, "'group_size'")) for value in ({}, {"bits": 4})),
    ({"quantization": []}, (*LOAD, "TypeError", "list")),
    ({"quantization": "x"}, (*LOAD, "TypeError", "string")),
    ({"quantization_config": [1]}, (*LOAD, "TypeError", "list")),
    ({"quantization_config": "x"}, (*LOAD, "TypeError", "string")),
    ({"quantization_config": {"quant_method": "bitnet"}}, (*LOAD, "Missing 14", "weight_scale")),
    ({"quantization_config": {"quant_method": "awq"}}, LOAD),
    ({"layer_types": 5}, (*LOAD, "'int'", "iterable")),
    ({"torch_dtype": []}, (*LOAD, "IndexError")),
    *(({"rope_theta": value}, (*RUN, "rope()")) for value in ("x", HUGE_INTEGER)),
    ({"rope_theta": None}, (*RUN, "[rope]", "base")),
    ({"rope_theta": float("nan")}, ("nothing was written", "logits", "inf")),
]


@pytest.mark.parametrize(
    ("values", "parts"), MODEL_SETTINGS, ids=[str(values)[:40] for values, _ in MODEL_SETTINGS]
)
def test_model_settings(values: dict[str, Any], parts: tuple[str, ...], reject: Reject) -> None:
    message = reject("from-hf", set_json(MODEL_CONFIG, **values), verify=True)
    assert_mentions(message, *parts)
    assert len(message) < 600


def test_fuse_checks_the_same_model_settings(reject: Reject) -> None:
    """fuse loads a model as from-hf does; what can only be seen when it is run, it compares."""
    for values, parts in (
        ({"model_type": "os.path"}, (*LOAD, "model_type", "os.path")),
        ({"num_hidden_layers": 10**9}, (*LOAD, "num_hidden_layers", str(10**9))),
        ({"hidden_size": 48}, (*LOAD, "(512, 48)", "embed_tokens")),
        ({"rope_theta": "x"}, (*RUN, "rope()")),
        ({"rope_theta": float("nan")}, ("nothing was written", "rope_theta")),
    ):
        message = reject("fuse-model", set_json(MODEL_CONFIG, **values), verify=True)
        assert_mentions(message, *parts)


def test_a_lone_surrogate_in_config_json_is_kept(valid_inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(valid_inputs / "model", tmp_path / "source")
    set_json(MODEL_CONFIG, _name_or_path="\ud800")(tmp_path / "source")
    convert("fuse-model", tmp_path / "source", tmp_path / "out", None)
    config = json.loads((tmp_path / "out" / MODEL_CONFIG).read_text("utf-8"))
    assert config["_name_or_path"] == "\ud800"


JSON_FILES = (MODEL_CONFIG, "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json")
# Content of a JSON file → what is wrong with it.
NOT_JSON_OBJECTS: dict[bytes, tuple[str, ...]] = {
    b"": ("Expecting value", "line 1 column 1"),
    b"{": ("Expecting property name", "line 1 column 2"),
    b"\xff\xfe": ("utf-8", "0xff"),
    b"[" * 10**6: ("recursion",),
    b"[]": ("must hold a JSON object, not []",),
    b"null": ("must hold a JSON object, not None",),
    b"5": ("must hold a JSON object, not 5",),
}


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize("raw", NOT_JSON_OBJECTS, ids=lambda raw: repr(raw[:9]))
def test_model_files_that_are_not_json_objects(file: str, raw: bytes, reject: Reject) -> None:
    message = reject("from-hf", lambda folder: (folder / file).write_bytes(raw))
    assert_mentions(message, *LOAD, f"source/{file}", *NOT_JSON_OBJECTS[raw])


def test_missing_configuration(reject: Reject) -> None:
    message = reject("from-hf", lambda folder: (folder / MODEL_CONFIG).unlink())
    assert_mentions(message, "source", "config.json", "folder of a model")


def remove_tokenizer(folder: Path) -> None:
    """Remove all files of a model's tokenizer."""
    for path in folder.glob("tokenizer*"):
        path.unlink()


def test_missing_tokenizer(reject: Reject) -> None:
    assert_mentions(reject("from-hf", remove_tokenizer), *LOAD, "tokenizer")


def test_fuse_reads_the_same_model_files(reject: Reject) -> None:
    for file in JSON_FILES:
        message = reject("fuse-model", lambda folder, f=file: (folder / f).write_bytes(b"{"))
        assert_mentions(message, *LOAD, f"source/{file}: Expecting property name")
    message = reject("fuse-model", lambda folder: (folder / MODEL_CONFIG).unlink())
    assert_mentions(message, "source", "config.json", "folder of a model")
    assert_mentions(reject("fuse-model", remove_tokenizer), *LOAD, "tokenizer")


def set_tokenizer_model(**values: Any) -> Corrupt:
    """Return a function that sets entries of the model in tokenizer.json; vocab={…} adds to it."""

    def corrupt(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text("utf-8"))
        vocab = content["model"]["vocab"] | values.get("vocab", {})
        content["model"] |= {**values, "vocab": vocab}
        path.write_text(json.dumps(content))

    return corrupt


@model_conversions
def test_a_tokenizer_that_fails_on_text(conversion: str, reject: Reject) -> None:
    message = reject(conversion, set_json(TOKENIZER_CONFIG, model_max_length={"a": 1}), verify=True)
    assert_mentions(message, *RUN, "TypeError", "'dict'")


TOKENIZERS: dict[str, tuple[Corrupt, tuple[str, ...]]] = {
    "class 5": (set_json(TOKENIZER_CONFIG, tokenizer_class=5), ("AttributeError", "'int'")),
    "class of a model": (
        set_json(TOKENIZER_CONFIG, tokenizer_class="PreTrainedModel"),
        ("PreTrainedModel",),
    ),
    "auto_map": (set_json(TOKENIZER_CONFIG, auto_map="x"), ("AttributeError", "'str'")),
    "eos_token 5": (set_json(TOKENIZER_CONFIG, eos_token=5), ("eos_token", "'int'")),
    "eos_token surrogate": (set_json(TOKENIZER_CONFIG, eos_token="\ud800"), ("surrogates",)),
    "added tokens": (
        set_json(TOKENIZER_CONFIG, added_tokens_decoder={"x": 5}),
        ("added_tokens_decoder", "'int'"),
    ),
    "merges": (set_tokenizer_model(merges=5), ("Merge", "line 1 column")),
    "negative token": (set_tokenizer_model(vocab={"e": -4}), ("`-4`", "line 1 column")),
    "tool parser": (
        set_json(TOKENIZER_CONFIG, tool_parser_type="../os"),
        ("ModuleNotFoundError", "'mlx_lm.tool_parsers."),
    ),
    "chat template": (
        set_json(TOKENIZER_CONFIG, chat_template_type="x"),
        ("ModuleNotFoundError", "'mlx_lm.chat_templates.x'"),
    ),
}


@pytest.mark.parametrize("defect", TOKENIZERS)
def test_tokenizers(defect: str, reject: Reject) -> None:
    corrupt, parts = TOKENIZERS[defect]
    assert_mentions(reject("from-hf", corrupt), *LOAD, *parts)


@pytest.mark.parametrize(
    ("conversion", "token"), [("from-hf", 512), ("from-hf", 2**31 - 1), ("fuse-model", 512)]
)
def test_tokens_beyond_the_vocabulary(
    conversion: str, token: int, valid_inputs: Path, tmp_path: Path
) -> None:
    """Verified, as by default: MLX reads past the end of the embedding for such a token."""
    shutil.copytree(valid_inputs / "model", tmp_path / "source")
    set_tokenizer_model(vocab={"e": token})(tmp_path / "source")
    arguments = {
        "from-hf": ("convert", "from-hf", "source", "out"),
        "fuse-model": ("fuse", "out", "--model", "source"),
    }
    ran = run_program(tmp_path, *arguments[conversion])
    assert ran.returncode == 2, ran.stderr[-500:]
    assert_mentions(ran.stderr, f"token {token}", "vocabulary", "512")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (0.0, float("inf")),
        (float("inf"), float("inf")),
        (float("nan"), 0.0),
        (0.0, float("nan")),
        (float("inf"), 0.0),
    ],
)
def test_infinite_and_nan_logits_are_never_equal(actual: float, expected: float) -> None:
    one, other = (np.array([[[1.0, value]]], np.float32) for value in (actual, expected))
    with pytest.raises(SimPOError, match=r"nothing was written.*the two"):
        check([compare("the two", one, other)])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit memory")
def test_a_billion_layers_are_rejected_before_memory_is_taken(
    valid_inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(valid_inputs / "model", tmp_path / "source")
    set_json(MODEL_CONFIG, num_hidden_layers=10**9)(tmp_path / "source")
    ran = run_program(tmp_path, "convert", "from-hf", "source", "out")
    assert ran.returncode == 2, ran.stderr[-500:]
    assert_mentions(ran.stderr, "num_hidden_layers", str(10**9), "tensors")
    assert not (tmp_path / "out").exists()


def replace_by_pipe(folder: Path, file: str) -> None:
    """Put a pipe that nobody writes to in a file's place: reading it would wait for ever."""
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)


@pytest.mark.parametrize(
    ("conversion", "file"),
    [
        ("from-peft", WEIGHTS["peft"]),
        ("from-peft", ADAPTER_CONFIG),
        ("to-peft", WEIGHTS["mlx"]),
        ("to-peft", ADAPTER_CONFIG),
        ("from-hf", MODEL_CONFIG),
        ("from-hf", WEIGHTS["model"]),
    ],
)
def test_pipes(conversion: str, file: str, valid_inputs: Path, tmp_path: Path) -> None:
    source = shutil.copytree(valid_inputs / SOURCE[conversion], tmp_path / "source")
    replace_by_pipe(source, file)
    with time_limit(2), pytest.raises(SimPOError) as caught:
        convert(conversion, source, tmp_path / "out", str(valid_inputs / "model"))
    assert_mentions(str(caught.value), str(source), file)
    assert not (tmp_path / "out").exists()


def test_a_pipe_beside_the_model_is_not_copied(valid_inputs: Path, tmp_path: Path) -> None:
    source = shutil.copytree(valid_inputs / "model", tmp_path / "source")
    replace_by_pipe(source, "LICENSE")
    with time_limit(2):
        convert("from-hf", source, tmp_path / "out", None)
    assert (tmp_path / "out" / WEIGHTS["model"]).is_file()
    assert not (tmp_path / "out" / "LICENSE").exists()
