"""Advice to users: what looks wrong but is not, and what is wrong but does not look wrong.

Each function returns one message, or None if there is nothing to say (see `Display`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import RotatingKVCache

from ..config.simpo_config import DataConfig, ObjectiveConfig
from ..data.encode import EncodedPair
from ..data.tokens import column
from ..device import is_gpu
from ..evaluation import Evaluation, has_collapsed, is_worse
from ..model.loading import LoadedModel
from ..model.record import differences_from_training
from ..objectives import preference_losses

# The chosen responses become a little less likely in every SimPO run; a fall of more than this is
# typical of a run that degenerates into repetition.
COLLAPSE_NATS = 1.0
UNIFORM_TOLERANCE = 0.1  # nats per token around the uniform distribution's log-probability
# A higher beta reaches the target margin with smaller changes of the log-probabilities; the SFT
# term holds the chosen responses up.
COLLAPSE_REMEDY = (
    "lower train.learning_rate, raise objective.beta, or set objective.sft_weight above 0"
)


def starting_loss(objective: ObjectiveConfig) -> str | None:
    """Explain the first loss to users of DPO, who expect ln 2; SimPO's target margin raises it."""
    if objective.loss_type != "sigmoid" or not objective.gamma_beta_ratio:
        return None
    gamma = objective.beta * objective.gamma_beta_ratio
    # Equally likely responses have a margin of 0, and so z = −gamma (see `objectives`).
    loss = preference_losses(mx.array(-gamma), objective.loss_type, objective.label_smoothing)
    return (
        f"a model without a preference has a loss of {loss.item():.2f} here, not 0.69: the "
        f"target margin is gamma = beta × gamma_beta_ratio = {gamma:g}"
    )


def truncation(pairs: Sequence[EncodedPair], data: DataConfig) -> str | None:
    """Count the pairs and tokens that were cut to data.max_length."""
    cut_prompt, cut_response = column(pairs, "cut_prompt"), column(pairs, "cut_response")
    prompts, responses = np.count_nonzero(cut_prompt), np.count_nonzero(cut_response)
    if not prompts and not responses:
        return None
    total = cut_prompt.sum(dtype=np.int64) + cut_response.sum(dtype=np.int64)
    return (
        f"longer than data.max_length={data.max_length}: prompts cut on the left in {prompts} "
        f"pairs, responses cut on the right in {responses} pairs, {total} tokens in all"
    )


def slow_on_cpu(dtype: str, quantized: bool) -> str | None:
    """Warn about models that MLX computes slowly on a CPU, where only float32 products are fast."""
    if is_gpu():
        return None
    if quantized:
        return (
            "the model is quantized, which on a CPU is tens of times slower than float32; use a "
            "model that is not quantized, if it fits into memory"
        )
    if dtype == "float32":
        return None
    return f"the model computes in {dtype}, which is slow on a CPU; set dtype=float32"


def ignored_window(
    model_config: Mapping[str, Any], caches: Sequence[Any], max_length: int
) -> str | None:
    """Warn about sliding windows that mlx-lm ignores: 0.32.2 does for Mistral, Gemma 2, Phi-3, …

    Args:
        model_config: the content of config.json. caches: the model's, from mlx-lm's
            make_prompt_cache; a model that is run with its window has rotating ones.
    """
    window = model_config.get("sliding_window")
    is_used = model_config.get("use_sliding_window", True)  # Qwen 2 sets one that it does not use
    if not window or not is_used or max_length <= window:
        return None
    if any(isinstance(cache, RotatingKVCache) for cache in caches):
        return None
    return (
        f"the model has a sliding window of {window} tokens, which mlx-lm ignores; the "
        f"log-probabilities of longer sequences (data.max_length is {max_length}) differ from the "
        f"original model's: set data.max_length={window}"
    )


def slow_blas() -> str | None:
    """Warn if MLX runs on a CPU without OpenBLAS: its own BLAS for Linux is a reference one."""
    from .. import blas  # here, so that `python -m mlx_simpo.blas` can run it as a program

    reason = None if is_gpu() else blas.missing()
    return None if reason is None else f"MLX runs without OpenBLAS, which is slow: {reason}"


def adapter_mismatch(
    record: dict[str, Any],
    loaded: LoadedModel,
    template: str | None = None,
    data: DataConfig | None = None,
) -> str | None:
    """Warn if a model differs from the one that an adapter was trained on.

    Args:
        record: the adapter's `model.record.training_record`. template: the text of the chat
            template in use; None: not compared. data: the settings in use, of which the template's
            arguments are compared.
    """
    arguments = None if data is None else data.template_args or {}
    differences = differences_from_training(record, loaded, template, arguments)
    return f"the adapter might not fit: {'; '.join(differences)}" if differences else None


def collapse(before: Evaluation, after: Evaluation) -> str | None:
    """Warn if the chosen responses have become much less likely, by more than COLLAPSE_NATS."""
    fall = before.metrics["logps/chosen"] - after.metrics["logps/chosen"]
    if fall <= COLLAPSE_NATS:
        return None
    return (
        f"the chosen responses have become {fall:.1f} nats per token less likely; read some "
        f"responses of the model, and if they repeat themselves, {COLLAPSE_REMEDY}"
    )


def ended_worse(before: Evaluation, after: Evaluation, vocab_size: int) -> str | None:
    """Explain that a run ended worse than it began; None if it did not.

    Args:
        vocab_size: number of the model's logits.
    """
    if not is_worse(before, after) and not has_collapsed(before, after, vocab_size):
        return None
    formats = {"loss": ".2f", "logps/chosen": ".2f", "rewards/accuracies": ".1%"}
    figures = ", ".join(
        f"{name} from {before.metrics[name]:{digits}} to {after.metrics[name]:{digits}}"
        for name, digits in formats.items()
    )
    return (
        f"the run ended worse than it began: {figures}{_lost_knowledge(after, vocab_size)}; "
        f"{COLLAPSE_REMEDY}"
    )


def _lost_knowledge(evaluation: Evaluation, vocab_size: int) -> str:
    """Say how a destroyed model compares with the uniform distribution; or an empty string."""
    uniform = -math.log(vocab_size)
    chosen, rejected = (evaluation.metrics[f"logps/{name}"] for name in ("chosen", "rejected"))
    if max(abs(chosen - uniform), abs(rejected - uniform)) < UNIFORM_TOLERANCE:
        return (
            f"; the model finds every token equally likely (-ln {vocab_size} = {uniform:.2f}): its "
            "weights are destroyed"
        )
    if chosen < uniform:
        return (
            "; the model finds the chosen responses less likely than random tokens, at "
            f"{uniform:.2f}"
        )
    return ""
