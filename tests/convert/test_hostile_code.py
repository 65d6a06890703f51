"""Code and pickles that come with a model: never run unasked."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import command, complaint
from helpers.hostile import (
    ADAPTER,
    CONFIG,
    FILE,
    SETTINGS,
    SOURCE,
    Spoil,
    changed,
    content,
    conversions,
    convert,
    models,
    nested,
    program,
)


class Trap:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("from-peft", "adapter_model.bin"),
        ("from-peft", "adapter_model.pt"),
        ("from-hf", "pytorch_model.bin"),
        ("alone", "pytorch_model.bin"),
        ("alone", "model.pth"),
    ],
)
def test_pickles_are_never_loaded(
    name: str, file: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    ran = tmp_path / "it ran"

    def spoil(folder: Path) -> None:
        (folder / FILE[SOURCE[name]]).unlink()
        (folder / file).write_bytes(pickle.dumps({"x": Trap(ran)}))

    assert f"{file}, a pickle, which can run any code and is never loaded" in refused(name, spoil)
    assert not ran.exists()
    pickle.loads((tmp_path / "in" / file).read_bytes())
    assert ran.exists(), "the trap would not have worked"


@models
@pytest.mark.parametrize("beside", ["pytorch_model.bin", "training_args.bin", "optimizer.pt"])
def test_pickles_beside_the_weights_are_left_alone(
    name: str, beside: str, good: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(good / "model", tmp_path / "in")
    (source / beside).write_bytes(pickle.dumps(Trap(tmp_path / "it ran")))
    convert(name, source, tmp_path / "out", None, trust_remote_code=True)
    assert not (tmp_path / "it ran").exists()
    assert not (tmp_path / "out" / beside).exists()


CODE = """
from pathlib import Path
from mlx_lm.models.llama import Model, ModelArgs
from transformers import PreTrainedTokenizerFast as Evil
Path({!r}).touch()
"""
AUTO = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}


def with_code(file: str, ran: Path, **values: Any) -> Spoil:
    """Put code into the folder that creates a file, and name it in a JSON file."""

    def spoil(folder: Path) -> None:
        (folder / "evil.py").write_text(CODE.format(str(ran)))
        changed(file, **values)(folder)

    return spoil


@models
@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (CONFIG, {"model_file": "evil.py"}, "trust_remote_code"),
        (CONFIG, {"model_file": "../in/evil.py"}, "trust_remote_code"),
        (CONFIG, {"model_type": "evil", "auto_map": AUTO}, ""),
        (CONFIG, {"model_type": "evil", "auto_map": AUTO, "model_file": "evil.py"}, ""),
        (SETTINGS, TOKENIZER, "custom code"),
    ],
)
def test_code_is_refused(
    name: str, file: str, values: dict, message: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert message in refused(name, with_code(file, tmp_path / "it ran", **values))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", ["from-hf", "alone", "to-peft"])
def test_code_of_a_tokenizer_is_not_asked_for(name: str, good: Path, tmp_path: Path) -> None:
    source = shutil.copytree(good / "model", tmp_path / "in")
    with_code(SETTINGS, tmp_path / "it ran", **TOKENIZER)(source)
    adapter = str(good / "mlx")
    called = {
        "from-hf": ("convert", "from-hf", "in", "out"),
        "alone": ("fuse", "out", "--model", "in"),
        "to-peft": ("convert", "to-peft", adapter, "out", "--model", "in"),
    }
    ran = program(tmp_path, *called[name], answer="y\n" * 9)
    assert not (tmp_path / "it ran").exists()
    assert (ran.returncode, ran.stdout) == (2, "")


@models
def test_code_that_is_not_needed_is_not_run(name: str, good: Path, tmp_path: Path) -> None:
    """A llama is a llama, whatever else its config.json says."""
    source = shutil.copytree(good / "model", tmp_path / "in")
    with_code(CONFIG, tmp_path / "it ran", auto_map=AUTO)(source)
    convert(name, source, tmp_path / "out", None, verify=True)
    assert not (tmp_path / "it ran").exists()
    assert not list(tmp_path.glob("out/*.py"))


@models
def test_code_runs_with_trust_alone(name: str, good: Path, tmp_path: Path) -> None:
    source = shutil.copytree(good / "model", tmp_path / "in")
    with_code(CONFIG, tmp_path / "it ran", model_file="evil.py")(source)
    convert(name, source, tmp_path / "out", None, trust_remote_code=True)
    assert (tmp_path / "it ran").exists()


@models
def test_no_code_is_named_that_is_not_there(name: str, good: Path, tmp_path: Path) -> None:
    source = shutil.copytree(good / "model", tmp_path / "in")
    changed(CONFIG, auto_map=AUTO)(source)
    convert(name, source, tmp_path / "out", None, **{"format": "mlx"} if name == "alone" else {})
    assert "auto_map" not in json.loads((tmp_path / "out" / CONFIG).read_text())


def nothing(folder: Path) -> None:
    """Leave the input as it is."""


@pytest.mark.parametrize(
    ("name", "arguments", "spoil", "message"),
    [
        ("to-peft", (), nested(rank=0), "rank is 0; it must be 1 to 65536"),
        ("to-peft", ("--model", "./nope"), nothing, "there is no such folder"),
        (
            "to-peft",
            (),
            lambda f: (f / FILE["mlx"]).write_bytes(b"\n" * 99),
            "not a valid safetensors",
        ),
        ("to-peft", ("--dtype", "int8"), nothing, "invalid choice: 'int8'"),
        ("from-peft", (), changed(ADAPTER, r="8\n9"), "rank 8 9 of"),
        ("from-peft", (), changed(ADAPTER, peft_type="A\r\n\u2028B"), "peft_type is A B, only"),
        ("from-peft", (), changed(ADAPTER, target_modules="("), "the pattern '('"),
        ("from-peft", (), changed(ADAPTER, peft_type="\x1b[2J\x07"), "peft_type"),
        ("from-hf", ("--quantize", "7"), nothing, "quantize is 7"),
        ("from-hf", ("--group-size", "1"), nothing, "group_size is 1"),
        ("from-hf", (), changed(CONFIG, model_file="evil.py"), "trust"),
        ("from-hf", ("--revision", "x"), nothing, "is a local folder; leave it out"),
        ("fuse", (), nested(scale="x"), "scale is x; it must be a finite number"),
        ("fuse", ("--quantize",), nothing, "this base is not quantized"),
        ("fuse", ("--format", "gguf"), nothing, "invalid choice: 'gguf'"),
    ],
)
def test_one_line_and_status_2(
    name: str,
    arguments: tuple[str, ...],
    spoil: Spoil,
    message: str,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, output = shutil.copytree(good / SOURCE[name], tmp_path / "in"), tmp_path / "out"
    spoil(source)
    before = content(tmp_path)
    places = [output, "--adapter", source] if name == "fuse" else [name, source, output]
    ran = command(capsys, "fuse" if name == "fuse" else "convert", *places, *arguments)
    found = complaint(ran)
    assert message in found
    assert found.isprintable()
    assert content(tmp_path) == before


@conversions
@pytest.mark.parametrize("dtype", ["int8", "float64"])
def test_types_that_are_none(name: str, dtype: Any, refused: Callable[..., str]) -> None:
    assert "dtype" in refused(name, nothing, dtype=dtype)


def test_packing_nothing_is_said(refused: Callable[..., str]) -> None:
    refused("from-hf", nothing, quantize=4, group_size=64)
