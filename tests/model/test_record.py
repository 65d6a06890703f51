"""The record of a training in its adapter, and the warnings when a model differs from it."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import arrays, assert_same_arrays, captured_display, small_run
from helpers.tiny import CHATML, INST, some_pairs, tiny_folder, write_jsonl
from mlx.utils import tree_flatten
from mlx_lm.utils import load as mlx_lm_load

from mlx_simpo import SimPOError, __version__, evaluate, generate, load_config, load_model, train
from mlx_simpo.cli.arguments import adapter_config
from mlx_simpo.model.loading import LoadedModel
from mlx_simpo.model.record import base_record, differences_from_training, get_dict, template_hash

FOUR = {"group_size": 64, "bits": 4, "mode": "affine"}


def loaded(**changes: Any) -> LoadedModel:
    """A loaded model with no more than its record needs."""
    config = {"quantization": changes.pop("quantization", None)}
    values = {"name": "org/model", "revision": "abc", "folder": Path(), **changes}
    return LoadedModel(None, None, config, "float32", **values)  # type: ignore[arg-type]


def test_a_run_records_what_it_was_trained_on(adapter: Path, model_folder: Path) -> None:
    record = json.loads((adapter / "adapter_config.json").read_text())["mlx_simpo"]
    assert record["version"] == __version__
    assert record["base"] == {"model": str(model_folder), "revision": None, "quantization": None}
    template = (adapter / "chat_template.jinja").read_text()
    assert record["template_sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert record["config"] == load_config(adapter / "config.yaml").as_dict()


def test_mlx_lm_reads_the_adapter_all_the_same(adapter: Path, model_folder: Path) -> None:
    model = mlx_lm_load(str(model_folder), adapter_path=str(adapter))[0]
    weights = arrays(adapter / "adapters.safetensors")
    there = {n: np.array(p) for n, p in tree_flatten(model.parameters()) if n in weights}
    assert_same_arrays(there, weights)


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ({}, {}, []),
        ({}, {"name": "org/other"}, ["model was org/model in training and is org/other now"]),
        # A copy of the same model in another folder.
        ({"name": "/a/b/model"}, {"name": "/c/model"}, []),
        ({}, {"name": "/home/me/model", "revision": None}, []),
        ({}, {"revision": "def"}, ["revision was abc in training and is def now"]),
        ({"revision": None}, {"revision": "def"}, []),
        (
            {},
            {"quantization": FOUR},
            ["was none in training and is 4-bit affine, groups of 64 now"],
        ),
        ({"quantization": FOUR}, {}, ["quantization was 4-bit affine, groups of 64 in training"]),
        ({"quantization": FOUR}, {"quantization": dict(FOUR)}, []),
    ],
    ids=str,
)
def test_differences(then: dict, now: dict, words: list[str]) -> None:
    differences = differences_from_training({"base": base_record(loaded(**then))}, loaded(**now))
    assert len(differences) == len(words)
    assert all(word in text for word, text in zip(words, differences, strict=True))


@pytest.mark.parametrize("record", [None, [], "x", {"base": 3}, {"base": {}}, {}])
def test_an_empty_or_invalid_record(record: Any) -> None:
    assert differences_from_training(get_dict({"mlx_simpo": record}, "mlx_simpo"), loaded()) == []


def test_another_template_is_noticed() -> None:
    record = {"base": {}, "template_sha256": template_hash(CHATML)}
    assert differences_from_training(record, loaded(), CHATML) == []
    assert differences_from_training(record, loaded(), None) == []
    assert differences_from_training(record, loaded(), INST) == [
        "the chat template differs from the one in training"
    ]


@pytest.mark.parametrize("then", [None, {}, {"a": False}, {"a": [1, "é"], "b": None}])
def test_other_template_arguments_are_noticed(then: Any) -> None:
    # A record has been through JSON.
    record = json.loads(json.dumps({"config": {"data": {"template_args": then}}}))
    assert differences_from_training(record, loaded(), None, then or {}) == []
    assert differences_from_training(record, loaded(), None) == []
    assert differences_from_training(record, loaded(), None, {"a": True}) == [
        f'data.template_args was {json.dumps(then or {})} in training and is {{"a": true}} now'
    ]
    # An adapter of a version that had no such arguments says nothing about them.
    assert differences_from_training({"config": {"data": {}}}, loaded(), None, {"a": 1}) == []


def test_an_adapters_template_arguments_are_used_again(pairs_file: Path, tmp_path: Path) -> None:
    """From its config.yaml, by evaluate and generate; others are used if asked for, and warned."""
    model = tiny_folder(tmp_path / "model", template="{{ a }}" + CHATML)
    run = small_run(model, pairs_file, tmp_path / "run", "data.template_args={a: x}")
    train(load_config(None, run), captured_display()[0])
    options = argparse.Namespace(
        model=None, config=None, settings=[], adapter=str(tmp_path / "run")
    )
    config = adapter_config(options)
    assert config.data.template_args == {"a": "x"}
    display, text = captured_display()
    generate(config, "Hello", options.adapter, max_tokens=1, display=display)
    assert "chat template: the file" in text.getvalue()
    assert ", with a=x" in text.getvalue()
    assert "might not fit" not in text.getvalue()
    options.settings = ["data.template_args={a: y}"]
    display, text = captured_display()
    generate(adapter_config(options), "Hello", options.adapter, max_tokens=1, display=display)
    warning = """data.template_args was {"a": "x"} in training and is {"a": "y"} now"""
    assert warning in text.getvalue()


def test_every_way_of_loading_warns(adapter: Path, pairs_file: Path, tmp_path: Path) -> None:
    """evaluate, generate and lora.init_from, with another model than the adapter's."""
    other = tiny_folder(tmp_path / "another")
    warning = f"model was {load_config(adapter / 'config.yaml').model} in training and is {other}"
    display, text = captured_display()
    settings = [f"model={other}", f"data.valid={pairs_file}"]
    evaluate(load_config(None, settings), adapter, display)
    assert text.getvalue().count(warning) == 1
    display, text = captured_display()
    generate(load_config(None, settings), "Hello", adapter, max_tokens=1, display=display)
    assert text.getvalue().count(warning) == 1
    display, text = captured_display()
    pairs = write_jsonl(tmp_path / "pairs.jsonl", some_pairs())
    more = small_run(other, pairs, tmp_path / "run", f"lora.init_from={adapter}")
    train(load_config(None, more), display)
    assert text.getvalue().count(warning) == 1


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path: Path) -> None:
    """huggingface_hub keeps a model in …/snapshots/<commit>."""
    folder = tiny_folder(tmp_path / "snapshots" / ("a" * 40))
    assert load_model(str(folder)).revision == "a" * 40


def test_a_model_type_that_is_not_a_name(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "../../os"}))
    with pytest.raises(SimPOError, match=r"model_type is '../../os' .*; it must be a name"):
        load_model(str(folder))
