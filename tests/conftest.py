"""Fixtures shared by the tests."""

from pathlib import Path

import pytest
from smollm2 import smollm2
from tiny import some_pairs, tiny_folder, write_jsonl


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in float32, made from its PyPI wheel if need be."""
    return smollm2("float32")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that loads like any other."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Twelve good string records."""
    return write_jsonl(tmp_path / "pairs.jsonl", some_pairs())
