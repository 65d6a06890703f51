"""One optimizer step of LoRA against PEFT and torch.optim, from the same A and B."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from parity import oracle
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mlx_simpo import LoRAConfig, ObjectiveConfig, SimPOConfig, TrainConfig, load_pairs, train_steps
from mlx_simpo.config.simpo_config import DataConfig
from mlx_simpo.data.encode import EncodedPair, Encoder, encode_pairs
from mlx_simpo.model.loading import load_model
from mlx_simpo.model.lora import attach_lora

# PEFT 0.21 reads a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

BETA, RATIO = 2.0, 0.5
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_name(name: str) -> str:
    """Return PEFT's name of a LoRA matrix of ours."""
    path, _, matrix = name.rpartition(".")
    return f"base_model.model.{path}.{'lora_A' if matrix == 'lora_a' else 'lora_B'}.default.weight"


def torch_step(
    folder: Path, start: dict[str, np.ndarray], pairs: list[EncodedPair], config: SimPOConfig
) -> tuple[float, float, dict[str, np.ndarray]]:
    """Return (loss, gradient norm, updated A and B) of one step of torch's AdamW on PEFT's model,
    with gradients clipped to a norm of 1."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=NAMES, use_rslora=config.lora.rslora)
    model = get_peft_model(base, settings)
    parameters = dict(model.named_parameters())
    trained = {name: parameters[peft_name(name)] for name in start}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(torch.tensor(start[name].T))
    rows = [[(s.tokens.tolist(), s.score_start) for s in (p.chosen, p.rejected)] for p in pairs]
    logps = oracle.average_logps(model, [c for c, _ in rows] + [r for _, r in rows], len(rows))
    loss = oracle.simpo_loss(logps[: len(rows)], logps[len(rows) :], BETA, RATIO)
    loss.backward()
    optimizer = torch.optim.AdamW(
        list(trained.values()),
        lr=config.train.learning_rate,
        eps=config.train.adam_epsilon,
        weight_decay=0.0,
    )
    norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
    optimizer.step()
    return loss.item(), norm.item(), {n: p.detach().numpy().T for n, p in trained.items()}


@pytest.mark.parametrize(
    ("rate", "epsilon", "rslora"),
    [
        # Adam with its usual epsilon. Its first step is ± the rate wherever a gradient is above
        # epsilon, even where the gradient is float32 noise around zero.
        (2e-5, 1e-8, False),
        (2e-5, 1e-8, True),
        # An epsilon above the gradients makes the step proportional to them: every digit counts.
        (1e-1, 1e-2, False),
    ],
)
def test_one_step_is_that_of_torch(
    smollm2_folder: Path, rate: float, epsilon: float, rslora: bool
) -> None:
    """The updated weights agree within a relative 1e-4; only we use micro-batches."""
    loaded = load_model(str(smollm2_folder))
    config = SimPOConfig(
        model="smollm2",
        objective=ObjectiveConfig(beta=BETA, gamma_beta_ratio=RATIO),
        lora=LoRAConfig(rank=8, lora_alpha=16.0, rslora=rslora),
        train=TrainConfig(
            batch_size=2,
            gradient_accumulation_steps=3,
            steps=1,
            learning_rate=rate,
            adam_epsilon=epsilon,
            warmup_ratio=0.0,
            schedule="constant",
        ),
    )
    attach_lora(loaded.model, config.lora, seed=3)
    rng = np.random.default_rng(0)
    start = {}
    for name, value in tree_flatten(loaded.model.trainable_parameters()):
        # B is zero in a fresh adapter, and A would then have no gradient.
        fresh = rng.normal(0, 0.01, value.shape) if name.endswith("lora_b") else np.array(value)
        start[name] = fresh.astype(np.float32)
    loaded.model.load_weights([(n, mx.array(w)) for n, w in start.items()], strict=False)

    examples = Path(__file__).parents[2] / "examples" / "train.jsonl"
    encoder = Encoder(loaded.tokenizer, DataConfig())
    pairs, _ = encode_pairs(encoder, load_pairs(str(examples)).pairs[:5])
    step = next(train_steps(loaded.model, pairs, config))
    loss, norm, expected = torch_step(smollm2_folder, start, pairs, config)

    assert step.metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert step.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    ours = {n: np.array(p) for n, p in tree_flatten(loaded.model.trainable_parameters())}

    def relative(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    errors = {name: relative(ours[name], w) for name, w in expected.items()}
    updates = {n: relative(ours[n] - start[n], w - start[n]) for n, w in expected.items()}
    print(
        json.dumps(
            {
                "rate": rate,
                "epsilon": epsilon,
                "rslora": rslora,
                "loss_error": abs(step.metrics["loss"] - loss),
                "max_relative_error_of_weights": max(errors.values()),
                "max_relative_error_of_updates": max(updates.values()),
            }
        )
    )
    assert min(np.linalg.norm(ours[n] - start[n]) for n in start) > 0  # every matrix has moved
    assert max(errors.values()) <= 1e-4, max(errors, key=lambda name: errors[name])
    if epsilon > 1e-4:
        assert max(updates.values()) <= 1e-3, max(updates, key=lambda name: updates[name])


def test_schedules_are_those_of_transformers(smollm2_folder: Path) -> None:
    """At every step of the schedule."""
    import transformers

    from mlx_simpo.training.optimizer import learning_rate_schedule

    makers: dict[str, Any] = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
        "constant": lambda o, warmup, _: transformers.get_constant_schedule_with_warmup(o, warmup),
    }
    for name, make in makers.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        scheduler = make(optimizer, 4, 40)
        ours = learning_rate_schedule(
            TrainConfig(schedule=name, learning_rate=1e-3),  # type: ignore[arg-type]
            40,
        )
        for step in range(40):
            assert float(ours(mx.array(step, mx.uint64))) == pytest.approx(
                scheduler.get_last_lr()[0], rel=1e-5, abs=1e-10
            )
            optimizer.step()
            scheduler.step()
