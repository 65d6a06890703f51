"""mlxsmith 0.1.9, `mlxsmith pref` with loss_type simpo.

The library's own on the timed path: MlxLMBackend (value_and_grad, optimizer, apply_grads, which
evaluates), preference_loss, tree_add and tree_scale. Its step is one pair: it has no batches, no
padding, no mx.compile and no gradient checkpointing. A batch is what it calls grad_accum: the
gradients of so many pairs are added up unevaluated and applied once.

Stand-ins: the loop of run_pref (it draws the pairs, tokenizes them and writes logs), and mlx-lm's
linear_to_lora_layers instead of its own LoRA settings, so that all have the same layers. Clipping,
which is on unless max_grad_norm is 0, is off. AdamW without bias correction, as mlx's default.

Its margin (pref.delta) is the ratio γ/β: beta · (difference − margin). The loss is
log(1 + exp(−x)) as written, infinite below x ≈ −88.
"""

from functools import partial
from typing import Any

import mlx.core as mx
from adapter_base import Pair, Spec, Step, add_lora

# The last two are for its settings module, which importing the losses brings in.
REQUIRES = ("mlxsmith==0.1.9", "pydantic-settings==2.16.3", "python-dotenv==1.2.4")


def prepare(spec: Spec) -> Step:
    from mlxsmith.llm.registry import get_llm_backend
    from mlxsmith.sdk.losses import preference_loss
    from mlxsmith.util import tree_add, tree_scale

    backend = get_llm_backend("mlx-lm")
    backend.load(spec["model"])
    add_lora(backend.model, spec)
    optimizer, _ = backend.optimizer_and_params(
        lr=spec["learning_rate"], weight_decay=0.0, optimizer="adamw"
    )

    def loss_of(pair: Pair, _model: Any) -> mx.array:
        return preference_loss(
            backend,
            pair["chosen"],
            pair["rejected"],
            prompt_len_chosen=pair["start"],
            prompt_len_rejected=pair["start"],
            algo="simpo",
            beta=spec["beta"],
            delta=spec["gamma_beta_ratio"],
        )

    def step(batch: list[Pair]) -> dict[str, Any]:
        gradients, losses = None, []
        for pair in batch:
            loss, new = backend.value_and_grad(partial(loss_of, pair))
            gradients = tree_add(gradients, new)
            losses.append(loss)
        backend.apply_grads(optimizer, tree_scale(gradients, 1.0 / len(batch)))
        # It runs the last token too, whose logits it drops.
        positions = sum(len(pair["chosen"]) + len(pair["rejected"]) for pair in batch)
        return {
            "loss": sum(loss.item() for loss in losses) / len(losses),
            "positions": positions,
            "logit_rows": positions,
            "note": NOTE + (CHECKPOINT if spec["checkpoint"] else ""),
        }

    return step


NOTE = "one pair at a time, not compiled, gradients of all pairs evaluated together"
CHECKPOINT = "; it has no gradient checkpointing, so this ran without"
