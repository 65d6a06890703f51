"""Records the golden values of tests/test_objectives.py from TRL and Liger.

    make golden        (in the parity environment: torch, trl, liger-kernel)

For each case of objective_cases.py: the loss, and its gradients with respect to the average
log-probabilities, as TRL's CPOTrainer.cpo_loss and Liger's LigerFusedLinearSimPOFunction compute
them in float32 on the CPU. TRL's hinge has no margin term: with chosen − gamma_beta_ratio as its
input it is the official hinge. Liger has no hinge.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from golden.objective_cases import CASES, Case

GOLDEN = Path(__file__).with_name("objective.json")


def trl_loss(case: Case) -> dict[str, Any]:
    """Compute loss and gradients with TRL."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo import CPOTrainer

    settings = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo" if case.loss_type == "sigmoid" else "hinge",
        beta=case.beta,
        simpo_gamma=case.beta * case.gamma_beta_ratio,
        label_smoothing=case.label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    chosen, rejected = leaves(case)
    shift = case.gamma_beta_ratio if case.loss_type == "hinge" else 0.0
    losses, *_ = CPOTrainer.cpo_loss(settings, chosen - shift, rejected)  # type: ignore[arg-type]
    return differentiated(losses.mean(), chosen, rejected)


def liger_loss(case: Case) -> dict[str, Any]:
    """Compute loss and gradients with Liger."""
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction

    chosen, rejected = leaves(case)
    loss, *_ = LigerFusedLinearSimPOFunction.preference_loss_fn(
        chosen,
        rejected,
        torch.zeros(2 * case.pairs, 1),
        beta=case.beta,
        gamma=case.beta * case.gamma_beta_ratio,
        label_smoothing=case.label_smoothing,
    )
    return differentiated(loss, chosen, rejected)


def leaves(case: Case) -> list[torch.Tensor]:
    return [torch.tensor(x, requires_grad=True) for x in case.inputs()]


def differentiated(loss: torch.Tensor, *inputs: torch.Tensor) -> dict[str, Any]:
    gradients = torch.autograd.grad(loss, inputs)
    names = ("d_chosen", "d_rejected")
    return {"loss": loss.item(), **{n: g.tolist() for n, g in zip(names, gradients, strict=True)}}


def main() -> None:
    from importlib.metadata import version

    record = {
        "made_by": "tests/golden/make_objective.py",
        "versions": {name: version(name) for name in ("torch", "trl", "liger_kernel")},
        "trl": {case.name: trl_loss(case) for case in CASES},
        "liger": {case.name: liger_loss(case) for case in CASES if case.loss_type == "sigmoid"},
    }
    GOLDEN.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(GOLDEN)


if __name__ == "__main__":
    main()
