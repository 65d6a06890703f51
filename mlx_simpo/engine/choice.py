"""The two ways to compute a batch's log-probabilities, behind one interface."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..data.encode import EncodedPair, TokenizedSequence
from ..kernels.choice import BUILT_IN, Implementation, Name, choose_implementation
from ..model.loading import dtype_of
from .collate_shared import collate_shared
from .collate_stacked import collate_stacked
from .plan import plan_shared_prefix, plan_stacked
from .prefix_cache import reason_not_shareable
from .reference import average_logps
from .shared_prefix import shared_prefix_logps

PROBE = 40  # tokens of a trial's prompt


class MicroBatch(NamedTuple):
    """arrays: what an engine's ``logps`` takes. positions: tokens that the trunk processes at once,
    padding included. rows: hidden rows that become logits."""

    arrays: tuple
    positions: int
    rows: int


class Engine(NamedTuple):
    """How pairs become log-probabilities.

    plan: (pairs, batch_size, max_tokens) → places in pairs, as micro-batches of at most that many
    pairs and positions. collate: B pairs → `MicroBatch`. logps: (model, its arrays, training=…) →
    float32 [2B], the average log-probability of the B chosen and then of the B rejected answers, in
    nats a token. compiled: whether the step is compiled if nobody says. note: what runs and why.
    """

    name: str
    note: str
    plan: Callable[[Sequence[EncodedPair], int, int | None], list[list[int]]]
    collate: Callable[[Sequence[EncodedPair]], MicroBatch]
    logps: Callable[..., mx.array]
    compiled: bool


def _stacked(pairs: Sequence[EncodedPair]) -> MicroBatch:
    batch = collate_stacked(pairs)
    positions = batch.tokens.shape[0] * (batch.tokens.shape[1] - 1)
    return MicroBatch(batch.arrays, positions, positions)


def _shared(pairs: Sequence[EncodedPair]) -> MicroBatch:
    batch = collate_shared(pairs)
    return MicroBatch(batch.arrays, batch.positions, batch.rows.size)


REFERENCE = Engine(
    "reference",
    "reference (one stacked forward pass)",
    plan_stacked,
    _stacked,
    lambda model, arrays, training: average_logps(model, *arrays),
    compiled=True,
)


def shared_prefix_engine(implementation: Implementation) -> Engine:
    """The shared-prefix engine with log-probabilities made so."""
    return Engine(
        "shared_prefix",
        "shared_prefix (each prompt runs once, only scored rows reach the head); "
        f"log-probabilities: {implementation.note}",
        plan_shared_prefix,
        _shared,
        lambda model, arrays, training: shared_prefix_logps(
            model, *arrays, training=training, implementation=implementation
        ),
        compiled=False,  # its shapes are the data's own, and each would be traced
    )


SHARED_PREFIX = shared_prefix_engine(BUILT_IN)


def choose_engine(name: str, model: Any, impl: Name = "auto") -> Engine:
    """The engine of that name, with log-probabilities made by ``impl`` (see `kernels.choice`), or
    the reference with the reason why this model needs it."""
    if name == "reference":
        return REFERENCE
    engine = shared_prefix_engine(choose_implementation(impl))
    reason = reason_not_shareable(model) or disagreement_with_reference(model, engine)
    if reason is None:
        return engine
    return REFERENCE._replace(note=f"{REFERENCE.note}: the prefix cannot be shared, {reason}")


def disagreement_with_reference(model: Any, engine: Engine) -> str | None:
    """What a trial on two short sequences shows; None where ``engine`` agrees with the reference.

    Of an architecture that nobody has tried, no more is known than what it computes.
    """
    tokens = np.arange(1, PROBE + 10, dtype=np.int32)
    pair = [
        EncodedPair(TokenizedSequence(tokens[: PROBE + 3], PROBE), TokenizedSequence(tokens, PROBE))
    ]
    engines = (REFERENCE, engine)
    was_training = model.training
    model.eval()
    try:
        expected, found = (
            np.array(e.logps(model, e.collate(pair).arrays, training=False)) for e in engines
        )
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        return f"this architecture refuses it ({error})"
    finally:
        model.train(was_training)
    difference = float(np.abs(found - expected).max())
    exact = dtype_of(model) == "float32"
    if difference <= (1e-3 if exact else 0.1):
        return None
    return f"its log-probabilities differ by {difference:.3g} in a trial"
