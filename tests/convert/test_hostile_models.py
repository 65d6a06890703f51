"""Model folders that are broken or mean harm."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hostile import (
    ADAPTER,
    CONFIG,
    FILE,
    LONG,
    SETTINGS,
    SOURCE,
    Spoil,
    changed,
    conversions,
    convert,
    file_of,
    first,
    limited,
    models,
    parts,
    program,
)

from mlx_simpo.convert.verify.compare import check, compare
from mlx_simpo.errors import SimPOError


@models
@pytest.mark.parametrize(
    "values",
    [
        *(
            {"model_type": kind}
            for kind in ("../../os", "os.path", "", 17, None, "base", "__init__")
        ),
        *({"model_type": kind} for kind in ("x" * 5000, "llama\n", "cache", ["llama"], "evil")),
        *({"model_file": file} for file in ("../../evil.py", "/tmp/evil.py", 5, "evil.py")),
        {"architectures": 5},
        *({"hidden_size": size} for size in (10**30, 2**31 - 1, -1, 0, "32", 1e300, None, 48)),
        *({"num_hidden_layers": count} for count in (0, -1, 3, 1e9, "2")),
        *({"num_attention_heads": count} for count in (0, -1, 2**40)),
        *({"vocab_size": size} for size in (2**40, "512", 100)),
        {"num_key_value_heads": 0},
        {"rms_norm_eps": "x"},
        *({"rope_parameters": wrong} for wrong in ("x", 5, [1])),
        *({"rope_scaling": wrong} for wrong in ("x", {"type": "../x"}, {"type": "linear"})),
        *({"quantization": wrong} for wrong in ({}, [], "x", {"bits": 4})),
        *({"quantization_config": wrong} for wrong in ([1], "x", {"quant_method": "bitnet"})),
        {"quantization_config": {"quant_method": "awq"}},
        {"layer_types": 5},
        {"torch_dtype": []},
        *({"vocab_size": size} for size in (0, -5)),
        {"rope_theta": "x"},
        {"rope_theta": LONG},
        {"rope_theta": None},
        {"rope_theta": float("nan")},
    ],
    ids=lambda values: str(values)[:40],
)
def test_model_settings(name: str, values: dict, refused: Callable[..., str]) -> None:
    refused(name, changed(CONFIG, **values), verify=True)


def test_half_an_emoji_in_a_config(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "model", tmp_path / "in")
    changed(CONFIG, _name_or_path="\ud800")(tmp_path / "in")
    convert("alone", tmp_path / "in", tmp_path / "out", None)


JSON_FILES = (CONFIG, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@models
@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"5", b"\xff\xfe", b"{", b"[" * 10**6])
def test_model_files_that_are_no_json(
    name: str, file: str, raw: bytes, refused: Callable[..., str]
) -> None:
    refused(name, lambda folder: (folder / file).write_bytes(raw))


@models
@pytest.mark.parametrize("file", [CONFIG, "tokenizer*"])
def test_model_files_that_are_missing(name: str, file: str, refused: Callable[..., str]) -> None:
    refused(name, lambda folder: [path.unlink() for path in folder.glob(file)])


def tokenizer_model(**values: Any) -> Spoil:
    """Set entries of the model in tokenizer.json; vocab={…} adds to it."""

    def spoil(folder: Path) -> None:
        path = folder / "tokenizer.json"
        there = json.loads(path.read_text("utf-8"))
        vocab = there["model"]["vocab"] | values.get("vocab", {})
        there["model"] |= {**values, "vocab": vocab}
        path.write_text(json.dumps(there))

    return spoil


@models
def test_a_tokenizer_that_fails_on_text(name: str, refused: Callable[..., str]) -> None:
    refused(name, changed(SETTINGS, model_max_length={"a": 1}), verify=True)


@models
@pytest.mark.parametrize(
    "spoil",
    [
        changed(SETTINGS, tokenizer_class=5),
        changed(SETTINGS, auto_map="x"),
        changed(SETTINGS, eos_token=5),
        changed(SETTINGS, eos_token="\ud800"),
        changed(SETTINGS, added_tokens_decoder={"x": 5}),
        tokenizer_model(merges=5),
        tokenizer_model(vocab={"e": -4}),
        changed(SETTINGS, tool_parser_type="../os"),
        changed(SETTINGS, chat_template_type="x"),
        changed(SETTINGS, tokenizer_class="PreTrainedModel"),
    ],
)
def test_tokenizers(name: str, spoil: Spoil, refused: Callable[..., str]) -> None:
    refused(name, spoil)


@models
@pytest.mark.parametrize("number", [512, 2**31 - 1])
def test_tokens_that_the_model_has_not(name: str, number: int, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "model", tmp_path / "in")
    tokenizer_model(vocab={"e": number})(tmp_path / "in")
    action = ("convert", "from-hf", "in", "out")
    ran = program(tmp_path, *(action if name == "from-hf" else ("fuse", "out", "--model", "in")))
    assert ran.returncode == 2, ran.stderr[-500:]
    assert "vocabulary" in ran.stderr


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (0.0, float("inf")),
        (float("inf"), float("inf")),
        (float("nan"), 0.0),
        (0.0, float("nan")),
        (float("inf"), 0.0),
    ],
)
def test_logits_that_are_no_numbers_are_not_equal(found: float, expected: float) -> None:
    sides = [np.array([[[1.0, value]]], dtype=np.float32) for value in (found, expected)]
    with pytest.raises(SimPOError, match="verification failed"):
        check([compare("the two", *sides)])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit memory")
def test_a_billion_blocks(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "model", tmp_path / "in")
    changed(CONFIG, num_hidden_layers=10**9)(tmp_path / "in")
    ran = program(tmp_path, "convert", "from-hf", "in", "out")
    assert ran.returncode == 2, ran.stderr[-500:]


@conversions
def test_a_shape_of_a_million_sizes(name: str, refused: Callable[..., str]) -> None:
    def spoil(folder: Path) -> None:
        path = folder / FILE[SOURCE[name]]
        header, data = parts(path.read_bytes())
        path.write_bytes(file_of(first(header, shape=[9] * 1_000_000), data))

    refused(name, spoil, seconds=1)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("from-peft", FILE["peft"]),
        ("from-hf", CONFIG),
        ("from-hf", "LICENSE"),
        *(
            case
            for case in (
                ("from-hf", FILE["model"]),
                ("to-peft", FILE["mlx"]),
                ("to-peft", ADAPTER),
                ("from-peft", ADAPTER),
            )
        ),
    ],
)
def test_pipes(name: str, file: str, good: Path, tmp_path: Path) -> None:
    given = shutil.copytree(good / SOURCE[name], tmp_path / "in")
    (given / file).unlink(missing_ok=True)
    os.mkfifo(given / file)
    with limited(2):
        if file == "LICENSE":
            convert(name, given, tmp_path / "out", None)
            assert not (tmp_path / "out" / file).exists()
            return
        with pytest.raises(SimPOError):
            convert(name, given, tmp_path / "out", str(good / "model"))
