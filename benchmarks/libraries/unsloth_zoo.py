"""unsloth_zoo 2026.10.9 (its mlx/ folder): MLXCPOTrainer with loss_type "simpo" and cpo_alpha 0.

On the timed path, imported and called as they are: the batch plan (padding to 32, chosen before
rejected, response rows compacted for the head), the CPO loss on its chunked cross-entropy, its
gradient checkpointing and training patches, its per-layer asynchronous evaluation, mx.compile over
the whole step. The step itself is a closure inside MLXTrainer.train(); `step` below is what that
closure does with one micro-batch per update and no clipping, its fast path (check_unsloth.py
compares it with the real train()). Not timed: logging, callbacks, the learning-rate schedule.

No stand-ins. UNSLOTH_ZOO_DISABLE_GPU_INIT is the package's own switch; without it the package asks
for `unsloth` and a GPU. Without Metal its cross-entropy takes its own fallback in plain MLX.
"""

import os
from collections.abc import Callable
from typing import Any

from adapter_base import Pair, lora_model

os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"
REQUIRES = ("unsloth_zoo==2026.10.9",)


def prepare(spec: dict[str, Any]) -> Callable[[list[Pair]], dict[str, Any]]:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from unsloth_zoo.mlx import preference, trainer, utils

    model = lora_model(spec)
    if spec["checkpoint"]:
        utils.apply_gradient_checkpointing(model)
    utils.acquire_mlx_training_patches()
    model.train()

    objective = preference.resolve_preference_objective(
        "cpo",
        beta=spec["beta"],
        loss_type="simpo",
        simpo_gamma=spec["beta"] * spec["gamma_beta_ratio"],  # absolute here, not a ratio
        cpo_alpha=0.0,
    )
    loss_fn = preference.make_cpo_cce_loss_fn(model, objective)
    # Its _build_optimizer for optim="adamw": bias correction on, state that can be donated.
    optimizer = trainer._donate_optimizer_state(
        optim.AdamW(spec["learning_rate"], weight_decay=0.0, bias_correction=True)
    )
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    mx.eval(state)
    layers = trainer._layer_path_prefix(model)
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    def eager(batch: tuple) -> tuple[mx.array, mx.array]:
        (loss, _, stats), gradient = loss_and_grad(model, *batch)
        optimizer.update(model, gradient)
        return loss, stats

    run = mx.compile(eager, inputs=state, outputs=state) if spec.get("compile", True) else eager
    capacities: dict[tuple, int] = {}

    def collate(batch: list[Pair]) -> tuple:
        """One batch as its plan packs it: (tokens, lengths, normalizers, rows for the head)."""
        rows, schedule = [tokenized(pair) for pair in batch], [tuple(range(len(batch)))]
        plan = preference.FinitePreferenceBatchPlan(
            rows,
            schedule,
            normalizers=preference._window_normalizers(rows, schedule, 1, 1, "cpo"),
            cycle_length=1,
            max_seq_length=1 << 20,
            pad_id=0,
        )
        plan.configure_cce_compaction(loss_fn._unsloth_cce_compaction, kind="cpo")
        # A plan of the whole run has one capacity per width, that of its fullest batch: here the
        # fullest so far, which bounds the compiled shapes in the same way.
        for shape, capacity in plan._cce_capacities.items():
            capacities[shape] = max(capacity, capacities.get(shape, 0))
        plan._cce_capacities.update({s: capacities[s] for s in plan._cce_capacities})
        return plan.prepare_cce_batch(0, plan.materialize(0))

    def tokenized(pair: Pair) -> Any:
        sides = []
        for name in ("chosen", "rejected"):
            ids = tuple(pair[name])
            sides += [ids[: pair["start"]], ids[pair["start"] :]]
        return preference.TokenizedPreferenceRow(*sides)

    def step(batch: list[Pair]) -> dict[str, Any]:
        arrays = collate(batch)
        loss, stats = run(arrays)
        trainer._async_eval_by_layer(model.trainable_parameters(), layers)
        mx.eval(state, loss, stats)
        sequences, width = arrays[0].shape
        positions = sequences * (width - 1)  # it drops the last column before the trunk
        rows = arrays[3].size if len(arrays) > 3 else positions
        return {"loss": loss.item(), "positions": positions, "logit_rows": rows}

    return step
