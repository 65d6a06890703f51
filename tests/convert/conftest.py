"""Inputs of the conversions, and what becomes of spoilt ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.hostile import SOURCE, Spoil, content, convert, limited
from helpers.mistakes import (
    ADAPTERS,
    EXPERTS,
    UNTIED,
    Converted,
    base,
    checkpoint_names,
    moved,
    trainable,
)
from helpers.tiny import tiny_config, tiny_model, tiny_tokenizer
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_simpo.convert import from_hf, from_peft, fuse, to_peft
from mlx_simpo.errors import SimPOError
from mlx_simpo.model.adapters import save_adapter


@pytest.fixture(scope="session")
def good(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of it and the same for PEFT, in folders of these names."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(model_folder, folder / "model")
    model = tiny_model()
    keys = ["self_attn.q_proj", "mlp.down_proj"]
    parameters = {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": keys}
    model.freeze()
    linear_to_lora_layers(model, 2, parameters)
    weights = tree_flatten(model.trainable_parameters())
    model.update(tree_unflatten([(n, mx.random.normal(p.shape) * 0.2) for n, p in weights]))
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    save_adapter(folder / "mlx", model, config | {"model": str(folder / "model")})
    to_peft(folder / "mlx", folder / "peft", verify=False)
    return folder


@pytest.fixture
def refused(good: Path, tmp_path: Path) -> Callable[..., str]:
    """Spoil a copy of a good input and convert it: the message, if nothing was left behind."""

    def run(name: str, spoil: Spoil, seconds: float = 30, **options: Any) -> str:
        given = tmp_path / "in"
        shutil.copytree(good / SOURCE[name], given)
        spoil(given)
        before = content(tmp_path)
        model = options.pop("model", str(good / "model"))
        output = options.pop("output", tmp_path / "out")
        with limited(seconds), pytest.raises(SimPOError) as caught:
            convert(name, given, output, model, **options)
        assert content(tmp_path) == before
        assert len(str(caught.value)) > 20
        return str(caught.value)

    return run


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two models, and the adapters by their names: NAME/mlx and NAME/peft."""
    folder = tmp_path_factory.mktemp("folders")
    for kind, changes in (("llama", UNTIED), ("mixtral", EXPERTS)):
        place = folder / f"{kind}-base"
        place.mkdir()
        weights = checkpoint_names(dict(tree_flatten(tiny_model(kind, **changes).parameters())))
        mx.save_safetensors(str(place / "model.safetensors"), weights, {"format": "pt"})
        (place / "config.json").write_text(json.dumps(tiny_config(kind, **changes)))
        tiny_tokenizer()._tokenizer.save_pretrained(place)
    for name, (kind, keys, rank, dora) in ADAPTERS.items():
        model = tiny_model(kind, **(EXPERTS if kind == "mixtral" else UNTIED))
        parameters = {"rank": rank, "scale": 5.0, "dropout": 0.0, "keys": keys}
        model.freeze()
        linear_to_lora_layers(model, 2, parameters, use_dora=dora)
        model.update(tree_unflatten([(n, moved(n, p)) for n, p in trainable(model)]))
        config = {"num_layers": 2, "lora_parameters": parameters, "model": str(base(folder, name))}
        config["fine_tune_type"] = "dora" if dora else "lora"
        save_adapter(folder / name / "mlx", model, config)
        to_peft(folder / name / "mlx", folder / name / "peft", verify=False)
    return folder


@pytest.fixture
def converted(folders: Path, tmp_path: Path) -> Converted:
    """Run a conversion, verified, into a folder that must be gone if it fails."""

    def run(conversion: str, name: str, **options: Any) -> None:
        output, mlx = tmp_path / "out", folders / name / "mlx"
        options["verify"] = True
        try:
            if conversion == "to-peft":
                to_peft(mlx, output, **options)
            elif conversion == "from-peft":
                from_peft(folders / name / "peft", output, **options)
            elif conversion == "fuse":
                fuse(output, adapter=mlx, **options)
            else:
                from_hf(str(base(folders, name)), output, **options)
        except SimPOError:
            assert list(tmp_path.iterdir()) == []
            raise
        assert output.is_dir()

    return run
