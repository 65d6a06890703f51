"""The two ways to compute a batch's log-probabilities, behind one interface, and their choice."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config.simpo_config import SimPOConfig
from ..data.encode import EncodedPair
from ..device import is_gpu
from ..errors import SimPOError, one_line
from ..kernels.choice import BUILT_IN, Implementation, Name, choose_implementation
from ..model.loading import dtype_of
from .collate_shared import collate_shared
from .collate_stacked import collate_stacked
from .figures import Figures, default_figures
from .head import resolve_head
from .operation_choice import AttentionSetting, choose_operations
from .operations import patchable_modules, patched
from .plan import plan_shared_prefix, plan_stacked
from .prefix_cache import can_extend_prefix, reason_not_shareable
from .reference import average_logps
from .shared_prefix import shared_prefix_logps
from .trial_shapes import random_pairs
from .vocabulary import vocabulary_size


class MicroBatch(NamedTuple):
    """Some pairs of a step, as an engine computes them.

    arrays: what the engine's ``logps`` takes.
    positions: tokens that the trunk processes at once, padding included.
    head_positions: how many of them become logits.
    """

    arrays: tuple
    positions: int
    head_positions: int


class Engine(NamedTuple):
    """How pairs become log-probabilities.

    name: as in ``train.engine``.
    note: what runs and why, for the user.
    plan: (pairs, batch_size, max_tokens) → indices into pairs, as micro-batches of at most that
        many pairs and positions.
    collate: B pairs → `MicroBatch`.
    logps: (model, its arrays, training=…) → float32 [2B], the average log-probability of the B
        chosen and then of the B rejected responses, in nats per token. training: whether gradients
        will be asked for.
    compiled: whether the step is compiled if ``train.compile`` is null.
    figures: what ``plan``, ``collate`` and ``logps`` go by; None for the reference, which has none.
    """

    name: str
    note: str
    plan: Callable[[Sequence[EncodedPair], int, int | None], list[list[int]]]
    collate: Callable[[Sequence[EncodedPair]], MicroBatch]
    logps: Callable[..., mx.array]
    compiled: bool
    figures: Figures | None = None


def _stacked_micro_batch(pairs: Sequence[EncodedPair]) -> MicroBatch:
    batch = collate_stacked(pairs)
    positions = batch.tokens.shape[0] * (batch.tokens.shape[1] - 1)
    return MicroBatch(batch.arrays, positions, head_positions=positions)


def _shared_prefix_micro_batch(
    pairs: Sequence[EncodedPair], pass_cost: int, extends_prefix: bool
) -> MicroBatch:
    batch = collate_shared(pairs, pass_cost, extends_prefix=extends_prefix)
    return MicroBatch(batch.arrays, batch.positions, head_positions=batch.hidden_indices.size)


REFERENCE = Engine(
    "reference",
    "reference (one stacked forward pass)",
    plan_stacked,
    _stacked_micro_batch,
    lambda model, arrays, training: average_logps(model, *arrays),
    compiled=True,
)


def shared_prefix_engine(
    model: Any,
    implementation: Implementation = BUILT_IN,
    attention: AttentionSetting = "auto",
    figures: Figures | None = None,
) -> Engine:
    """Return the shared-prefix engine for ``model``, untested; see `choose_engine`.

    What depends on the kind of model is determined here, once: its head, what its layers compute
    with, and which modules of mlx-lm hold them.

    Args:
        implementation: computes log-probabilities from logits. attention: of ``engine.attention``.
        figures: default: the built-in ones for the device.
    """
    figures = figures or default_figures()
    head, modules = resolve_head(model), patchable_modules(model)
    operations = choose_operations(model, attention, figures)
    extends = can_extend_prefix(model)

    def logps(model: Any, arrays: tuple, training: bool) -> mx.array:
        with patched(modules, operations.training if training else operations.evaluation):
            return shared_prefix_logps(
                model,
                head,
                *arrays,
                training=training,
                implementation=implementation,
                chunk_logits=figures.chunk_logits,
            )

    return Engine(
        "shared_prefix",
        "shared_prefix (each prompt runs once, only scored tokens reach the head); "
        f"{operations.note}; log-probabilities: {implementation.note}; {figures.note}",
        partial(plan_shared_prefix, figures=figures, extends_prefix=extends),
        partial(_shared_prefix_micro_batch, pass_cost=figures.pass_cost, extends_prefix=extends),
        logps,
        compiled=False,  # its shapes are the data's own, and each would be traced
        figures=figures,
    )


def choose_engine(
    name: str,
    model: Any,
    impl: Name = "auto",
    attention: AttentionSetting = "auto",
    figures: Figures | None = None,
) -> Engine:
    """Return the engine of that name; the reference, with the reason in its note, for a model that
    the shared-prefix engine cannot run or computes differently.

    Args:
        name: "shared_prefix" or "reference".
        impl: what computes log-probabilities from logits; see `kernels.choice`.
        attention, figures: see `shared_prefix_engine`.

    Raises:
        SimPOError: ``impl`` cannot run here.
    """
    if name == "reference":
        return REFERENCE
    implementation = choose_implementation(impl)
    reason = reason_not_shareable(model)
    if reason is None:
        was_training = model.training
        model.eval()  # no dropout: it would make any two passes differ
        try:
            engine = shared_prefix_engine(model, implementation, attention, figures)
            reason = disagreement_with_reference(model, engine)
            if reason is None:
                return engine
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            reason = f"this architecture fails in a trial ({error})"
        finally:
            model.train(was_training)
    return REFERENCE._replace(note=f"{REFERENCE.note}: the prefix cannot be shared, {reason}")


def configured_engine(config: SimPOConfig, model: Any, figures: Figures | None = None) -> Engine:
    """Return the engine that a run's settings name; see `choose_engine`.

    Raises:
        SimPOError: ``logps.impl`` cannot run here.
    """
    name, impl, attention = config.train.engine, config.logps.impl, config.engine.attention
    return choose_engine(name, model, impl, attention, figures)


def disagreement_with_reference(model: Any, engine: Engine) -> str | None:
    """Return how ``engine`` differs from the reference on two short pairs; None if it does not.

    An architecture that nobody has tried can only be checked by what it computes. The pairs share a
    prefix of 13 tokens, which two passes follow, of the two long and the two short sequences, with
    padding: what one of them left in a prefix's state would reach the other. Then each sequence has
    a pass of its own, which takes its prefix from the others' by index. Where the engine runs
    prefixes and long sequences in one pass, that is tried as well.
    """
    pairs = random_pairs(vocabulary_size(model), [(14, 6, 17), (16, 16, 7)])
    expected = np.array(REFERENCE.logps(model, REFERENCE.collate(pairs).arrays, training=False))
    extends = can_extend_prefix(model)
    # Training and evaluation may compute with different operations, so both are tried.
    trials = [(8, False, True), (0, False, False), *([(8, True, True)] if extends else [])]
    differences = []
    for pass_cost, extends_prefix, training in trials:
        arrays = collate_shared(pairs, pass_cost, extends_prefix=extends_prefix).arrays
        actual = np.array(engine.logps(model, arrays, training=training))
        differences.append(np.abs(actual - expected).max())
    difference = float(np.max(differences))  # NaN if one of them is
    # In half precision the two round differently; a wrong mask or position is off by far more.
    tolerance = 1e-3 if dtype_of(model) == "float32" else 0.1
    if difference <= tolerance:
        return None
    return f"its log-probabilities differ by {difference:.3g} in a trial"


def check_gradient(model: Any, engine: Engine) -> None:
    """Check that all which ``model`` computes while it trains has a gradient on MLX's default
    device. Only the graph of a gradient is built, which MLX refuses then; nothing is computed.

    Raises:
        SimPOError: mlx-lm runs a kernel of its own there, which has none.
    """
    arrays = engine.collate(random_pairs(vocabulary_size(model), [(2, 1, 2)])).arrays
    was_training = model.training
    model.train()
    try:
        nn.value_and_grad(model, lambda m: engine.logps(m, arrays, training=True).sum())(model)
    except ValueError as error:
        if "vjp" not in str(error):
            raise
        device, remedy = "the CPU", "train another model"
        if is_gpu():
            device = "a GPU"
            remedy += ", or this one on the CPU: from Python, after mx.set_default_device(mx.cpu)"
        raise SimPOError(
            f"the model cannot be trained here: mlx-lm computes a part of it on {device} with an "
            f"operation that has no gradient ({one_line(error)}); {remedy}"
        ) from None
    finally:
        model.train(was_training)
