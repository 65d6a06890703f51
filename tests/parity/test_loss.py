"""The loss and its gradients against TRL and Liger, which still compute the recorded values."""

import json

import mlx.core as mx
import numpy as np
import pytest
from golden.make_objective import GOLDEN, liger_loss, trl_loss
from golden.objective_cases import CASES, Case

from mlx_simpo import simpo_loss


@pytest.mark.parametrize("library", ["trl", "liger"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradients_are_those_of_trl_and_liger(case: Case, library: str) -> None:
    if library == "liger" and case.loss_type == "hinge":
        assert case.name not in json.loads(GOLDEN.read_text())["liger"]
        return
    live = trl_loss(case) if library == "trl" else liger_loss(case)
    recorded = json.loads(GOLDEN.read_text())[library][case.name]
    options = {
        "beta": case.beta,
        "gamma_beta_ratio": case.gamma_beta_ratio,
        "loss_type": case.loss_type,
        "label_smoothing": case.label_smoothing,
    }
    chosen, rejected = map(mx.array, case.inputs())
    loss, (d_chosen, d_rejected) = mx.value_and_grad(
        lambda c, r: simpo_loss(c, r, **options)[0], argnums=(0, 1)
    )(chosen, rejected)
    ours = {"loss": loss.item(), "d_chosen": np.array(d_chosen), "d_rejected": np.array(d_rejected)}
    for name, value in ours.items():
        np.testing.assert_allclose(value, live[name], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(recorded[name], live[name], rtol=1e-6, atol=1e-7)
