"""mlx-tune 0.6.0, SimPOTrainer with native training.

The library's own on the timed path: the step that SimPOTrainer.train() builds (its simpo_loss,
value_and_grad, AdamW update, and mx.compile through its compiled_step when the batch has two pairs
or more), _tokenize_pair, _pad, bucket_length, and what its loop evaluates.

Stand-ins: the package's __init__ (it imports speech and vision models, which need more packages),
the tokenizer (pairs are tokens already), the model wrapper, and the loop's few lines that stack a
batch. Settings the trainer does not offer are changed on its optimizer: no weight decay
(its own: 0.01) and a cosine so long that the rate is constant. No clipping, as it has none; AdamW
without bias correction, as mlx's default. gradient_accumulation_steps of its configuration is read
by nothing, so a batch is one step. A batch of another size builds a new step and optimizer.

At two pairs or more it sums over the whole sequence, prompt included, and divides by its length. At
one pair the sum starts where chosen and rejected first differ and the divisor is prompt + response;
with gradient checkpointing its gradient is then wrong as well (the recomputed layers meet a cache
that has moved on).
Its margin is the ratio γ/β: beta · (difference − gamma).
"""

import contextlib
import importlib.util
import io
import os
import sys
import tempfile
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
from adapter_base import Pair, Reached, Spec, Step, locals_of, lora_model

REQUIRES = ("mlx-tune==0.6.0",)


def import_trainers() -> ModuleType:
    """mlx_tune.rl_trainers without mlx_tune/__init__.py."""
    if "mlx_tune" not in sys.modules:
        spec_of_package = importlib.util.find_spec("mlx_tune")
        assert spec_of_package is not None
        package = ModuleType("mlx_tune")
        package.__path__ = list(spec_of_package.submodule_search_locations or [])
        sys.modules["mlx_tune"] = package
    return importlib.import_module("mlx_tune.rl_trainers")


class TokensAsText:
    """A tokenizer for which text is a list of tokens. The loop asks for pad_token_id just before
    it makes its first batch."""

    encode = staticmethod(list)

    @property
    def pad_token_id(self) -> int:
        raise Reached


def build_loop(model: Any, spec: Spec, pairs: int) -> tuple[Any, dict[str, Any]]:
    """The trainer for batches of so many pairs, and the local variables of its train()."""
    trainers = import_trainers()
    wrapper = SimpleNamespace(
        model=model, lora_config={"use_gradient_checkpointing": spec["checkpoint"]}
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = trainers.SimPOConfig(
            beta=spec["beta"],
            gamma=spec["gamma_beta_ratio"],
            learning_rate=spec["learning_rate"],
            per_device_train_batch_size=pairs,
            max_steps=10**9,
            max_seq_length=10**9,
            output_dir=folder,
        )
        anything = [{"prompt": [1], "chosen": [2], "rejected": [3]}]
        trainer = trainers.SimPOTrainer(wrapper, anything, TokensAsText(), config)
        loop = locals_of(trainers.SimPOTrainer.train, trainer)
    loop["optimizer"].weight_decay = 0.0  # read at each update, so before the step is traced
    return trainer, loop


def prepare(spec: Spec) -> Step:
    # Its lengths are multiples of 64 unless told otherwise; finer ones are in its favour.
    os.environ["MLX_TUNE_BUCKET_SIZE"] = str(spec["pad_to"])
    model = lora_model(spec)
    built: dict[int, tuple[Any, dict[str, Any]]] = {}

    def step(batch: list[Pair]) -> dict[str, Any]:
        if len(batch) not in built:
            built[len(batch)] = build_loop(model, spec, len(batch))
        trainer, loop = built[len(batch)]
        samples = [
            trainer._tokenize_pair({"prompt": [], "chosen": p["chosen"], "rejected": p["rejected"]})
            for p in batch
        ]
        longest = max(max(s["chosen_length"], s["rejected_length"]) for s in samples)
        length = loop["bucket_length"](longest)
        arrays = (
            *(mx.array([trainer._pad(s[k], length) for s in samples]) for k in IDS),
            *(mx.array([s[k] for s in samples]) for k in LENGTHS),
        )
        positions = logit_rows = 2 * len(batch) * (length - 1)
        if loop["use_shared_prefix"]:
            prompt = samples[0]["prompt_length"]
            lengths = [samples[0][k] for k in LENGTHS]
            if 2 <= prompt < min(lengths):
                # The logits of the prompt's own pass are never asked for, so MLX skips them.
                logit_rows = sum(lengths) - 2 * prompt
                positions = prompt - 1 + logit_rows
            loss = loop["step_fn"](arrays, prompt, *lengths)
        else:
            loss = loop["step_fn"](arrays)
        mx.eval(loop["state"], loss)
        return {"loss": loss.item(), "positions": positions, "logit_rows": logit_rows, "note": NOTE}

    return step


IDS = ("chosen_ids", "rejected_ids")
LENGTHS = ("chosen_length", "rejected_length")
NOTE = (
    "two pairs or more: sums and lengths include the prompt; one pair: the length does, compile "
    "bypassed, prompt computed once"
)
