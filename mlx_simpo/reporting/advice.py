"""What a user should be told: what looks wrong and is not, and what is wrong and does not look it.

Each function returns a sentence, or None where there is nothing to say.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mlx_lm.models.cache import RotatingKVCache

from ..config.simpo_config import DataConfig, ObjectiveConfig
from ..data.encode import EncodedPair
from ..data.tokens import column
from ..device import is_gpu
from ..evaluation import Evaluation


def starting_loss(objective: ObjectiveConfig) -> str | None:
    """Users of DPO expect a first loss of ln 2; SimPO's target margin puts it higher."""
    if objective.loss_type != "sigmoid" or not objective.gamma_beta_ratio:
        return None
    gamma = objective.beta * objective.gamma_beta_ratio
    # −(1 − ε) log σ(−gamma) − ε log σ(gamma), for any gamma
    loss = math.log1p(math.exp(-gamma)) + (1 - objective.label_smoothing) * gamma
    return (
        f"a model without a preference has a loss of {loss:.2f} here, not 0.69: the "
        f"target margin is gamma = beta × gamma_beta_ratio = {gamma:g}"
    )


def truncation(pairs: Sequence[EncodedPair], data: DataConfig) -> str | None:
    """What data.max_length cost."""
    of_prompts, of_answers = column(pairs, "cut_prompt"), column(pairs, "cut_response")
    prompts, answers = np.count_nonzero(of_prompts), np.count_nonzero(of_answers)
    if not prompts and not answers:
        return None
    lost = of_prompts.sum(dtype=np.int64) + of_answers.sum(dtype=np.int64)
    return (
        f"longer than data.max_length={data.max_length}: prompts of {prompts} pairs cut on the "
        f"left, answers of {answers} pairs on the right, {lost} tokens in all"
    )


def slow_on_cpu(dtype: str, quantized: bool) -> str | None:
    """On a CPU only float32 products are fast."""
    if is_gpu():
        return None
    if quantized:
        return (
            "the model is quantized, which is tens of times slower on a CPU than a float32 model; "
            "use one that is not, if there is memory for it"
        )
    if dtype == "float32":
        return None
    return f"the model computes in {dtype}, which is slow on a CPU; dtype=float32 is much faster"


def ignored_window(
    model_config: Mapping[str, Any], caches: Sequence[Any], max_length: int
) -> str | None:
    """mlx-lm 0.32.2 runs Mistral, Gemma 2, Phi-3 and others without their sliding windows.

    Args:
        model_config: config.json's content. caches: what mlx-lm makes for the model; a model that
            has its window has rotating ones.
    """
    window = model_config.get("sliding_window")
    used = model_config.get("use_sliding_window", True)  # Qwen 2 names one that it does not use
    if not window or not used or max_length <= window:
        return None
    if any(isinstance(cache, RotatingKVCache) for cache in caches):
        return None
    return (
        f"the model has a sliding window of {window} tokens, which mlx-lm leaves out; beyond it "
        f"(data.max_length is {max_length}) its answers are scored as by another model: set "
        f"data.max_length={window}"
    )


def slow_blas() -> str | None:
    """MLX's own BLAS for Linux is a reference implementation."""
    from .. import blas  # here, so that `python -m mlx_simpo.blas` can run it as a program

    reason = None if is_gpu() else blas.missing()
    return None if reason is None else f"no OpenBLAS, this will be slow: {reason}"


def collapse(before: Evaluation, after: Evaluation) -> str | None:
    """The chosen answers' likelihood falls a little in every SimPO run; a fall of more than a nat a
    token is how a run that degenerates into repetition looks."""
    fall = before.metrics["logps/chosen"] - after.metrics["logps/chosen"]
    if fall <= 1.0:
        return None
    return (
        f"the chosen answers have become {fall:.1f} nats a token less likely; read some answers of "
        "the model, and lower train.learning_rate if they repeat themselves"
    )
