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


def sources() -> list[Path]:
    """The example pairs, and the file that PARITY_PAIRS names (real pairs, natural lengths)."""
    given = os.environ.get("PARITY_PAIRS")
    return [EXAMPLES, Path(given)] if given else [EXAMPLES]


@pytest.fixture(scope="session", params=sources(), ids=lambda path: path.stem)
def pairs_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of (at most) 32 pairs, spread over the source."""
    lines = request.param.read_text(encoding="utf-8").splitlines()
    chosen = lines[:: max(1, len(lines) // PAIRS)][:PAIRS]
    path = tmp_path_factory.mktemp("pairs") / request.param.name
    path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def records(pairs_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in pairs_path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def hf_tokenizer(smollm2_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="session")
def hf_model(smollm2_folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def mlx_model(smollm2_folder: Path) -> LoadedModel:
    return load_model(str(smollm2_folder))
