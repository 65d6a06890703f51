"""Everything that a run shows of its settings: what it reads, computes, decides and writes.

Two runs that differ in one setting are compared aspect by aspect, which says what the setting does
and what it leaves alone.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import captured_display, json_lines
from mlx.utils import tree_flatten

from mlx_simpo import Session, SimPOConfig, SimPOError, api, evaluation, files, train
from mlx_simpo.data.encode import EncodedPair
from mlx_simpo.engine import calibrated, choice

# What follows from what: a difference reaches everything after it.
NUMBERS = ("loss 1", "gradient 1", "first moment", "second moment")
NUMBERS += ("weights 1", "loss 2", "weights 2", "evaluation after")
CLOSE = 1e-3  # relative; two ways to compute the same differ by far less, and settings by more
DEFAULT_LIMITS = {"memory": 8 * 10**9, "cache": 7 * 10**8, "wired": 0}  # of the machine, as tested
Observed = dict[str, Any]


def observe(config: SimPOConfig) -> Observed:
    """Train, and return what was observed by its aspects; of an invalid run, only why it is."""
    display, text = captured_display()
    display.console.width = 1000
    watch = _Watch()
    try:
        with watch.patched():
            train(config, display)
    except SimPOError as error:
        watch.seen["rejected"] = str(error)
    notes = text.getvalue().splitlines()
    watch.seen["caffeinate"] = any("caffeinate" in line for line in notes)
    watch.seen["warnings"] = [line for line in notes if line.startswith("warning:")]
    return watch.seen | (_written(Path(config.output)) if "rejected" not in watch.seen else {})


def differences(one: Observed, other: Observed, tolerance: float = CLOSE) -> list[str]:
    """Return the aspects in which two runs differ, and those which only one of them has."""
    return [
        n for n in sorted(one.keys() | other.keys()) if _differ(one.get(n), other.get(n), tolerance)
    ]


def _differ(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two values differ: numbers by more than a tolerance, mappings where they share
    names."""
    if isinstance(one, dict) and isinstance(other, dict):
        common = one.keys() & other.keys()
        return not common or any(_differ(one[k], other[k], tolerance) for k in common)
    if isinstance(one, np.ndarray | float) and isinstance(other, np.ndarray | float):
        a, b = np.asarray(one), np.asarray(other)
        if a.shape != b.shape:
            return True
        return bool(np.abs(a - b).max() > tolerance * max(np.abs(b).max(), 1e-6))
    return bool(one != other)


class _Watch:
    """Looks into a run. seen: what it has observed so far."""

    def __init__(self) -> None:
        self.seen: Observed = {"fused attention": 0, "checkpointed layers": 0, "samples": []}
        self.limits = dict(DEFAULT_LIMITS)
        self.order: list[list[str]] = []
        self.micro_batches: list[list[list[str]]] = []
        self.is_training = self.is_evaluating = False

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Watch the runs of this context; what takes its time and is not looked at is omitted."""
        prepare = api.prepare

        def prepare_and_watch(*arguments: Any, **more: Any) -> Session:
            return self.watched(prepare(*arguments, **more))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(api, "prepare", prepare_and_watch)
            patch.setattr(mx, "checkpoint", self._counted("checkpointed layers", mx.checkpoint))
            fused = mx.fast.scaled_dot_product_attention
            patch.setattr(
                mx.fast, "scaled_dot_product_attention", self._counted("fused attention", fused)
            )
            for name in self.limits:
                patch.setattr(mx, f"set_{name}_limit", self._setter(name))
            patch.setattr(files, "sync", lambda *_: None)
            patch.setattr(evaluation, "bootstrap_interval", lambda values: (0.0, 1.0))
            patch.setattr(choice, "disagreement_with_reference", lambda *_: None)
            patch.setattr(calibrated, "check_gradient", lambda *_: None)
            yield

    def _during_training(self, steps: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.is_training = True
            step = next(steps, None)
            self.is_training = False
            if step is None:
                return
            yield step

    def _counted(self, name: str, function: Callable) -> Callable:
        def call(*arguments: Any, **more: Any) -> Any:
            if self.is_training:
                self.seen[name] = 1  # whether, and not how often: that depends on the micro-batches
            return function(*arguments, **more)

        return call

    def _setter(self, name: str) -> Callable[[int], int]:
        def set_limit(limit: int) -> int:
            before, self.limits[name] = self.limits[name], limit
            return before

        return set_limit

    def watched(self, session: Any) -> Session:
        """Note what a session begins with, and let it note each of its steps."""
        seen = self.seen
        seen["model"] = _base_weights(session)
        seen["records"] = [pair.source for pair in session.train]
        seen["tokens"] = _tokens(session.train)
        sets = session.valid_sets
        seen["validation records"] = {n: [p.source for p in pairs] for n, pairs in sets.items()}
        seen["validation sets"] = list(sets)
        seen["validation tokens"] = {n: _tokens(pairs) for n, pairs in sets.items()}
        seen["main set"] = session.valid_main
        seen["sources"] = [(name, *counts[2:]) for name, counts in session.sources.items()]
        seen["quarantined"] = [record.source for record in session.quarantined]
        seen["engine"] = session.engine.note
        seen["adapter"] = session.adapter
        seen["initial weights"] = _weights(session)
        plan = session.engine.plan

        def watched_plan(pairs: Sequence[EncodedPair], *limits: Any) -> list[list[int]]:
            indices = plan(pairs, *limits)
            parts = [[pairs[i].source for i in part] for part in indices]
            if self.is_evaluating:
                seen["evaluated batches"] = [sorted(map(len, parts))]
            else:
                self.micro_batches.append(parts)
                self.order.append([pair.source for pair in pairs])
            return indices

        session.engine = session.engine._replace(plan=watched_plan)
        steps, evaluate = session.steps, session.evaluate_sets

        def watched_steps() -> Iterator[Any]:
            seen["limits"] = dict(self.limits)
            for step in self._during_training(steps()):
                self._add_step(step.step, session)
                yield step

        def watched_evaluate(*arguments: Any) -> Any:
            self.is_evaluating = True
            results = evaluate(*arguments)
            self.is_evaluating = False
            return results

        session.steps, session.evaluate_sets = watched_steps, watched_evaluate
        return session

    def _add_step(self, step: int, session: Session) -> None:
        if step == 1:
            state = tree_flatten(session.state.optimizer.state)
            for name, end in (("first moment", ".m"), ("second moment", ".v")):
                self.seen[name] = {n: np.array(a) for n, a in state if n.endswith(end)}
        if step in (1, 2):
            self.seen[f"weights {step}"] = _weights(session)
        self.seen["order"] = dict(enumerate(self.order))
        self.seen["micro-batches"] = dict(enumerate(self.micro_batches))


def _weights(session: Session) -> dict[str, np.ndarray]:
    return {n: np.array(a) for n, a in tree_flatten(session.model.trainable_parameters())}


def _base_weights(session: Session) -> dict[str, Any]:
    """Return a number per frozen weight, and its dtype."""
    trainable = dict(tree_flatten(session.model.trainable_parameters()))
    weights: Any = tree_flatten(session.model.parameters())
    base = {n.replace(".linear", ""): a for n, a in weights if n not in trainable}
    return {n: [str(a.dtype), float(a.astype(mx.float32).sum())] for n, a in base.items()}


def _tokens(pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    return {
        pair.source: [(s.tokens.tolist(), s.score_start) for s in (pair.chosen, pair.rejected)]
        for pair in pairs
    }


def _written(folder: Path) -> Observed:
    """Return what a run has written into its folder."""
    lines = json_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if "grad_norm" in line or "skipped" in line]
    evaluations = [line for line in lines if line not in steps]
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    seen: Observed = {
        "output": str(folder),
        "steps": len(steps),
        "skipped": summary["skipped"],
        "stopped early": summary["stopped_early"],
        "rates": {line["step"]: line["learning_rate"] for line in steps},
        "positions": {line["step"]: line["positions"] for line in steps},
        "traces": steps[-1]["traces"],
        "evaluations": [line["step"] for line in evaluations],
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "files": sorted(path.name for path in folder.iterdir()),
        "result": summary["before"] and summary["before"]["loss"],
    }
    for name, metric in (("loss", "loss"), ("gradient", "grad_norm")):
        seen |= {f"{name} {n}": s[metric] for n, s in enumerate(steps[:2], 1) if metric in s}
    for name, at in (("before", 0), ("after", -1)):
        metrics = evaluations[at].items() if evaluations else ()
        seen[f"evaluation {name}"] = {k: v for k, v in metrics if k.startswith("eval")}
    with suppress(FileNotFoundError):
        seen["samples"] = [line["response"] for line in json_lines(folder / "samples.jsonl")]
    seen.pop("gradient 2", None)
    return seen
