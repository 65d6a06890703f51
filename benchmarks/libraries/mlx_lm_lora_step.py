"""mlx-lm-lora 5.10.2, DPO and CPO: it has no SimPO, and these are its nearest steps.

spec["variant"]:
- "cpo" (default): no reference model, as SimPO; the loss is of summed log-probabilities.
  As it stands the step of train_cpo raises `IndexError: _Map_base::at` under mlx 0.32.4 when
  mx.compile traces it, before anything is computed; so the same step runs uncompiled.
- "cpo_compiled": the same, compiled: train_cpo's own parameter loss_fn is its cpo_loss without the
  two metrics on which mx.compile fails (policy_rejected_logps and chosen_logits_mean are each a
  mean that the loss has computed already). A user gets this only by knowing it.
- "dpo": compiled, with a second, frozen model for the reference, run in every step. It offers no
  log-probabilities computed beforehand; without that model the reference is 0 and DPO is CPO.

The library's own on the timed path: the step that train_cpo or train_dpo builds (loss, gradient,
update), iterate_*_batches for the padding, which is to the longest of the batch and no further, and
what its loop evaluates. It runs chosen and rejected in two passes.

Stand-ins: the loop, and without Metal the size of the working set, which it asks mlx for and which
is a KeyError there. AdamW is given to it (its command line has adam and adamw). Its gradient
checkpointing changes the block's class for good: prepare once a process.
"""

import contextlib
import io
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
from adapter_base import Pair, Reached, Spec, Step, locals_of, lora_model
from mlx_lm import load

REQUIRES = ("mlx-lm-lora==5.10.2",)


class NoData:
    """The loop measures its dataset just before it makes its first batch."""

    def __len__(self) -> int:
        raise Reached


def compilable_cpo_loss(**scores: Any) -> tuple[mx.array, mx.array, mx.array, dict[str, mx.array]]:
    from mlx_lm_lora.trainer.cpo_trainer import cpo_loss

    *rest, metrics = cpo_loss(**scores)
    del metrics["policy_rejected_logps"], metrics["chosen_logits_mean"]
    return *rest, metrics


def build_loop(spec: Spec, variant: str) -> dict[str, Any]:
    """The local variables of train_cpo or train_dpo, ready for the first batch."""
    from mlx_lm_lora.trainer import cpo_trainer, dpo_trainer

    model = lora_model(spec)
    optimizer = optim.AdamW(spec["learning_rate"], betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0)
    settings = {"beta": spec["beta"], "grad_checkpoint": spec["checkpoint"]}
    info = {"max_recommended_working_set_size": 0, **mx.device_info()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(mx, "device_info", return_value=info))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # its progress bar
        if variant == "dpo":
            # As its load_reference_model does when no other model is named.
            reference = load(spec["model"])[0].freeze()
            args = dpo_trainer.DPOTrainingArgs(**settings)
            trainer = dpo_trainer.train_dpo
            return locals_of(trainer, model, reference, optimizer, NoData(), args=args)
        if variant == "cpo":
            # Only this step: mx.disable_compile() would also slow the activations of mlx-lm.
            stack.enter_context(mock.patch.object(mx, "compile", lambda function, **_: function))
        loss = compilable_cpo_loss if variant == "cpo_compiled" else cpo_trainer.cpo_loss
        args = cpo_trainer.CPOTrainingArgs(**settings)
        return locals_of(cpo_trainer.train_cpo, model, optimizer, NoData(), args=args, loss_fn=loss)


def prepare(spec: Spec) -> Step:
    from mlx_lm_lora.trainer.cpo_trainer import iterate_cpo_batches
    from mlx_lm_lora.trainer.dpo_trainer import iterate_dpo_batches

    variant = spec.get("variant", "cpo")
    if variant not in NOTES:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(NOTES)}")
    loop = build_loop(spec, variant)
    batches = iterate_dpo_batches if variant == "dpo" else iterate_cpo_batches

    def step(batch: list[Pair]) -> dict[str, Any]:
        rows = [
            {
                "chosen": pair["chosen"],
                "rejected": pair["rejected"],
                "chosen_prompt_length": pair["start"],
                "rejected_prompt_length": pair["start"],
            }
            for pair in batch
        ]
        arrays = next(batches(rows, len(rows), max_seq_length=10**9, train=True))
        loss, reward, tokens, metrics, gradients = loop["step"](arrays, None, True)
        mx.eval(loop["state"], loss, reward, tokens, gradients, *metrics.values())
        positions = 2 * len(batch) * (arrays[0].shape[1] - 1)
        if variant == "dpo":
            positions *= 2  # policy and reference
        return {
            "loss": loss.item(),
            "positions": positions,
            "logit_rows": positions,
            "note": NOTES[variant],
        }

    return step


NOTES = {
    "cpo": "CPO, not SimPO; uncompiled, because its compiled step raises IndexError: _Map_base::at",
    "cpo_compiled": "CPO, not SimPO; compiled, without the two metrics on which that fails",
    "dpo": "DPO, not SimPO; half of the positions are the reference's, forward only",
}
