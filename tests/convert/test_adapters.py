"""Adapters to PEFT and back, as functions and commands, without torch. (With PEFT itself:
tests/parity.)"""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import arrays, assert_same_arrays, captured_display, command, complaint
from helpers.mlx_folders import MIXTRAL, mlx_adapter, mlx_model

from mlx_simpo import SimPOError, from_peft, to_peft


def test_the_record_of_a_run_names_the_model_and_is_copied(adapter: Path, tmp_path: Path) -> None:
    done = to_peft(adapter, tmp_path / "peft", verify=True)
    assert done.comparisons[0].passed
    record = json.loads((done.output / "mlx_simpo.json").read_text())
    source = json.loads((adapter / "adapter_config.json").read_text())["mlx_simpo"]
    assert record["base"] == source["base"]
    assert record["template_sha256"] == source["template_sha256"]
    assert record["training"]["config"] == source["config"]
    assert record["training"]["summary"] == json.loads((adapter / "summary.json").read_text())


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (1.5, {"r": 2, "lora_alpha": 3, "use_rslora": False}),
        (8 / 2**0.5, {"r": 2, "lora_alpha": 8, "use_rslora": True}),
        (1.23, {"r": 2, "lora_alpha": 2, "use_rslora": False}),  # the remaining factor is in B
    ],
)
def test_the_scale_as_lora_alpha(scale: float, expected: dict, tmp_path: Path) -> None:
    base = mlx_model(tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx", scale=scale, keys=["self_attn.q_proj"])
    out = to_peft(adapter, tmp_path / "peft", verify=True).output
    config = json.loads((out / "adapter_config.json").read_text())
    assert config.items() >= expected.items()
    back = from_peft(out, tmp_path / "back", verify=True).output
    if scale != 1.23:
        files = (adapter / "adapters.safetensors", back / "adapters.safetensors")
        assert_same_arrays(arrays(files[1]), arrays(files[0]))


@pytest.mark.parametrize("separate", [False, True])
def test_experts_to_peft_and_back(separate: bool, tmp_path: Path) -> None:
    base = mlx_model(tmp_path / "base", "mixtral", **MIXTRAL)
    adapter = mlx_adapter(base, tmp_path / "mlx")
    out = to_peft(adapter, tmp_path / "peft", separate_experts=separate, verify=True).output
    names = arrays(out / "adapter_model.safetensors").keys()
    single = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w2.lora_A.weight"
    assert (single in names) == separate
    back = from_peft(out, tmp_path / "back", verify=True).output
    assert_same_arrays(
        arrays(back / "adapters.safetensors"), arrays(adapter / "adapters.safetensors")
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_checked_before_it_is_rounded(dtype: str, tmp_path: Path) -> None:
    base = mlx_model(tmp_path / "base")
    done = to_peft(
        mlx_adapter(base, tmp_path / "mlx", scale=1.23),
        tmp_path / "peft",
        dtype=dtype,
        verify=True,
    )
    assert [c.limit is None for c in done.comparisons] == [False, True]
    assert done.comparisons[1].largest > done.comparisons[0].largest
    loaded = mx.load(str(done.output / "adapter_model.safetensors"))
    assert isinstance(loaded, dict)
    assert {str(array.dtype) for array in loaded.values()} == {f"mlx.core.{dtype}"}


def test_an_adapter_on_an_embedding(tmp_path: Path) -> None:
    base = mlx_model(tmp_path / "base", tie_word_embeddings=False)
    adapter = mlx_adapter(base, tmp_path / "mlx", keys=["model.embed_tokens"])
    assert to_peft(adapter, tmp_path / "peft", verify=True).comparisons[0].passed


def test_an_adapter_on_a_tied_embedding_is_rejected(tmp_path: Path) -> None:
    base = mlx_model(tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx", keys=["model.embed_tokens"])
    with pytest.raises(SimPOError, match=r"tied embeddings.*fuse"):
        to_peft(adapter, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_dora_on_a_parameter_is_rejected(tmp_path: Path) -> None:
    base = mlx_model(tmp_path / "base", "mixtral", **MIXTRAL)
    keys = ["block_sparse_moe.gate"]
    adapter = mlx_adapter(base, tmp_path / "mlx", keys=keys, dora=True)
    with pytest.raises(
        SimPOError, match=r"DoRA on .*gate.* does not support DoRA on parameters; fuse"
    ):
        to_peft(adapter, tmp_path / "peft")


def test_another_base_model_is_a_warning(adapter: Path, model_folder: Path, tmp_path: Path) -> None:
    display, text = captured_display()
    other = tmp_path / "elsewhere"
    other.symlink_to(model_folder)
    to_peft(adapter, tmp_path / "peft", model=str(other), verify=False, display=display)
    assert f"model was {model_folder} in training and is {other} now" in text.getvalue()


def test_a_comparison_that_is_not_possible_is_noted(tmp_path: Path) -> None:
    base = mlx_model(tmp_path / "base")
    display, text = captured_display()
    to_peft(mlx_adapter(base, tmp_path / "mlx"), tmp_path / "peft", display=display)
    assert "not compared with PEFT in torch: the base model is in MLX's format" in text.getvalue()


# --- the commands ----------------------------------------------------------------------------


def test_the_commands(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """to-peft, from-peft, fuse and from-hf, each with the output of the one before it."""
    a, b, c, d, e = (tmp_path / name for name in "abcde")
    chain = [
        (a, ("convert", "to-peft", adapter, a, "--verify")),
        (b, ("convert", "from-peft", a, b, "--dtype", "float32")),
        (c, ("fuse", c, "--adapter", b)),
        (d, ("convert", "from-hf", c, d, "--quantize", "4", "--group-size", 32)),
        (e, ("fuse", e, "--model", d, "--format", "mlx")),
    ]
    for output, arguments in chain:
        ran = command(capsys, *arguments)
        assert ran.status == 0, ran.err
        assert ran.out == f"{output}\n"
    result = command(capsys, "convert", "to-peft", b, tmp_path / "f", "--json").json
    assert result["output"] == str(tmp_path / "f")
    assert result["comparisons"][0]["passed"] is True


def test_a_converted_adapter_names_its_model(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no config.yaml as a run has, but generate needs no --model either."""
    peft = to_peft(adapter, tmp_path / "peft", verify=False).output
    back = from_peft(peft, tmp_path / "back", verify=False).output
    generate = ("generate", "--prompt", "Hello", "--max-tokens", 3, "--json", "--adapter")
    result = command(capsys, *generate, back).json["responses"]
    assert result == command(capsys, *generate, adapter).json["responses"]
    assert "convert from-peft" in complaint(command(capsys, *generate, peft))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-peft"], "the following arguments are required"),
        (["to-peft", "nothing", "out"], "nothing is not the folder of an adapter"),
        (["to-peft", "ADAPTER", "out", "lora.rank=3"], "no settings; leave out 'lora.rank=3'"),
        (["to-peft", "ADAPTER", "ADAPTER"], "holds a run already"),
        (["from-hf", "ADAPTER", "out"], "holds no config.json"),
        (["from-peft", "ADAPTER", "out"], "has no peft_type"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str],
    message: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [str(adapter) if a == "ADAPTER" else a for a in arguments]
    assert message in complaint(command(capsys, "convert", *paths))
    assert list(tmp_path.iterdir()) == []
