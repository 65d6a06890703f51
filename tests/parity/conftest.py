"""What the parity tests share: the model in both frameworks, and the pairs they are compared on."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlx_simpo.model.loading import LoadedModel, load_model

EXAMPLES = Path(__file__).parents[2] / "examples" / "train.jsonl"
PAIRS = 32


def pair_files() -> list[Path]:
    """Return the example pairs, and the file that PARITY_PAIRS names: real pairs of natural
    lengths."""
    path = os.environ.get("PARITY_PAIRS")
    return [EXAMPLES, Path(path)] if path else [EXAMPLES]


@pytest.fixture(scope="session", params=pair_files(), ids=lambda path: path.stem)
def pairs_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of at most 32 pairs, taken at regular intervals."""
    lines = request.param.read_text(encoding="utf-8").splitlines()
    chosen = lines[:: max(1, len(lines) // PAIRS)][:PAIRS]
    path = tmp_path_factory.mktemp("pairs") / request.param.name
    path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def records(pairs_path: Path) -> list[dict[str, Any]]:
    """The pairs as they stand in the file."""
    return [json.loads(line) for line in pairs_path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def hf_tokenizer(smollm2_folder: Path) -> Any:
    """SmolLM2's tokenizer in transformers."""
    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="session")
def hf_model(smollm2_folder: Path) -> Any:
    """SmolLM2 in transformers, in float32."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def mlx_model(smollm2_folder: Path) -> LoadedModel:
    """SmolLM2 in MLX, in float32."""
    return load_model(str(smollm2_folder))
