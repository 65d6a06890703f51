"""Inputs for the conversions, valid and corrupted."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.hostile import SOURCE, Corrupt, Reject, convert, folder_content, time_limit
from helpers.mistakes import (
    ADAPTERS,
    EXPERTS,
    UNTIED,
    ConvertVerified,
    base_folder,
    checkpoint_names,
    random_weight,
    trainable_weights,
)
from helpers.tiny import tiny_config, tiny_model, tiny_tokenizer
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_simpo.convert import from_hf, from_peft, fuse, to_peft
from mlx_simpo.errors import SimPOError
from mlx_simpo.model.adapters import save_adapter


@pytest.fixture(scope="session")
def valid_inputs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model ("model"), an mlx-lm adapter of it ("mlx") and the same adapter in
    PEFT's format ("peft"); see `helpers.hostile.SOURCE`."""
    folder = tmp_path_factory.mktemp("valid")
    shutil.copytree(model_folder, folder / "model")
    model = tiny_model()
    keys = ["self_attn.q_proj", "mlp.down_proj"]
    parameters = {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": keys}
    model.freeze()
    linear_to_lora_layers(model, 2, parameters)
    weights = trainable_weights(model)
    model.update(tree_unflatten([(n, mx.random.normal(p.shape) * 0.2) for n, p in weights]))
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    save_adapter(folder / "mlx", model, config | {"model": str(folder / "model")})
    to_peft(folder / "mlx", folder / "peft", verify=False)
    return folder


@pytest.fixture
def reject(valid_inputs: Path, tmp_path: Path) -> Reject:
    """Return a function that corrupts a copy of a valid input, converts it and returns the error
    message. It fails if the conversion succeeds, changes its input or leaves anything behind."""

    def run(conversion: str, corrupt: Corrupt, seconds: float = 30, **options: Any) -> str:
        source = tmp_path / "source"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(valid_inputs / SOURCE[conversion], source)
        corrupt(source)
        before = folder_content(tmp_path)
        model = options.pop("model", str(valid_inputs / "model"))
        output = options.pop("output", tmp_path / "out")
        with time_limit(seconds), pytest.raises(SimPOError) as caught:
            convert(conversion, source, output, model, **options)
        assert folder_content(tmp_path) == before
        # The folder's own name has the test's in it, which must not satisfy an assertion.
        return str(caught.value).replace(f"{tmp_path}/", "")

    return run


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, llama-base and mixtral-base, and the adapters of
    `helpers.mistakes.ADAPTERS`, each in both formats: NAME/mlx and NAME/peft."""
    folder = tmp_path_factory.mktemp("folders")
    for kind, changes in (("llama", UNTIED), ("mixtral", EXPERTS)):
        model_folder = folder / f"{kind}-base"
        model_folder.mkdir()
        weights = checkpoint_names(dict(tree_flatten(tiny_model(kind, **changes).parameters())))
        mx.save_safetensors(str(model_folder / "model.safetensors"), weights, {"format": "pt"})
        (model_folder / "config.json").write_text(json.dumps(tiny_config(kind, **changes)))
        tiny_tokenizer()._tokenizer.save_pretrained(model_folder)
    for name, (kind, keys, rank, is_dora) in ADAPTERS.items():
        model = tiny_model(kind, **(EXPERTS if kind == "mixtral" else UNTIED))
        parameters = {"rank": rank, "scale": 5.0, "dropout": 0.0, "keys": keys}
        model.freeze()
        linear_to_lora_layers(model, 2, parameters, use_dora=is_dora)
        weights = [(n, random_weight(n, p)) for n, p in trainable_weights(model)]
        model.update(tree_unflatten(weights))
        base = str(base_folder(folder, name))
        config = {"num_layers": 2, "lora_parameters": parameters, "model": base}
        config["fine_tune_type"] = "dora" if is_dora else "lora"
        save_adapter(folder / name / "mlx", model, config)
        to_peft(folder / name / "mlx", folder / name / "peft", verify=False)
    return folder


@pytest.fixture
def convert_verified(folders: Path, tmp_path: Path) -> ConvertVerified:
    """Return a function that runs a conversion with verification. If the conversion fails, the
    function checks that nothing was left behind and raises the conversion's error."""

    def run(conversion: str, adapter: str, **options: Any) -> None:
        output, mlx = tmp_path / "out", folders / adapter / "mlx"
        options["verify"] = True
        try:
            if conversion == "to-peft":
                to_peft(mlx, output, **options)
            elif conversion == "from-peft":
                from_peft(folders / adapter / "peft", output, **options)
            elif conversion == "fuse":
                fuse(output, adapter=mlx, **options)
            else:
                from_hf(str(base_folder(folders, adapter)), output, **options)
        except SimPOError:
            assert list(tmp_path.iterdir()) == []
            raise
        assert output.is_dir()

    return run
