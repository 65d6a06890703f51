"""Code and pickles that come with a model or adapter: never run unless the user asks for it."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import command, complaint
from helpers.hostile import (
    ADAPTER_CONFIG,
    MODEL_CONFIG,
    SOURCE,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Corrupt,
    Reject,
    assert_mentions,
    convert,
    every_conversion,
    folder_content,
    model_conversions,
    run_program,
    set_json,
    set_lora_parameters,
)


class Trap:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    ("conversion", "file"),
    [
        ("from-peft", "adapter_model.bin"),
        ("from-peft", "adapter_model.pt"),
        ("from-hf", "pytorch_model.bin"),
        ("fuse-model", "pytorch_model.bin"),
        ("fuse-model", "model.pth"),
    ],
)
def test_pickled_weights_are_never_loaded(
    conversion: str, file: str, tmp_path: Path, reject: Reject
) -> None:
    sprung = tmp_path / "sprung"

    def corrupt(folder: Path) -> None:
        (folder / WEIGHTS[SOURCE[conversion]]).unlink()
        (folder / file).write_bytes(pickle.dumps({"x": Trap(sprung)}))

    assert_mentions(reject(conversion, corrupt), file, "pickle", "never loaded", "safetensors")
    assert not sprung.exists()
    pickle.loads((tmp_path / "source" / file).read_bytes())
    assert sprung.exists(), "the trap would not have worked"


@pytest.mark.parametrize(
    ("conversion", "file"),
    [
        ("from-hf", "pytorch_model.bin"),
        ("from-hf", "training_args.bin"),
        ("from-hf", "optimizer.pt"),
        ("fuse-model", "training_args.bin"),
    ],
)
def test_pickles_beside_the_weights_are_neither_loaded_nor_copied(
    conversion: str, file: str, valid_inputs: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(valid_inputs / "model", tmp_path / "source")
    (source / file).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    convert(conversion, source, tmp_path / "out", None, trust_remote_code=True)
    assert not (tmp_path / "sprung").exists()
    assert (tmp_path / "out" / WEIGHTS["model"]).is_file()
    assert not (tmp_path / "out" / file).exists()


CODE = """
from pathlib import Path
from mlx_lm.models.llama import Model, ModelArgs
from transformers import PreTrainedTokenizerFast as Evil
Path({!r}).touch()
"""
AUTO_MAP = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}


def add_code(file: str, sprung: Path, **values: Any) -> Corrupt:
    """Return a function that puts evil.py, which creates ``sprung``, into a folder, and sets
    entries of a JSON file that name it."""

    def corrupt(folder: Path) -> None:
        (folder / "evil.py").write_text(CODE.format(str(sprung)))
        set_json(file, **values)(folder)

    return corrupt


@pytest.mark.parametrize(
    ("file", "values", "parts"),
    [
        (MODEL_CONFIG, {"model_file": "evil.py"}, ("'evil.py'", "trust_remote_code")),
        (MODEL_CONFIG, {"model_file": "../source/evil.py"}, ("/evil.py'", "trust_remote_code")),
        # mlx-lm has no use for auto_map, so trust would not help.
        (
            MODEL_CONFIG,
            {"model_type": "evil", "auto_map": AUTO_MAP},
            ("Model type evil not supported",),
        ),
        (
            MODEL_CONFIG,
            {"model_type": "evil", "auto_map": AUTO_MAP, "model_file": "evil.py"},
            ("'evil.py'", "trust_remote_code"),
        ),
        (TOKENIZER_CONFIG, TOKENIZER, ("custom code",)),
    ],
)
def test_code_is_not_run_without_trust(
    file: str, values: dict[str, Any], parts: tuple[str, ...], tmp_path: Path, reject: Reject
) -> None:
    message = reject("from-hf", add_code(file, tmp_path / "sprung", **values))
    assert_mentions(message, "source", "loaded", *parts)
    assert not (tmp_path / "sprung").exists()


def test_fuse_does_not_run_code_without_trust_either(tmp_path: Path, reject: Reject) -> None:
    for file, values, parts in (
        (MODEL_CONFIG, {"model_file": "evil.py"}, ("'evil.py'", "trust_remote_code")),
        (TOKENIZER_CONFIG, TOKENIZER, ("custom code",)),
    ):
        message = reject("fuse-model", add_code(file, tmp_path / "sprung", **values))
        assert_mentions(message, "source", "loaded", *parts)
        assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("conversion", ["from-hf", "fuse-model", "to-peft"])
def test_the_user_is_not_asked_whether_to_run_a_tokenizers_code(
    conversion: str, valid_inputs: Path, tmp_path: Path
) -> None:
    """transformers asks on the terminal unless it is told; a "y" must not be waited for."""
    source = shutil.copytree(valid_inputs / "model", tmp_path / "source")
    add_code(TOKENIZER_CONFIG, tmp_path / "sprung", **TOKENIZER)(source)
    adapter = str(valid_inputs / "mlx")
    arguments = {
        "from-hf": ("convert", "from-hf", "source", "out"),
        "fuse-model": ("fuse", "out", "--model", "source"),
        "to-peft": ("convert", "to-peft", adapter, "out", "--model", "source"),
    }
    ran = run_program(tmp_path, *arguments[conversion], stdin="y\n" * 9)
    assert not (tmp_path / "sprung").exists()
    assert (ran.returncode, ran.stdout) == (2, "")
    assert_mentions(ran.stderr, "source", "custom code")


@model_conversions
def test_code_that_is_not_needed_is_not_run(
    conversion: str, valid_inputs: Path, tmp_path: Path
) -> None:
    """A llama is a llama, whatever code its config.json names as well."""
    source = shutil.copytree(valid_inputs / "model", tmp_path / "source")
    add_code(MODEL_CONFIG, tmp_path / "sprung", auto_map=AUTO_MAP)(source)
    convert(conversion, source, tmp_path / "out", None, verify=True)
    assert not (tmp_path / "sprung").exists()
    assert not list(tmp_path.glob("out/*.py"))


@model_conversions
def test_code_is_run_with_trust(conversion: str, valid_inputs: Path, tmp_path: Path) -> None:
    """Also the proof that the trap in the tests above would work."""
    source = shutil.copytree(valid_inputs / "model", tmp_path / "source")
    add_code(MODEL_CONFIG, tmp_path / "sprung", model_file="evil.py")(source)
    convert(conversion, source, tmp_path / "out", None, trust_remote_code=True)
    assert (tmp_path / "sprung").exists()


def test_a_tokenizers_code_is_run_with_trust(valid_inputs: Path, tmp_path: Path) -> None:
    source = shutil.copytree(valid_inputs / "model", tmp_path / "source")
    add_code(TOKENIZER_CONFIG, tmp_path / "sprung", **TOKENIZER)(source)
    ran = run_program(
        tmp_path, "convert", "from-hf", "source", "out", "--no-verify", "--trust-remote-code"
    )
    assert ran.returncode == 0, ran.stderr[-500:]
    assert (tmp_path / "sprung").exists()


@model_conversions
def test_an_output_without_code_does_not_name_any(
    conversion: str, valid_inputs: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(valid_inputs / "model", tmp_path / "source")
    set_json(MODEL_CONFIG, auto_map=AUTO_MAP)(source)
    options = {"format": "mlx"} if conversion == "fuse-model" else {}
    convert(conversion, source, tmp_path / "out", None, **options)
    config = json.loads((tmp_path / "out" / MODEL_CONFIG).read_text())
    assert config["model_type"] == "llama"
    assert "auto_map" not in config


def leave_as_is(folder: Path) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("action", "arguments", "corrupt", "parts"),
    [
        ("to-peft", (), set_lora_parameters(rank=0), ("rank", " 0;", "65536")),
        ("to-peft", ("--model", "./nope"), leave_as_is, ("./nope", "folder")),
        (
            "to-peft",
            (),
            lambda folder: (folder / WEIGHTS["mlx"]).write_bytes(b"\n" * 99),
            (WEIGHTS["mlx"], "safetensors", "header"),
        ),
        ("to-peft", ("--dtype", "int8"), leave_as_is, ("--dtype", "'int8'")),
        ("from-peft", (), set_json(ADAPTER_CONFIG, r="8\n9"), ("rank 8 9 ",)),
        ("from-peft", (), set_json(ADAPTER_CONFIG, peft_type="A\r\n\u2028B"), ("peft_type", "A B")),
        ("from-peft", (), set_json(ADAPTER_CONFIG, target_modules="("), ("pattern", "'('")),
        ("from-peft", (), set_json(ADAPTER_CONFIG, peft_type="\x1b[2J\x07"), ("peft_type", "[2J")),
        ("from-hf", ("--quantize", "7"), leave_as_is, ("quantize", " 7;")),
        ("from-hf", ("--group-size", "1"), leave_as_is, ("group_size", " 1;")),
        (
            "from-hf",
            (),
            set_json(MODEL_CONFIG, model_file="evil.py"),
            ("evil.py", "trust_remote_code"),
        ),
        ("from-hf", ("--revision", "x"), leave_as_is, ("revision", "'x'", "local folder")),
        ("fuse", (), set_lora_parameters(scale="x"), ("scale", " x;", "finite")),
        ("fuse", ("--quantize",), leave_as_is, ("--quantize", "not quantized")),
        ("fuse", ("--format", "gguf"), leave_as_is, ("--format", "'gguf'")),
    ],
)
def test_commands_end_with_status_2_and_one_printable_line(
    action: str,
    arguments: tuple[str, ...],
    corrupt: Corrupt,
    parts: tuple[str, ...],
    valid_inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = shutil.copytree(valid_inputs / SOURCE[action], tmp_path / "source")
    output = tmp_path / "out"
    corrupt(source)
    before = folder_content(tmp_path)
    if action == "fuse":
        ran = command(capsys, "fuse", output, "--adapter", source, *arguments)
    else:
        ran = command(capsys, "convert", action, source, output, *arguments)
    message = complaint(ran)
    assert_mentions(message.replace(f"{tmp_path}/", ""), *parts)
    assert message.isprintable()
    assert folder_content(tmp_path) == before


@every_conversion
def test_unknown_dtypes(conversion: str, reject: Reject) -> None:
    for dtype in ("int8", "float64"):
        message = reject(conversion, leave_as_is, dtype=dtype)
        assert_mentions(message, "dtype", f"'{dtype}'", "float32, bfloat16, float16")


def test_quantizing_where_no_layer_can_be(reject: Reject) -> None:
    message = reject("from-hf", leave_as_is, quantize=4, group_size=64)
    assert_mentions(message, "layer", "groups of 64", "group_size")
