"""mlx-train-perf 0.9.1: logit-free linear cross-entropy for mlx-lm models (supervised training).

It has no preference loss and no trainer of its own: its loss goes into mlx-lm's compiled training
step. On the timed path, the package's own: split_model (trunk and head) and linear_cross_entropy.
Written here around them: padding to `pad_to`, the SimPO loss of its per-token values, mlx-lm's
step (mx.compile over the whole of it). The package's SFT loss sends every position through the
head; linear_cross_entropy takes rows, so only the scored ones are sent (padded to `pad_to`).

impl="chunked", its path in plain MLX: its default refuses MLX 0.32.4 (_compat.py lists 0.31.2 and
0.32.0), and is a Metal kernel that no CPU can run. No stand-ins.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from adapter_base import Pair, lora_model

REQUIRES = ("mlx-train-perf==0.9.1",)


def prepare(spec: dict[str, Any]) -> Callable[[list[Pair]], dict[str, Any]]:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import grad_checkpoint
    from mlx_train_perf import linear_cross_entropy
    from mlx_train_perf.adapters.mlx_lm import split_model

    model = lora_model(spec)
    if spec["checkpoint"]:
        grad_checkpoint(model.layers[0])
    model.train()
    beta, gamma = spec["beta"], spec["beta"] * spec["gamma_beta_ratio"]

    def loss_fn(model: nn.Module, tokens: mx.array, rows: mx.array, weights: mx.array) -> mx.array:
        """weights [2B, rows]: one over the number of scored tokens at a sequence's own rows."""
        trunk, head = split_model(model)
        hidden = trunk(tokens[:, :-1])
        hidden = hidden.reshape(-1, hidden.shape[-1])[rows]
        nll = linear_cross_entropy(
            hidden,
            head,
            tokens[:, 1:].reshape(-1)[rows],
            impl=spec.get("impl", "chunked"),
            reduction="none",
            validate_targets=False,  # as its own loss does: the check cannot be compiled
        )
        chosen, rejected = mx.split(-(weights @ nll), 2)
        return -nn.log_sigmoid(beta * (chosen - rejected) - gamma).mean()

    optimizer = optim.AdamW(spec["learning_rate"], weight_decay=0.0, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    mx.eval(state)
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    def eager(tokens: mx.array, rows: mx.array, weights: mx.array) -> mx.array:
        loss, gradient = loss_and_grad(model, tokens, rows, weights)
        optimizer.update(model, gradient)
        return loss

    run = mx.compile(eager, inputs=state, outputs=state) if spec.get("compile", True) else eager
    multiple = spec["pad_to"]

    def step(batch: list[Pair]) -> dict[str, Any]:
        sides = [pair[name] for name in ("chosen", "rejected") for pair in batch]
        starts = [pair["start"] for pair in batch] * 2
        width = -(-(max(map(len, sides)) - 1) // multiple) * multiple
        tokens = np.zeros((len(sides), width + 1), np.int32)
        counts = [len(ids) - start for ids, start in zip(sides, starts, strict=True)]
        size = -(-sum(counts) // multiple) * multiple
        rows, weights, filled = np.zeros(size, np.int32), np.zeros((len(sides), size)), 0
        for i, (ids, start, count) in enumerate(zip(sides, starts, counts, strict=True)):
            tokens[i, : len(ids)] = ids
            rows[filled : filled + count] = i * width + np.arange(start - 1, len(ids) - 1)
            weights[i, filled : filled + count] = 1 / count
            filled += count
        loss = run(mx.array(tokens), mx.array(rows), mx.array(weights.astype(np.float32)))
        mx.eval(state, loss)
        return {"loss": loss.item(), "positions": len(sides) * width, "logit_rows": size}

    return step
