"""How well a model tells preferred from rejected answers, pair by pair and with an error bar."""

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
from .errors import SimPOError
from .objectives import simpo_loss


@dataclass(frozen=True)
class Evaluation:
    """Results on N pairs.

    metrics: the means, under the names of `objectives.simpo_loss`, and chosen_tokens and
    rejected_tokens, the mean numbers of scored tokens. accuracy_interval: 95 % bootstrap interval
    of rewards/accuracies. chosen_logps, rejected_logps, margins: [N] float32, in input order;
    a margin is the difference of the rewards, beta · (chosen − rejected average log-probability).
    """

    pairs: Sequence[EncodedPair]
    metrics: dict[str, float]
    accuracy_interval: tuple[float, float]
    chosen_logps: np.ndarray
    rejected_logps: np.ndarray
    margins: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """pairs, the metrics and rewards/accuracies_interval, ready for JSON."""
        interval = [round(bound, 4) for bound in self.accuracy_interval]
        return {
            "pairs": len(self.pairs),
            **self.metrics,
            "rewards/accuracies_interval": interval,
        }

    def per_pair(self) -> list[dict[str, Any]]:
        """One record a pair, in input order; ``index`` is the row's number in the data, from 0."""
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
    """Loss, rewards and log-probabilities of ``pairs``, dropout off.

    Args:
        batch_size, max_tokens: pairs and positions in memory at once; the result does not depend on
            them. advance: called with the number of pairs done after each batch. engine: None for
            shared_prefix where the model can.

    Raises:
        SimPOError: no pairs, or the log-probabilities of some pairs are not finite; they are named.
    """
    if not pairs:
        raise SimPOError("there are no pairs to evaluate on")
    was_training = model.training
    model.eval()
    chosen, rejected = np.zeros(len(pairs), np.float32), np.zeros(len(pairs), np.float32)
    engine = engine or choose_engine("shared_prefix", model)
    for rows in engine.plan(pairs, batch_size, max_tokens):
        part = [pairs[row] for row in rows]
        logps = np.array(engine.logps(model, engine.collate(part).arrays, training=False))
        mx.clear_cache()  # the next batch has other shapes
        chosen[rows], rejected[rows] = logps[: len(part)], logps[len(part) :]
        advance(len(part))
    model.train(was_training)
    bad = [p.source for p, ok in zip(pairs, np.isfinite(chosen + rejected), strict=True) if not ok]
    if bad:
        raise SimPOError(
            f"the log-probabilities of {len(bad)} of {len(pairs)} pairs are not finite numbers, at "
            f"{', '.join(bad[:5])}; the model is broken, or overflows: try dtype=float32"
        )
    counts = {
        side: column(pairs, side) - column(pairs, f"{side}_score_start")
        for side in ("chosen", "rejected")
    }
    _, found = simpo_loss(
        mx.array(chosen), mx.array(rejected), mx.array(counts["chosen"]), **asdict(objective)
    )
    metrics = {name: float(np.array(v).mean(dtype=np.float64)) for name, v in found.items()}
    metrics |= {f"{side}_tokens": float(np.mean(n)) for side, n in counts.items()}
    return Evaluation(
        pairs=pairs,
        metrics=metrics,
        accuracy_interval=bootstrap_interval(np.array(found["rewards/accuracies"])),
        chosen_logps=chosen,
        rejected_logps=rejected,
        margins=np.array(found["rewards/margins"]),
    )


def bootstrap_interval(
    values: np.ndarray, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` [N], resampled with replacement.

    Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979; the seed makes it repeatable.
    """
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(samples)]
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
