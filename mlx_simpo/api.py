"""What the commands do: train, evaluate, generate, inspect. The Python API in one module."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from .config.simpo_config import SimPOConfig
from .data.encode import EncodedPair, Encoder
from .data.inspection import summarize
from .engine.choice import choose_engine
from .errors import SimPOError
from .evaluation import Evaluation
from .kernels.choice import choose_implementation
from .model.adapters import load_adapter
from .model.loading import load_only_tokenizer
from .reporting import advice
from .reporting.display import Display, step_note
from .runs.folder import RunFolder, check_output_free
from .sampling.generate import answer
from .training.session import (
    Session,
    encode,
    evaluate_with_bar,
    make_encoder,
    prepare,
    read_model,
    read_pairs,
    warn_of_mismatch,
)
from .training.trainer import StepMetrics, total_steps


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    before, after: evaluations, None without validation pairs (or, after, when interrupted). best:
    the step with the lowest evaluation loss, whose adapter lies in best/ (with train.eval_every).
    """

    adapter: Path
    pairs: int
    last: StepMetrics
    before: Evaluation | None
    after: Evaluation | None
    best: int | None
    interrupted: bool
    seconds: float
    peak_memory_gb: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: evaluations as their metrics."""
        return {
            "adapter": str(self.adapter),
            "pairs": self.pairs,
            "steps": self.last.step,
            "best": self.best,
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 1),
            "peak_memory_gb": round(self.peak_memory_gb, 2),
            "train": self.last.as_dict(),
            "before": self.before.as_dict() if self.before else None,
            "after": self.after.as_dict() if self.after else None,
        }


def train(config: SimPOConfig, display: Display | None = None) -> TrainResult:
    """Train an adapter into ``config.output``, evaluated before and after.

    On Ctrl-C the adapter of the last finished step is saved.

    Raises:
        SimPOError: bad input, or a loss that is no number. An output folder stays behind only if a
            step was finished; it then holds the adapter of the last one.
    """
    display = display or Display()
    check_output_free(config.output)
    session = prepare(config, display)
    options = config.train
    display.note(
        f"{len(session.train)} pairs to train on, {len(session.valid)} to evaluate on; "
        f"{total_steps(options, len(session.train))} steps of {options.step_pairs} pairs; engine: "
        f"{session.engine.note}"
    )
    display.note(advice.starting_loss(config.objective))
    folder = RunFolder(config.output, config.to_yaml(), [q._asdict() for q in session.quarantined])
    try:
        result = run_steps(session, folder)
    except BaseException:  # Ctrl-C too
        folder.discard_if_empty()
        raise
    if result.before and result.after:
        display.evaluations({"before": result.before, "after": result.after})
        display.advise(advice.collapse(result.before, result.after))
    return result


def run_steps(session: Session, folder: RunFolder) -> TrainResult:
    """All steps, with the evaluations on the way, the record and the adapters."""
    started = time.perf_counter()
    every, steps = (
        session.config.train.eval_every,
        total_steps(session.config.train, len(session.train)),
    )
    best: tuple[float, int | None] = (math.inf, None)

    def evaluated(step: int, title: str) -> Evaluation | None:
        nonlocal best
        if not session.valid:
            return None
        found = session.evaluate(title)
        folder.log({"step": step, **{f"eval_{k}": v for k, v in found.as_dict().items()}})
        if every and step and found.metrics["loss"] < best[0]:
            best = (found.metrics["loss"], step)
            session.save(folder.path / "best")
        return found

    before, last, interrupted = evaluated(0, "Before"), None, False
    with session.display.progress("Training", steps) as advance:
        try:
            for last in session.steps():
                folder.log(last.as_dict())
                advance(1, step_note(last.metrics))
                if every and last.step % every == 0 and last.step < steps:
                    evaluated(last.step, f"Step {last.step}")
        except KeyboardInterrupt:
            if last is None:
                raise
            interrupted = True
        except BaseException:  # whatever ends the run, what it has learned is kept
            if last is not None:
                session.save(folder.path)
                session.display.warn(f"the adapter of step {last.step} is saved in {folder.path}")
            raise
    assert last is not None
    session.save(folder.path)
    if interrupted:
        session.display.warn(f"interrupted; the adapter of step {last.step} is saved")
    after = None
    try:
        after = None if interrupted else evaluated(last.step, "After")
    except KeyboardInterrupt:
        interrupted = True
        session.display.warn(f"interrupted; the adapter is saved in {folder.path}")
    result = TrainResult(
        adapter=folder.path,
        pairs=len(session.train),
        last=last,
        before=before,
        after=after,
        best=best[1],
        interrupted=interrupted,
        seconds=time.perf_counter() - started,
        peak_memory_gb=mx.get_peak_memory() / 1e9,
    )
    folder.finish(result.as_dict())
    return result


def evaluate(
    config: SimPOConfig, adapter: str | Path | None = None, display: Display | None = None
) -> dict[str, Evaluation]:
    """Evaluate a model on ``data.valid`` without and, if one is given, with an adapter.

    Returns:
        {"base": …}, or {"base": …, "adapter": …}.

    Raises:
        SimPOError: unreadable or unusable data, model or adapter.
    """
    display = display or Display()
    if config.data.valid is None:
        raise SimPOError("data.valid is missing; name the pairs to evaluate on")
    choose_implementation(config.logps.impl)
    found = read_pairs(config, config.data.valid, config.data.valid_split)
    tokenizer = load_only_tokenizer(
        config.model, config.revision, trust_remote_code=config.trust_remote_code
    )
    encoder = make_encoder(tokenizer, config, display)
    pairs = encode(encoder, found, config.data.valid, display)
    loaded = read_model(config, display)
    model = loaded.model
    engine = choose_engine(config.train.engine, model, config.logps.impl)
    display.note(f"engine: {engine.note}")
    results = {"base": evaluate_with_bar(model, pairs, config, engine, display, "Base model")}
    if adapter is not None:
        warn_of_mismatch(load_adapter(model, adapter), loaded, encoder.renderer.text, display)
        results["adapter"] = evaluate_with_bar(model, pairs, config, engine, display, "Adapter")
    return results


def generate(
    config: SimPOConfig,
    prompt: str,
    adapter: str | Path | None = None,
    *,
    max_tokens: int = 200,
    display: Display | None = None,
) -> dict[str, str]:
    """The model's greedy answer to one user turn, without and, if one is given, with an adapter.

    Returns:
        {"base": …}, or {"base": …, "adapter": …}.

    Raises:
        SimPOError: unusable model or adapter.
    """
    display = display or Display()
    loaded = read_model(config, display)
    model, tokenizer = loaded.model, loaded.tokenizer
    encoder = make_encoder(tokenizer, config, display)
    answers = {"base": answer(model, tokenizer, encoder, prompt, max_tokens)}
    if adapter is not None:
        warn_of_mismatch(load_adapter(model, adapter), loaded, encoder.renderer.text, display)
        answers["adapter"] = answer(model, tokenizer, encoder, prompt, max_tokens)
    return answers


class Inspection(NamedTuple):
    """A data set as it would be trained on. summary: see `data.inspection.summarize`."""

    pairs: Sequence[EncodedPair]
    encoder: Encoder
    summary: dict[str, Any]


def inspect(
    config: SimPOConfig, data: str, split: str | None = None, display: Display | None = None
) -> Inspection:
    """Read and tokenize a data set without training on it, whatever share of it is unusable.

    Raises:
        SimPOError: unreadable data or model, or no usable pair at all.
    """
    display = display or Display()
    lenient = replace(config, data=replace(config.data, max_quarantined=1.0))
    found = read_pairs(lenient, data, split)
    tokenizer = load_only_tokenizer(
        config.model, config.revision, trust_remote_code=config.trust_remote_code
    )
    encoder = make_encoder(tokenizer, lenient, display)
    pairs = encode(encoder, found, data, display)
    return Inspection(pairs, encoder, summarize(pairs, found.quarantined, encoder))
