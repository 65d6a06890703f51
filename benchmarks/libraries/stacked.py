"""The reference that any correct implementation would be, made as good as its kind gets.

One compiled step (mx.compile over loss, gradient and AdamW update): chosen and rejected in one
forward pass of 2B rows, padded on the right to a multiple of `pad_to`, logits of every position in
float32, log-softmax, gather, mask.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from adapter_base import Pair, Spec, Step, lora_model
from mlx_lm.tuner.trainer import grad_checkpoint

REQUIRES = ()


def prepare(spec: Spec) -> Step:
    model = lora_model(spec)
    if spec["checkpoint"]:
        grad_checkpoint(model.layers[0])
    model.train()
    beta, gamma = spec["beta"], spec["beta"] * spec["gamma_beta_ratio"]

    def loss_fn(model: nn.Module, tokens: mx.array, start: mx.array, end: mx.array) -> mx.array:
        logits = model(tokens[:, :-1]).astype(mx.float32)
        logps = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1).squeeze(-1)
        logps = logps - mx.logsumexp(logits, axis=-1)
        position = mx.arange(1, tokens.shape[1])
        loss_mask = (position >= start[:, None]) & (position < end[:, None])
        chosen, rejected = mx.split(mx.where(loss_mask, logps, 0).sum(axis=-1) / (end - start), 2)
        return -nn.log_sigmoid(beta * (chosen - rejected) - gamma).mean()

    optimizer = optim.AdamW(spec["learning_rate"], weight_decay=0.0, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    @partial(mx.compile, inputs=state, outputs=state)
    def run(tokens: mx.array, start: mx.array, end: mx.array) -> mx.array:
        loss, gradient = loss_and_grad(model, tokens, start, end)
        optimizer.update(model, gradient)
        return loss

    def step(batch: list[Pair]) -> dict:
        sides = [pair[name] for name in ("chosen", "rejected") for pair in batch]
        width = -(-max(map(len, sides)) // spec["pad_to"]) * spec["pad_to"]
        tokens = np.zeros((len(sides), width), np.int32)
        for row, ids in zip(tokens, sides, strict=True):
            row[: len(ids)] = ids
        start = mx.array([pair["start"] for pair in batch] * 2)
        loss = run(mx.array(tokens), start, mx.array([len(ids) for ids in sides]))
        mx.eval(state, loss)
        positions = len(sides) * (width - 1)
        return {"loss": loss.item(), "positions": positions, "logit_rows": positions}

    return step
