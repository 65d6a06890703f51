"""The whole path on real pairs: from records to tokens, scored positions, average
log-probabilities and loss, against transformers and torch as the independent oracle uses them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import oracle

from mlx_simpo import DataConfig, ObjectiveConfig, evaluate_pairs, load_pairs
from mlx_simpo.data.encode import Encoder, encode_pairs
from mlx_simpo.model.loading import LoadedModel

LENGTHS = [(1024, 512), (96, 48)]  # as in real training, and so short that most pairs are truncated


def oracle_rows(
    tokenizer: Any, records: list[dict], compat: str | None, max_length: int, max_prompt: int
) -> list[tuple[int, oracle.TokenizedSequence]]:
    """Return (index of the record, tokens) of every pair that the oracle can score."""
    encode = oracle.encode_official if compat else oracle.encode_default
    rows = [(i, encode(tokenizer, r, max_length, max_prompt)) for i, r in enumerate(records)]
    return [(i, row) for i, row in rows if row is not None and row.chosen != row.rejected]


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize(("max_length", "max_prompt"), LENGTHS)
def test_tokens_and_scored_positions_are_the_oracles(
    pairs_path: Path,
    records: list[dict],
    hf_tokenizer: Any,
    mlx_model: LoadedModel,
    compat: str | None,
    max_length: int,
    max_prompt: int,
) -> None:
    settings = DataConfig(
        max_length=max_length,
        max_prompt_length=max_prompt,
        compat=compat,  # type: ignore[arg-type]
    )
    encoder = Encoder(mlx_model.tokenizer, settings)
    pairs, quarantined = encode_pairs(encoder, load_pairs(str(pairs_path)).pairs)
    expected = oracle_rows(hf_tokenizer, records, compat, max_length, max_prompt)
    assert [pair.index for pair in pairs] == [i for i, _ in expected]
    assert len(pairs) + len(quarantined) == len(records)
    for pair, (_, row) in zip(pairs, expected, strict=True):
        assert pair.chosen.tokens.tolist() == row.chosen
        assert pair.rejected.tokens.tolist() == row.rejected
        assert (pair.chosen.score_start, pair.rejected.score_start) == (
            row.chosen_start,
            row.rejected_start,
        )


@pytest.mark.parametrize("compat", [None, "official"])
def test_log_probabilities_and_loss_are_the_oracles(
    pairs_path: Path,
    records: list[dict],
    hf_tokenizer: Any,
    hf_model: Any,
    mlx_model: LoadedModel,
    compat: str | None,
    record_property: Any,
) -> None:
    """Average log-probabilities agree within 1e-4, the loss within 1e-5."""
    encoder = Encoder(mlx_model.tokenizer, DataConfig(compat=compat))  # type: ignore[arg-type]
    pairs, _ = encode_pairs(encoder, load_pairs(str(pairs_path)).pairs)
    objective = ObjectiveConfig(beta=2.5, gamma_beta_ratio=0.55)
    ours = evaluate_pairs(mlx_model.model, pairs, objective)

    rows = [row for _, row in oracle_rows(hf_tokenizer, records, compat, 1024, 512)]
    with torch.no_grad():
        chosen = oracle.average_logps(hf_model, [(r.chosen, r.chosen_start) for r in rows], 2)
        rejected = oracle.average_logps(hf_model, [(r.rejected, r.rejected_start) for r in rows], 2)
        loss = oracle.simpo_loss(chosen, rejected, 2.5, 0.55).item()
    errors = {
        "chosen": float(np.abs(ours.chosen_logps - chosen.numpy()).max()),
        "rejected": float(np.abs(ours.rejected_logps - rejected.numpy()).max()),
        "loss": abs(ours.metrics["loss"] - loss),
    }
    print(json.dumps({"data": pairs_path.stem, "compat": compat, "pairs": len(rows), **errors}))
    assert max(errors["chosen"], errors["rejected"]) <= 1e-4
    assert errors["loss"] <= 1e-5
