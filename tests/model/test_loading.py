"""Loading a model: from a folder or the Hub, in a dtype; messages for what cannot be loaded."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.commands import changed_copy, load_arrays
from helpers.tiny import CHATML, tiny_config, tiny_model, tiny_tokenizer
from huggingface_hub.errors import LocalEntryNotFoundError
from mlx.utils import tree_flatten

from mlx_simpo import SimPOError
from mlx_simpo.model import loading
from mlx_simpo.model.adapters import flat_arrays
from mlx_simpo.model.loading import dtype_of, load_model, load_only_tokenizer, model_folder

TOKENS = mx.random.randint(0, 500, (1, 16), key=mx.random.key(3))


@pytest.fixture(autouse=True)
def requests(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked of the Hub, which is always out of reach here."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        raise LocalEntryNotFoundError("cannot\n  reach it")

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    return asked


# --- a local folder --------------------------------------------------------------------------


def test_a_local_folder_gives_its_own_weights_and_tokenizer(
    model_folder: Path, requests: list
) -> None:
    loaded = load_model(str(model_folder))
    np.testing.assert_array_equal(np.array(loaded.model(TOKENS)), np.array(tiny_model()(TOKENS)))
    assert loaded.tokenizer.chat_template == CHATML
    assert loaded.config["hidden_size"] == 32
    assert requests == []


def test_the_home_folder_may_be_a_tilde(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert loading.model_folder("~/tiny") == model_folder


def test_a_folder_named_like_a_hub_id_is_not_fetched(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: list
) -> None:
    changed_copy(model_folder, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert (loading.model_folder("org/name") / "config.json").is_file()
    assert requests == []


def test_rotary_settings_of_transformers_5_reach_the_model(
    model_folder: Path, tmp_path: Path
) -> None:
    old = {**tiny_config(), "rope_theta": 123.0}
    new = {**tiny_config(), "rope_parameters": {"rope_theta": 123.0, "rope_type": "default"}}
    del new["rope_theta"]
    models = [
        load_model(
            str(changed_copy(model_folder, tmp_path / name, config__json=json.dumps(config)))
        ).model
        for name, config in (("old", old), ("new", new))
    ]
    first, second = (np.array(model(TOKENS)) for model in models)
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - np.array(tiny_model()(TOKENS))).max() > 1e-3


# --- dtype -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_all_weights_and_of_the_logits(dtype: str, model_folder: Path) -> None:
    loaded = load_model(str(model_folder), dtype=dtype)
    expected = getattr(mx, dtype)
    assert {p.dtype for p in flat_arrays(loaded.model.parameters()).values()} == {expected}
    assert loaded.model(TOKENS).dtype == expected
    assert loaded.dtype == dtype


def stored(folder: Path, copy: Path, dtype: mx.Dtype) -> Path:
    """A copy of a model folder with its weights stored in ``dtype``."""
    weights = load_arrays(folder / "model.safetensors")
    changed = changed_copy(folder, copy, model__safetensors=None)
    cast = {name: value.astype(dtype) for name, value in weights.items()}
    mx.save_safetensors(str(changed / "model.safetensors"), cast, {"format": "pt"})
    return changed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_is_the_dtype_on_disk(dtype: str, model_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(str(stored(model_folder, tmp_path / "stored", getattr(mx, dtype))))
    assert {p.dtype for p in flat_arrays(loaded.model.parameters()).values()} == {
        getattr(mx, dtype)
    }
    assert loaded.dtype == dtype


def test_quantized_codes_are_left_alone(model_folder: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    model = tiny_model(**sizes)
    nn.quantize(model, group_size=32, bits=4)
    config = {**tiny_config(**sizes), "quantization": {"group_size": 32, "bits": 4}}
    folder = changed_copy(model_folder, tmp_path / "quantized", config__json=json.dumps(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    loaded: Any = load_model(str(folder), dtype="float16").model
    layer = loaded.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.QuantizedLinear)
    assert (layer.weight.dtype, layer.scales.dtype) == (mx.uint32, mx.float16)
    assert (layer.weight == model.layers[0].self_attn.q_proj.weight).all()


def test_a_model_without_floats_has_no_dtype() -> None:
    with pytest.raises(SimPOError, match="no floating-point weights"):
        dtype_of(nn.Module())


# --- no such model ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/no/where", "~/nowhere", "a/b/c"])
@pytest.mark.parametrize("load", [load_model, load_only_tokenizer, model_folder])
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(
    name: str, load: Any, requests: list
) -> None:
    with pytest.raises(SimPOError) as error:
        load(name)
    assert str(error.value) == f"model is {name!r}; there is no such folder"
    assert requests == []


@pytest.mark.parametrize("name", ["org/name", "name"])
def test_a_hub_model_out_of_reach_is_named_in_one_line(name: str) -> None:
    with pytest.raises(SimPOError) as error:
        load_model(name)
    assert str(error.value) == (
        f"model is {name!r}; it is not a local folder and could not be downloaded from the "
        "Hugging Face Hub: cannot reach it"
    )


def test_the_hub_is_asked_for_the_revision_and_the_weights(requests: list) -> None:
    with pytest.raises(SimPOError):
        load_model("org/name", revision="v2")
    (asked,) = requests
    assert (asked["name"], asked["revision"]) == ("org/name", "v2")
    assert any("safetensors" in pattern for pattern in asked["allow_patterns"])


def test_the_tokenizer_alone_fetches_no_weights(requests: list) -> None:
    with pytest.raises(SimPOError):
        load_only_tokenizer("org/name", "v2")
    (asked,) = requests
    assert asked["revision"] == "v2"
    assert "*.json" in asked["allow_patterns"]
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])


# --- not a language model --------------------------------------------------------------------


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(
        SimPOError, match=r"holds no config\.json; it must be the folder of a model"
    ):
        load_model(str(tmp_path))


def test_a_revision_of_a_folder(model_folder: Path) -> None:
    with pytest.raises(SimPOError, match=r"revision is 'main', but .* local folder; leave it out"):
        load_model(str(model_folder), revision="main")


@pytest.mark.parametrize(
    ("model_type", "message"), [("bert", "bert not supported"), ("clip", "clip")]
)
def test_a_folder_that_holds_no_language_model(
    model_type: str, message: str, model_folder: Path, tmp_path: Path
) -> None:
    config = json.dumps({**tiny_config(), "model_type": model_type})
    folder = changed_copy(model_folder, tmp_path / "other", config__json=config)
    with pytest.raises(SimPOError, match=f"cannot be loaded as a language model.*{message}"):
        load_model(str(folder))


def test_the_tokenizer_needs_no_weights(model_folder: Path, tmp_path: Path) -> None:
    folder = changed_copy(model_folder, tmp_path / "bare", model__safetensors=None)
    assert load_only_tokenizer(str(folder)).encode("The sky") == tiny_tokenizer().encode("The sky")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{", r"cannot read \S+/config\.json: Expecting property name"),
        ("config.json", "", r"cannot read \S+/config\.json: Expecting value: line 1"),
        ("config.json", "[1]", r"\S+/config\.json must hold a JSON object, not \[1\]"),
        ("tokenizer.json", '{"a": ', r"cannot read \S+/tokenizer\.json: Expecting value"),
        (
            "tokenizer_config.json",
            b"\xff",
            r"cannot read \S+/tokenizer_config\.json: 'utf-8' codec",
        ),
        ("generation_config.json", "5", r"\S+/generation_config\.json must hold a JSON object"),
        ("added_tokens.json", "[]", r"\S+/added_tokens\.json must hold a JSON object"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_only_tokenizer])
def test_a_damaged_json_file_is_named(
    name: str, content: str | bytes, reason: str, load: Any, model_folder: Path, tmp_path: Path
) -> None:
    folder = changed_copy(model_folder, tmp_path / "m", **{name.replace(".", "__"): content})
    message = (
        rf"{folder} (cannot be|has no tokenizer).* loaded.*: {reason}.*; download the model again"
    )
    with pytest.raises(SimPOError, match=message):
        load(str(folder))


def test_code_beside_a_model_is_not_run(model_folder: Path, tmp_path: Path) -> None:
    """Neither for the weights nor for the tokenizer, whatever the model's files say."""
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    config = json.dumps({**tiny_config(), "model_file": "evil.py"})
    folder = changed_copy(model_folder, tmp_path / "m", config__json=config, evil__py=code)
    with pytest.raises(SimPOError, match=r"evil\.py.*trust_remote_code"):
        load_model(str(folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SimPOError, match="custom code"):
        load_only_tokenizer(str(folder))
    assert not ran.exists()
