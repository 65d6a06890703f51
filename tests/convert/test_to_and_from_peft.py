"""Adapters to PEFT and back, without torch. (With PEFT itself: tests/parity.)"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from commands import arrays, assert_same_arrays, command, complaint, written_report
from mlx.utils import tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_config, save_model
from tiny import tiny_config, tiny_model, tiny_tokenizer

from mlx_simpo import SimPOError, from_peft, load_model, to_peft
from mlx_simpo.model.adapters import save_adapter

MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}


def model_folder(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    save_model(folder, tiny_model(model_type, **changes))
    save_config(tiny_config(model_type, **changes), folder / "config.json")
    tiny_tokenizer()._tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, *, dora: bool = False, **settings: Any) -> Path:
    model = load_model(str(base)).model
    model.freeze()
    parameters = {"rank": 2, "scale": 1.5, "dropout": 0.0, "keys": None, **settings}
    linear_to_lora_layers(model, -1, parameters, use_dora=dora)
    mx.random.seed(1)
    trained = model.trainable_parameters()
    model.update(tree_map(lambda p: p + mx.random.normal(p.shape) * 0.3, trained))
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}
    return save_adapter(folder, model, {**config, "model": str(base)})


def test_a_run_needs_no_model_to_be_named(adapter: Path, tmp_path: Path) -> None:
    """Its record says which; and the record goes along."""
    done = to_peft(adapter, tmp_path / "peft", verify=True)
    assert done.comparisons[0].passed
    record = json.loads((done.output / "mlx_simpo.json").read_text())
    own = json.loads((adapter / "adapter_config.json").read_text())["mlx_simpo"]
    assert record["base"] == own["base"]
    assert record["template_sha256"] == own["template_sha256"]
    assert record["training"]["config"] == own["config"]
    assert record["training"]["summary"] == json.loads((adapter / "summary.json").read_text())


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (1.5, {"r": 2, "lora_alpha": 3, "use_rslora": False}),
        (8 / 2**0.5, {"r": 2, "lora_alpha": 8, "use_rslora": True}),
        (1.23, {"r": 2, "lora_alpha": 2, "use_rslora": False}),  # the rest lies in B
    ],
)
def test_the_scale_in_peft(scale: float, expected: dict, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "mlx", scale=scale, keys=["self_attn.q_proj"])
    out = to_peft(adapter, tmp_path / "peft", verify=True).output
    config = json.loads((out / "adapter_config.json").read_text())
    assert config.items() >= expected.items()
    back = from_peft(out, tmp_path / "back", verify=True).output
    if scale != 1.23:
        files = (adapter / "adapters.safetensors", back / "adapters.safetensors")
        assert_same_arrays(arrays(files[1]), arrays(files[0]))


@pytest.mark.parametrize("separate", [False, True])
def test_experts_there_and_back(separate: bool, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "mixtral", **MIXTRAL)
    adapter = make_adapter(base, tmp_path / "mlx")
    out = to_peft(adapter, tmp_path / "peft", separate_experts=separate, verify=True).output
    names = arrays(out / "adapter_model.safetensors").keys()
    single = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w2.lora_A.weight"
    assert (single in names) == separate
    back = from_peft(out, tmp_path / "back", verify=True).output
    assert_same_arrays(
        arrays(back / "adapters.safetensors"), arrays(adapter / "adapters.safetensors")
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_judged_before_it_is_rounded(dtype: str, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    done = to_peft(
        make_adapter(base, tmp_path / "mlx", scale=1.23),
        tmp_path / "peft",
        dtype=dtype,
        verify=True,
    )
    assert [c.limit is None for c in done.comparisons] == [False, True]
    assert done.comparisons[1].largest > done.comparisons[0].largest
    loaded = mx.load(str(done.output / "adapter_model.safetensors"))
    assert isinstance(loaded, dict)
    assert {str(array.dtype) for array in loaded.values()} == {f"mlx.core.{dtype}"}


@pytest.mark.parametrize(
    ("keys", "changes", "words"),
    [
        (["model.embed_tokens"], {}, "tied embeddings"),
        (["model.embed_tokens"], {"tie_word_embeddings": False}, None),
    ],
)
def test_embeddings(keys: list, changes: dict, words: str | None, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", **changes)
    adapter = make_adapter(base, tmp_path / "mlx", keys=keys)
    if words is None:
        assert to_peft(adapter, tmp_path / "peft", verify=True).comparisons[0].passed
        return
    with pytest.raises(SimPOError, match=words + r".*fuse"):
        to_peft(adapter, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_dora_of_what_peft_names_as_a_parameter(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "mixtral", **MIXTRAL)
    keys = ["block_sparse_moe.gate"]
    adapter = make_adapter(base, tmp_path / "mlx", keys=keys, dora=True)
    with pytest.raises(SimPOError, match=r"DoRA on .*gate.* fuse"):
        to_peft(adapter, tmp_path / "peft")


def test_another_base_is_said(adapter: Path, model_folder: Path, tmp_path: Path) -> None:
    report, text = written_report()
    other = tmp_path / "elsewhere"
    other.symlink_to(model_folder)
    to_peft(adapter, tmp_path / "peft", model=str(other), verify=False, report=report)
    assert f"model was {model_folder} in training and is {other} now" in text.getvalue()


def test_what_is_not_compared_is_said(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    report, text = written_report()
    to_peft(make_adapter(base, tmp_path / "mlx"), tmp_path / "peft", report=report)
    assert "not compared with PEFT in torch: the base model is in MLX's format" in text.getvalue()


# --- the commands ----------------------------------------------------------------------------


def test_the_commands(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """to-peft, from-peft, fuse, from-hf, one after the other; each prints its folder."""
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
    found = command(capsys, "convert", "to-peft", tmp_path / "b", tmp_path / "f", "--json").json
    assert found["output"] == str(tmp_path / "f")
    assert found["comparisons"][0]["passed"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["to-peft"], "the following arguments are required"),
        (["to-peft", "nothing", "out"], "nothing is no adapter folder"),
        (["to-peft", "ADAPTER", "out", "lora.rank=3"], "no settings; leave out 'lora.rank=3'"),
        (["to-peft", "ADAPTER", "ADAPTER"], "holds a run already"),
        (["from-hf", "ADAPTER", "out"], "holds no config.json"),
        (["from-peft", "ADAPTER", "out"], "has no peft_type"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str],
    words: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(adapter) if a == "ADAPTER" else a for a in arguments]
    assert words in complaint(command(capsys, "convert", *given))
    assert list(tmp_path.iterdir()) == []
