"""How well a model tells chosen from rejected responses: per pair, and with an error bar."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .config.simpo_config import ObjectiveConfig
from .data.encode import EncodedPair
from .data.tokens import column
from .engine.choice import Engine, choose_engine
from .engine.vocabulary import check_token_ids
from .errors import SimPOError
from .objectives import simpo_loss

# For an interval. All of 4 pairs are worse by chance one time in 16, all of 5 one time in 32.
FEWEST_PAIRS = 5
RESAMPLED_AT_ONCE = 2**20  # values: as quick as more of them, in 16 MB
SMALLEST_RISE = 0.01  # of the loss, relative; a smaller one is the same loss to a reader


@dataclass(frozen=True)
class Evaluation:
    """The result on N pairs.

    metrics: the means over the pairs, named as in `objectives.simpo_loss`, and chosen_tokens and
    rejected_tokens, the mean numbers of scored tokens. accuracy_interval: 95 % bootstrap interval
    of rewards/accuracies. chosen_logps, rejected_logps: [N] float32, average log-probabilities in
    nats per token, in input order. margins: [N] float32, beta · (chosen_logps − rejected_logps).
    """

    pairs: Sequence[EncodedPair]
    metrics: dict[str, float]
    accuracy_interval: tuple[float, float]
    chosen_logps: np.ndarray
    rejected_logps: np.ndarray
    margins: np.ndarray
    losses: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """Return pairs, the metrics and rewards/accuracies_interval, for JSON."""
        interval = [round(bound, 4) for bound in self.accuracy_interval]
        return {
            "pairs": len(self.pairs),
            **self.metrics,
            "rewards/accuracies_interval": interval,
        }

    def per_pair(self) -> list[dict[str, Any]]:
        """Return one dict per pair, in input order; "index" counts the dataset's records from 0."""
        columns = (self.chosen_logps, self.rejected_logps, self.margins)
        values = zip(self.pairs, *(column.tolist() for column in columns), strict=True)
        return [
            {
                "index": pair.index,
                "chosen_logp": chosen,
                "rejected_logp": rejected,
                "chosen_tokens": pair.chosen.num_scored,
                "rejected_tokens": pair.rejected.num_scored,
                "margin": margin,
            }
            for pair, chosen, rejected, margin in values
        ]


def evaluate_pairs(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    objective: ObjectiveConfig,
    batch_size: int = 4,
    advance: Callable[[int], None] = lambda pairs: None,
    engine: Engine | None = None,
    max_tokens: int | None = None,
) -> Evaluation:
    """Compute loss, rewards and log-probabilities of ``pairs``, without dropout.

    Args:
        batch_size, max_tokens: maximum numbers of pairs and of positions per batch; the result does
            not depend on them. advance: called after each batch with the number of its pairs.
            engine: default: shared_prefix, if the model supports it.

    Raises:
        SimPOError: no pairs, tokens that the model does not have, or log-probabilities that are not
            finite numbers.
    """
    if not pairs:
        raise SimPOError("there are no pairs to evaluate on")
    check_token_ids(pairs, model)
    was_training = model.training
    model.eval()  # without dropout, also between two steps of a training
    chosen, rejected = np.zeros(len(pairs), np.float32), np.zeros(len(pairs), np.float32)
    engine = engine or choose_engine("shared_prefix", model)
    for indices in engine.plan(pairs, batch_size, max_tokens):
        part = [pairs[index] for index in indices]
        logps = np.array(engine.logps(model, engine.collate(part).arrays, training=False))
        chosen[indices], rejected[indices] = logps[: len(part)], logps[len(part) :]
        advance(len(part))
    model.train(was_training)
    return summarize_logps(pairs, chosen, rejected, objective)


def summarize_logps(
    pairs: Sequence[EncodedPair],
    chosen_logps: np.ndarray,
    rejected_logps: np.ndarray,
    objective: ObjectiveConfig,
) -> Evaluation:
    """Compute the evaluation of pairs from their average log-probabilities.

    Args:
        chosen_logps, rejected_logps: [N] float32, in nats per token. Those of an earlier
            evaluation of the same pairs give the same evaluation, bit for bit.

    Raises:
        SimPOError: log-probabilities that are not finite numbers.
    """
    is_valid = np.isfinite(chosen_logps + rejected_logps)
    bad = [pair.source for pair, ok in zip(pairs, is_valid, strict=True) if not ok]
    if bad:
        raise SimPOError(
            f"the log-probabilities of {len(bad)} of {len(pairs)} pairs are not finite numbers "
            f"({', '.join(bad[:5])}); if the model's weights are intact, try dtype=float32"
        )
    token_counts = {
        name: column(pairs, name) - column(pairs, f"{name}_score_start")
        for name in ("chosen", "rejected")
    }
    logps = (mx.array(chosen_logps), mx.array(rejected_logps))
    _, values = simpo_loss(*logps, mx.array(token_counts["chosen"]), **asdict(objective))
    # In float64: a float32 sum over many thousand pairs loses digits that are reported.
    metrics = {name: float(np.array(v).mean(dtype=np.float64)) for name, v in values.items()}
    metrics |= {f"{name}_tokens": float(np.mean(n)) for name, n in token_counts.items()}
    return Evaluation(
        pairs=pairs,
        metrics=metrics,
        accuracy_interval=bootstrap_interval(np.array(values["rewards/accuracies"])),
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        margins=np.array(values["rewards/margins"]),
        losses=np.array(values["loss"]),
    )


def is_worse(before: Evaluation, after: Evaluation) -> bool:
    """Whether the loss on the same pairs has risen: by 1 %, and by more than chance explains.

    The 95 % bootstrap interval of the mean change per pair lies above 0: on other pairs of this
    kind the loss would rise as well. Fewer than 5 pairs cannot show that; of those each must be
    worse, and their loss `far_above` what it was.
    """
    changes = after.losses - before.losses
    loss = before.metrics["loss"]
    if len(changes) < FEWEST_PAIRS:
        return bool((changes > 0).all()) and after.metrics["loss"] > far_above(loss)
    if changes.mean() <= SMALLEST_RISE * loss:
        return False
    return bootstrap_interval(changes)[0] > 0


def far_above(loss: float) -> float:
    """Return the loss from which on a run has gone wrong that began with ``loss``.

    Twice as much, and at least 1 more: a run that goes on from an adapter may begin near 0.
    """
    return loss + max(1.0, loss)


def has_collapsed(before: Evaluation, after: Evaluation, vocab_size: int) -> bool:
    """Whether the model has lost half of what it knew about the chosen responses.

    It knows what makes them likelier than random tokens: logps/chosen minus −ln(vocab_size), its
    value for the uniform distribution. The loss does not tell: a model that finds all tokens
    equally likely has that of a model without a preference, which can be less than before, and
    the loss of one that finds the rejected responses less likely still is 0.

    Args:
        vocab_size: number of the model's logits.
    """
    uniform = -math.log(vocab_size)
    known, rest = (e.metrics["logps/chosen"] - uniform for e in (before, after))
    # A model that was not trained has nothing to lose.
    return known > 1.0 and rest < known / 2


def bootstrap_interval(
    values: np.ndarray, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of the mean of ``values`` [N].

    Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979: the means of ``samples``
    resamples of N values with replacement, and of those the quantiles (1 ± level) / 2.
    """
    rng = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    at_once = max(1, RESAMPLED_AT_ONCE // len(values))
    for done in range(0, samples, at_once):
        rows = min(at_once, samples - done)
        drawn = rng.integers(0, len(values), (rows, len(values)))
        means.append(values[drawn].mean(axis=1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
