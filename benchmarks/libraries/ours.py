"""mlx_simpo as installed here: its own step, from encoded pairs to the AdamW update.

spec["engine"]: shared_prefix (default) or reference. spec["max_tokens_per_step"]: as in a
configuration; None is the default.
"""

from contextlib import nullcontext
from dataclasses import asdict

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from adapter_base import Pair, Spec, Step, lora_model
from mlx.utils import tree_flatten

from mlx_simpo.config.simpo_config import ObjectiveConfig, TrainConfig
from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.engine.choice import choose_engine
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
from mlx_simpo.training.step import GradientFunction, collate_step, step_gradients

REQUIRES = ()


def prepare(spec: Spec) -> Step:
    model: nn.Module = lora_model(spec)
    model.train()
    engine = choose_engine(spec.get("engine", "shared_prefix"), model)
    objective = ObjectiveConfig(beta=spec["beta"], gamma_beta_ratio=spec["gamma_beta_ratio"])
    gradients_of = GradientFunction(model, asdict(objective), engine, compiled=engine.compiled)
    optimizer = optim.AdamW(spec["learning_rate"], weight_decay=0.0, bias_correction=True)
    optimizer.init(model.trainable_parameters())

    def step(batch: list[Pair]) -> dict:
        pairs = [encoded(pair) for pair in batch]
        options = TrainConfig(
            engine=engine.name,  # type: ignore[arg-type]
            batch_size=len(pairs),
            max_tokens_per_step=spec.get("max_tokens_per_step"),
        )
        batches = collate_step(pairs, engine, options)
        with gradient_checkpointing(model) if spec["checkpoint"] else nullcontext():
            parts, gradients = step_gradients(gradients_of, batches)
        optimizer.update(model, gradients)
        mx.eval(parts, model.trainable_parameters(), optimizer.state)
        loss = np.concatenate([np.array(part["loss"]) for part in parts]).mean()
        result = {
            "loss": float(loss),
            "positions": batches.positions,
            "logit_rows": sum(batch.head_positions for batch in batches.micro_batches),
            "micro_batches": len(batches.micro_batches),
            "traces": gradients_of.traces,
        }
        if "gradient" in spec:  # for a comparison of two engines, outside of any timing
            np.savez(spec["gradient"], **{k: np.array(g) for k, g in tree_flatten(gradients)})
        return result

    return step


def encoded(pair: Pair) -> EncodedPair:
    sides = (np.array(pair[name], np.int32) for name in ("chosen", "rejected"))
    return EncodedPair(*(TokenizedSequence(tokens, pair["start"]) for tokens in sides))
