"""Measures what `figures.Figures` says, on the model and the machine that a run has.

A warm-up, then parts of a training step as the engine runs them: attention, micro-batches of two
or three sizes, chunks of the head. Each is timed only if it is expected to fit into what is left of
the budget, so that a small machine with a large model is not kept waiting.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..config.simpo_config import SimPOConfig
from ..device import memory_limit_bytes
from ..kernels.choice import choose_implementation
from .attention_timing import attention_evidence, best_attention, time_attention
from .choice import Engine, shared_prefix_engine
from .collate_shared import collate_shared
from .figures import Figures, default_figures
from .gradient_checkpointing import gradient_checkpointing
from .head import resolve_head
from .head_timing import HeadCosts, time_head
from .pass_timing import (
    SIZES,
    SMALL,
    PassCosts,
    PassTiming,
    costs_at_ratio,
    fit,
    has_two_sizes,
    time_passes,
)
from .stopwatch import Stopwatch, Work, undisturbed
from .trial_shapes import Lengths, Shape, pairs_of, shape_of
from .vocabulary import vocabulary_size

BUDGET_S = 3.0
ATTENTION_SHARE, PASSES_SHARE = 0.2, 0.7  # of what is left of the budget
# Beyond 1024 positions a pass, all sequences of most steps share one; and the index arrays of a
# micro-batch beyond 32,768 positions take time themselves.
MAX_PASS_COST, MAX_POSITIONS = 1024, 2**15
# A pass's own cost is negligible where it is 1/32, 3 %, of that of its micro-batch's positions.
POSITIONS_PER_PASS_COST = 32
# Two micro-batches are in memory at a time, and half of the free memory is for everything else.
FREE_SHARE = 0.25


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    figures: what the engine is to be planned with. seconds: that measuring took. pass_s,
    position_s, row_s: seconds of a forward pass, of a position, and of a hidden state in the head,
    gradients included; None where there was no time, or no line through the measurements. longest:
    tokens of the longest sequence that was measured. is_complete: whether the figures are measured,
    and not the built-in ones.
    """

    figures: Figures
    seconds: float
    pass_s: float | None
    position_s: float | None
    row_s: float | None
    longest: int
    is_complete: bool


def calibrate(
    model: Any,
    config: SimPOConfig,
    lengths: Lengths,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Measure the figures of the shared-prefix engine for a model that it can run.

    The model and MLX's random numbers are afterwards as they were, and MLX's peak of memory is 0.

    Args:
        model: with LoRA attached.
        config: how it is trained: logps.impl, engine.attention, train.gradient_checkpointing,
            train.max_tokens_per_step.
        lengths: of the run's typical pair.
        budget_s: seconds that this may take. Only the first run of the smallest micro-batch may
            take longer, because nothing is known before it.

    Raises:
        SimPOError: ``logps.impl`` cannot run here.
    """
    mx.eval(model.parameters())  # reading them from a disk is not what is to be timed
    watch = Stopwatch(budget_s, clock)
    with undisturbed(model):
        model.train()
        measured = _measure(watch, model, config, lengths)
    costs, seconds = fit(measured.passes), watch.elapsed
    figures = measured.figures
    if costs is not None:
        figures = _with_passes(figures, costs, measured, seconds)
    else:
        figures = replace(figures, source=_reason(figures.source, measured.passes, seconds))
    is_complete = costs is not None
    if costs is None and measured.passes and not has_two_sizes(measured.passes):
        costs = costs_at_ratio(measured.passes[0], figures.pass_cost)
    return Calibration(
        figures,
        seconds,
        None if costs is None else costs.pass_s,
        None if costs is None else costs.position_s,
        None if measured.head is None else measured.head.row_s,
        max((sum(t.shape.lengths) for t in measured.passes), default=0),
        is_complete,
    )


class _Measured(NamedTuple):
    """figures: the built-in ones, with the attention and the chunk that are best. passes, head:
    what was timed. free_bytes: memory that MLX can still use."""

    figures: Figures
    passes: list[PassTiming]
    head: HeadCosts | None
    free_bytes: float


def _measure(watch: Stopwatch, model: Any, config: SimPOConfig, lengths: Lengths) -> _Measured:
    """Measure as much as there is time for; see `calibrate`."""
    implementation = choose_implementation(config.logps.impl)
    setting, figures = config.engine.attention, default_figures()
    max_positions = min(config.train.max_tokens_per_step or SIZES[-1], SIZES[-1])
    is_checkpointed = config.train.gradient_checkpointing
    engine = shared_prefix_engine(model, implementation, setting, figures)
    small = shape_of(min(SMALL, max_positions), lengths)
    small_s = watch.once(_gradient_work(model, engine, small, is_checkpointed)).seconds

    # As large as the run's by the built-in figures: smaller ones do not keep every device busy.
    usual = shape_of(max(min(figures.max_positions, max_positions), lengths.positions), lengths)
    attention = time_attention(
        watch.part(ATTENTION_SHARE), model, usual, setting, figures.tile_scores, small_s
    )
    if attention:
        figures = replace(
            best_attention(attention, figures), evidence=attention_evidence(attention)
        )
        engine = shared_prefix_engine(model, implementation, setting, figures)

    free_bytes = memory_limit_bytes() - mx.get_active_memory()
    passes = time_passes(
        watch.part(PASSES_SHARE),
        lambda shape: _gradient_work(model, engine, shape, is_checkpointed),
        lengths,
        small_s,
        max_positions,
        free_bytes,
    )

    # A hidden state in the head takes no longer than two positions in the trunk.
    row_s = 2 * small_s / small.positions
    head = time_head(watch, model, resolve_head(model), implementation, row_s)
    if head is not None and head.chunk_logits is not None:
        figures = replace(figures, chunk_logits=head.chunk_logits)
    return _Measured(figures, passes, head, free_bytes)


def _gradient_work(model: Any, engine: Engine, shape: Shape, is_checkpointed: bool) -> Work:
    """Return value and gradient of a micro-batch of this shape."""
    arrays = collate_shared(pairs_of(shape, vocabulary_size(model)), 0).arrays

    def loss(*arrays: Any) -> mx.array:
        return engine.logps(model, arrays, training=True).sum()

    gradient = nn.value_and_grad(model, loss)

    def work() -> Any:
        with gradient_checkpointing(model) if is_checkpointed else nullcontext():
            return gradient(*arrays)

    return work


def _with_passes(
    figures: Figures, costs: PassCosts, measured: _Measured, seconds: float
) -> Figures:
    """Return the figures with what was measured of passes and positions."""
    pass_cost = min(max(1, round(costs.pass_s / costs.position_s)), MAX_PASS_COST)
    largest = max(measured.passes, key=lambda t: t.shape.positions)
    bytes_each = max(1.0, largest.measured.bytes / largest.shape.positions)
    fitting = int(FREE_SHARE * measured.free_bytes / bytes_each)
    positions = min(POSITIONS_PER_PASS_COST * pass_cost, fitting, MAX_POSITIONS)
    return replace(
        figures,
        pass_cost=pass_cost,
        max_positions=max(SMALL, positions),
        source=f"measured in {seconds:.1f} s",
    )


def _reason(built_in: str, timings: Sequence[PassTiming], seconds: float) -> str:
    """Return why the cost of a pass is the built-in one, with what was measured."""
    if not timings:
        return f"{built_in}, because {seconds:.1f} s were enough for the warm-up only"
    measured = ", ".join(
        f"{t.shape.positions:,} positions in {t.shape.passes} passes took "
        f"{t.measured.seconds:.3g} s"
        for t in timings
    )
    problem = (
        "times that contradict each other, as on a busy machine"
        if has_two_sizes(timings)
        else "micro-batches of one size only"
    )
    return f"{built_in}, because {seconds:.1f} s of measuring gave {problem} ({measured})"


def calibration_table(
    calibration: Calibration, batch_size: int, lengths: Sequence[int] = (64, 256, 1024, 4096)
) -> list[dict[str, Any]]:
    """Return what training on pairs of several lengths would cost, one row per length.

    tokens: of each of the pair's two sequences, half of them prompt. pairs: that share a
    micro-batch. seconds_per_pair, pairs_per_hour: predicted, of one optimizer step without its
    update. is_extrapolated: longer than what was measured, so that attention, which grows with the
    square of the length, makes it slower than that.

    Args:
        batch_size: pairs per micro-batch, at most.

    Returns:
        [] if passes or the head could not be measured.
    """
    pass_s, position_s, row_s = calibration.pass_s, calibration.position_s, calibration.row_s
    if pass_s is None or position_s is None or row_s is None:
        return []
    rows = []
    for tokens in lengths:
        positions = tokens // 2 + 2 * (tokens - tokens // 2)
        pairs = min(batch_size, max(1, calibration.figures.max_positions // positions))
        # Two passes: the prefixes, and continuations of one length.
        seconds = 2 * pass_s / pairs + position_s * positions + row_s * (tokens - tokens // 2) * 2
        rows.append(
            {
                "tokens": tokens,
                "pairs": pairs,
                "seconds_per_pair": seconds,
                "pairs_per_hour": 3600 / seconds,
                "is_extrapolated": tokens > calibration.longest,
            }
        )
    return rows
