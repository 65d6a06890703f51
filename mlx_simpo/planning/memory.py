"""Whether a training fits into memory, before it begins, and what to lower if it does not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.nn as nn

from ..config.sections import MemoryConfig
from ..config.simpo_config import SimPOConfig, TrainConfig
from ..data.encode import EncodedPair
from ..device import memory_limit_bytes
from ..engine.choice import Engine
from ..errors import SimPOError
from ..model.adapters import flat_arrays
from .largest import LargestMicroBatch, largest_micro_batch
from .memory_limits import bytes_of, gigabytes
from .peak import Peak, predict_peak

# Computes the gradient of these pairs as one micro-batch with these settings, waits for it and
# forgets it; see `peak.predict_peak`.
ComputeGradient = Callable[[Sequence[EncodedPair], TrainConfig], None]

# More than this share of the limit is worth a warning: the process and other programs need memory
# too, and the peaks of two runs differ by some per cent.
COMFORTABLE_SHARE = 0.9
TOKENS_MULTIPLE = 64  # a suggested train.max_tokens_per_step is one of this
MIN_LENGTH = 32  # tokens; a data.max_length below it is no remedy
SMALLER_MODEL = "use a smaller model, or one that is quantized to 4 bits"


@dataclass(frozen=True)
class MemoryForecast:
    """What a training will need, and why.

    peak, limit: in bytes, of what mx.get_peak_memory counts, and `limit_bytes`.
    weights: bytes of the model. positions, pairs: of the largest micro-batch. source: "file:line"
    of its longest pair. remedy: settings that fit and what they need; empty if none is necessary,
    or none helps. is_limit_set: by memory.limit_gb.
    """

    peak: int
    limit: int
    weights: int
    positions: int
    pairs: int
    source: str
    remedy: str = ""
    is_limit_set: bool = False

    @property
    def figures(self) -> str:
        """The figures, to be part of a sentence."""
        limit = gigabytes(self.limit)
        if self.is_limit_set:
            limit = f"the {limit} of memory.limit_gb"
        size = f"{self.positions} positions in {self.pairs} pair{'s' if self.pairs > 1 else ''}"
        return (
            f"about {gigabytes(self.peak)} of {limit} (the weights take "
            f"{gigabytes(self.weights)}; the largest micro-batch has {size}, the longest of them "
            f"from {self.source})"
        )

    def advice(self) -> str | None:
        """Return a warning if the training will barely fit, None if it will fit comfortably.

        Raises:
            SimPOError: it will not fit.
        """
        if self.peak <= COMFORTABLE_SHARE * self.limit:
            return None
        remedy = self.remedy or f"{SMALLER_MODEL}, or lower lora.rank"
        if self.is_limit_set:
            remedy += ", or raise memory.limit_gb"
        if self.peak > self.limit:
            raise SimPOError(f"not enough memory: training needs {self.figures}; {remedy}")
        return f"memory will be tight: training needs {self.figures}; to be safe, {remedy}"


def limit_bytes(settings: MemoryConfig) -> int:
    """Return what a training may need, in bytes: memory.limit_gb, or what MLX can use here."""
    return memory_limit_bytes() if settings.limit_gb is None else bytes_of(settings.limit_gb)


def check_weights(model: nn.Module, settings: MemoryConfig) -> None:
    """Check that the weights fit into memory, before they are read.

    Raises:
        SimPOError: they do not.
    """
    size, limit = weight_bytes(model), limit_bytes(settings)
    if size > limit:
        is_set = settings.limit_gb is not None
        raise SimPOError(
            f"not enough memory: the model's weights take {gigabytes(size)} of "
            f"{gigabytes(limit)}; {SMALLER_MODEL}{', or raise memory.limit_gb' if is_set else ''}"
        )


def forecast_memory(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    config: SimPOConfig,
    engine: Engine,
    steps: int,
    compute_gradient: ComputeGradient,
) -> MemoryForecast:
    """Forecast the peak memory of ``steps`` optimizer steps on these pairs.

    It takes about as long as 1.5 of the largest micro-batches, and more if they do not fit, because
    the settings of the remedy are tried. The model and MLX's random numbers stay as they are.

    Args:
        model: with LoRA attached.
        compute_gradient: see ComputeGradient and `peak.predict_peak`.
    """
    limit = limit_bytes(config.memory)

    def try_settings(options: TrainConfig) -> _Trial:
        largest = largest_micro_batch(pairs, replace(config, train=options), engine, steps)
        peak = predict_peak(
            lambda some: compute_gradient(some, options),
            model,
            largest.pairs,
            limit,
            accumulates=not largest.is_alone,
        )
        return _Trial(options, largest, peak)

    trial = try_settings(config.train)
    comfortable = COMFORTABLE_SHARE * limit
    fits = trial.peak.total <= comfortable
    return MemoryForecast(
        peak=trial.peak.total,
        limit=limit,
        weights=weight_bytes(model),
        positions=trial.largest.positions,
        pairs=len(trial.largest.pairs),
        source=trial.largest.longest.source,
        is_limit_set=config.memory.limit_gb is not None,
        remedy="" if fits else _remedy(trial, config, comfortable, try_settings),
    )


class _Trial(NamedTuple):
    """Settings, the largest micro-batch with them, and its peak."""

    options: TrainConfig
    largest: LargestMicroBatch
    peak: Peak


def _remedy(
    trial: _Trial, config: SimPOConfig, limit: float, try_settings: Callable[[TrainConfig], _Trial]
) -> str:
    """Return what to set so that training takes ``limit`` bytes at most; empty if nothing helps.

    Smaller micro-batches come first: they change neither the result nor, by much, the time. Then
    gradient checkpointing, which takes time, and shorter pairs last, which are other data.
    """
    while trial.peak.total > limit:
        options, largest = trial.options, trial.largest
        factor = trial.peak.length_within(limit)
        tokens = int(factor * largest.positions) // TOKENS_MULTIPLE * TOKENS_MULTIPLE
        if len(largest.pairs) > 1 and tokens:
            options = replace(options, max_tokens_per_step=tokens)
        elif not options.gradient_checkpointing:
            options = replace(config.train, gradient_checkpointing=True)
        else:
            length = int(factor * largest.longest.length)
            return _sentence(options, config, length) if length >= MIN_LENGTH else ""
        trial = try_settings(options)
    return f"{_sentence(trial.options, config)} (about {gigabytes(trial.peak.total)})"


def _sentence(options: TrainConfig, config: SimPOConfig, max_length: int | None = None) -> str:
    """Return the settings that differ from the run's, as an instruction."""
    settings = []
    if max_length is not None:
        settings.append(f"data.max_length={max_length}")
        if max_length <= config.data.max_prompt_length:
            settings.append(f"data.max_prompt_length={max_length // 2}")
    if options.gradient_checkpointing != config.train.gradient_checkpointing:
        settings.append("train.gradient_checkpointing=true")
    if options.max_tokens_per_step != config.train.max_tokens_per_step:
        settings.append(f"train.max_tokens_per_step={options.max_tokens_per_step}")
    return f"set {', '.join(settings)}"


def weight_bytes(model: nn.Module) -> int:
    """Return the size of all weights of a model, in bytes."""
    return sum(array.nbytes for array in flat_arrays(model.parameters()).values())
