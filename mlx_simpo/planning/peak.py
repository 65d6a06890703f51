"""The peak memory of training on a micro-batch, from runs that need less.

Every layer that trains saves the same arrays for the backward pass, and whatever else is in memory
(the head's logits, one layer's temporaries, the weights) is there once. So the peak is a straight
line over the number of layers that train, whatever the engine, the lengths, gradient checkpointing
or mx.compile make of one layer. The micro-batch runs twice, once with the gradient of the last
layer alone and once with that of the last half; the line through the two peaks leads to all of
them (benchmarks/memory_forecast.py compares it with trainings of SmolLM2-135M).

A micro-batch of long pairs may need too much even so. It runs with shortened pairs first, and the
next length only if it fits in case that memory has grown with the square of the length so far.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..data.encode import EncodedPair, TokenizedSequence
from ..engine.stopwatch import memory_in_use, undisturbed
from ..model.adapters import flat_arrays

# Computes the gradient of these pairs as one micro-batch, waits for it and forgets it.
RunMicroBatch = Callable[[Sequence[EncodedPair]], None]

# Factors of the pairs' lengths. The first two run unasked: they are needed to see the growth.
LENGTHS = (1 / 8, 1 / 4, 1 / 2, 1.0)
# Beside the model, in copies of the weights that train: AdamW's two moments at all times; and while
# the optimizer updates them, the old and the new ones, the gradient and the new weights, with a
# quarter of a copy for what is being computed (measured, with weights of 16 to 63 MB).
COPIES_AT_ALL_TIMES = 2
COPIES_IN_UPDATE = 6.25


@dataclass(frozen=True)
class Peak:
    """What training on a micro-batch needs, in bytes.

    resident: weights, optimizer state, and a gradient that waits for that of another micro-batch.
    update: peak of the optimizer's update. lengths, activations: factors of the pairs' lengths, and
    what the gradient of the micro-batch takes at each. The last length is 1 unless that could not
    be run.
    """

    resident: int
    update: int
    lengths: tuple[float, ...]
    activations: tuple[float, ...]

    @property
    def total(self) -> int:
        """The peak with the pairs as they are; extrapolated if the last length is less than 1."""
        activations = extrapolate(self.activations, 1 / self.lengths[-1])
        return max(self.update, round(self.resident + activations))

    def length_within(self, limit: float) -> float:
        """Return the factor of the pairs' lengths, from 0 to 1, at which the peak is ``limit``.

        Memory grows faster than lengths do, so that the chord between two of them is never too low.
        """
        available = 0 if self.update > limit else limit - self.resident
        if available <= self.activations[0]:  # in proportion
            return max(0.0, self.lengths[0] * available / self.activations[0])
        rising = np.maximum.accumulate(self.activations)
        return float(np.interp(available, rising, self.lengths))


def predict_peak(
    run: RunMicroBatch,
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    limit: float,
    *,
    accumulates: bool,
) -> Peak:
    """Predict the peak memory of training on a micro-batch of these pairs.

    The model, the random numbers and MLX's peak are afterwards as they were, or 0.

    Args:
        run: computes the gradient of all trainable weights for the pairs as one micro-batch in
            training, waits for it and forgets it. It must not reuse what mx.compile has traced
            before, because fewer layers train than in the training itself.
        model: with LoRA attached; evaluated here, if its weights have not been read yet.
        limit: bytes that may be in memory; no micro-batch runs that is expected to need more.
        accumulates: whether a step has several micro-batches, whose gradients are added.
    """
    mx.eval(model.parameters())
    trainable = sum(a.nbytes for a in flat_arrays(model.trainable_parameters()).values())
    lengths: list[float] = []
    few_layers: list[float] = []  # activations with a gradient of some layers, measured
    all_layers: list[float] = []
    with undisturbed(model):
        model.train()
        model_bytes = memory_in_use()
        resident = model_bytes + (COPIES_AT_ALL_TIMES + accumulates) * trainable
        for length in LENGTHS:
            if len(lengths) > 1:
                room = limit - resident
                if extrapolate(few_layers, length / lengths[-1], power=2) > room:
                    break
                if length < 1 and extrapolate(few_layers, 1 / lengths[-1], power=2) <= room:
                    continue  # there is room for the pairs as they are
            some, every = _activations(run, model, [shorten(pair, length) for pair in pairs])
            lengths.append(length)
            few_layers.append(some)
            all_layers.append(every)
    update = model_bytes + round(COPIES_IN_UPDATE * trainable)
    return Peak(resident, update, tuple(lengths), tuple(all_layers))


def extrapolate(values: Sequence[float], factor: float, power: float | None = None) -> float:
    """Continue values at lengths that double each time, up to ``factor`` times the last length.

    They grow by a power of the length, of 1 to 2.

    Args:
        power: of the growth, if there are two values only; default: as if they began at 0. Three
            show it by themselves.
    """
    if factor == 1:
        return values[-1]
    before, last = values[-2:]
    if len(values) > 2:
        power = _doublings(last - before, before - values[-3])
    elif power is None:
        power = _doublings(last, before)
    return last + max(0.0, last - before) * (factor**power - 1) / (1 - 0.5**power)


def _doublings(second: float, first: float) -> float:
    """Return log2 of the ratio, at least 1 and at most 2."""
    return float(np.clip(np.log2(max(second, 1.0) / max(first, 1.0)), 1, 2))


def _activations(
    run: RunMicroBatch, model: nn.Module, pairs: Sequence[EncodedPair]
) -> tuple[float, float]:
    """Return the bytes that the gradient of a micro-batch takes with some of the layers, and what
    the line through two such numbers of layers gives for all of them."""
    layers: Any = model.layers
    adapted = [layer for layer in layers if flat_arrays(layer.trainable_parameters())]
    few, some = min(1, len(adapted)), min(len(adapted), max(2, len(adapted) // 2))
    # The last layers, as with lora.num_layers: no gradient reaches the layers before them.
    with _frozen(adapted[: len(adapted) - some]):
        upper = _measure(run, pairs)
    if some == few:
        return upper, upper
    with _frozen(adapted[: len(adapted) - few]):
        lower = _measure(run, pairs)
    per_layer = max(0, upper - lower) / (some - few)
    return upper, upper + per_layer * (len(adapted) - some)


def _measure(run: RunMicroBatch, pairs: Sequence[EncodedPair]) -> int:
    """Return the bytes that a run takes at its peak, beyond those in use before."""
    mx.clear_cache()  # a buffer of it may be larger than the array that takes it, and counts whole
    before = memory_in_use()
    mx.reset_peak_memory()
    run(pairs)
    return mx.get_peak_memory() - before


@contextmanager
def _frozen(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, no weight of these layers is trainable."""
    modules = [module for layer in layers for module in layer.modules()]
    before = [set(module._no_grad) for module in modules]
    for layer in layers:
        layer.freeze()
    try:
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            module._no_grad = names


def shorten(pair: EncodedPair, factor: float) -> EncodedPair:
    """Return a pair with the first part of its prompt, and of each response."""
    sequences = []
    for tokens, start in (pair.chosen, pair.rejected):
        new_start = max(1, round(start * factor))
        num_tokens = max(1, round((len(tokens) - start) * factor))
        parts = [tokens[:new_start], tokens[start : start + num_tokens]]
        sequences.append(TokenizedSequence(np.concatenate(parts), new_start))
    return EncodedPair(*sequences, index=pair.index, source=pair.source)
