"""The Python API behind the commands: train, evaluate, generate, inspect."""

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
from .model.record import RECORD_KEY, get_dict
from .reporting import advice
from .reporting.display import Display, count_text, step_note
from .runs.folder import RunFolder, check_output_free
from .sampling.generate import generate_response
from .training.session import (
    Session,
    create_encoder,
    encode_datasets,
    evaluate_with_progress,
    load_base_model,
    prepare,
)
from .training.trainer import StepMetrics, total_steps


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    adapter: the output folder. pairs: number of training pairs. last: the last step. before, after:
    evaluations; None without validation pairs, and after also if the run was interrupted. best: the
    step with the lowest evaluation loss, whose adapter is in best/ (with train.eval_every).
    peak_memory_gb: MLX's, in GB (10⁹ bytes).
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
        """Return the result as plain values, for JSON."""
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
    """Train an adapter into ``config.output``, with an evaluation before and after.

    On Ctrl-C the adapter of the last finished step is saved.

    Args:
        display: where notes, progress and evaluations are shown; default: stderr.

    Raises:
        SimPOError: invalid input, or a loss that is not a finite number. The output folder stays
            only if a step was finished; it then has the adapter of the last finished step.
    """
    check_output_free(config.output)
    session = prepare(config, display)
    display, options = session.display, config.train
    display.note(
        f"{count_text(len(session.train), 'pair')} to train on, {len(session.valid):,} to evaluate "
        f"on; {count_text(total_steps(options, len(session.train)), 'step')} of "
        f"{count_text(options.step_pairs, 'pair')}; engine: {session.engine.note}"
    )
    display.note(advice.starting_loss(config.objective))
    # Created only now: an error of the input must not leave a folder behind.
    folder = RunFolder(config.output, config.to_yaml(), [q._asdict() for q in session.quarantined])
    try:
        result = run_steps(session, folder)
    except BaseException:  # Ctrl-C too
        folder.discard_if_empty()
        raise
    if result.before and result.after:
        display.evaluations({"before": result.before, "after": result.after})
        display.warn(advice.collapse(result.before, result.after))
    return result


def run_steps(session: Session, folder: RunFolder) -> TrainResult:
    """Run all steps and evaluations of a session, and write metrics, adapters and the summary."""
    started = time.perf_counter()
    every = session.config.train.eval_every
    steps = total_steps(session.config.train, len(session.train))
    best: tuple[float, int | None] = (math.inf, None)

    def evaluate_step(step: int, title: str) -> Evaluation | None:
        nonlocal best
        if not session.valid:
            return None
        result = session.evaluate(title)
        folder.log({"step": step, **{f"eval_{k}": v for k, v in result.as_dict().items()}})
        if every and step and result.metrics["loss"] < best[0]:
            best = (result.metrics["loss"], step)
            session.save(folder.path / "best")
        return result

    before, last, interrupted = evaluate_step(0, "Before"), None, False
    with session.display.progress("Training", steps) as advance:
        try:
            for last in session.steps():
                folder.log(last.as_dict())
                advance(1, step_note(last.metrics))
                if every and last.step % every == 0 and last.step < steps:
                    evaluate_step(last.step, f"Step {last.step}")
        except KeyboardInterrupt:
            if last is None:
                raise
            interrupted = True
        except BaseException:  # whatever ends the run, the last finished step is saved
            if last is not None:
                session.save(folder.path)
                session.display.warn(f"the adapter of step {last.step} is saved in {folder.path}")
            raise
    assert last is not None
    session.save(folder.path)
    if interrupted:
        session.display.warn(f"interrupted; the adapter of step {last.step} is saved")
    # The adapter is on disk by now, so that Ctrl-C in the last evaluation costs only its metrics.
    after = None
    try:
        after = None if interrupted else evaluate_step(last.step, "After")
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
    """Evaluate the base model on ``data.valid``, and the adapter if there is one.

    Args:
        adapter: folder of an mlx-lm adapter.

    Returns:
        The base model's evaluation as "base"; with an adapter, the adapter's as "adapter".

    Raises:
        SimPOError: data, a model or an adapter that cannot be read or used.
    """
    display, data = display or Display(), config.data
    if data.valid is None:
        raise SimPOError("data.valid is missing; name the pairs to evaluate on")
    # First, so that a kernel that cannot run here is reported before anything is read.
    choose_implementation(config.logps.impl)
    encoder, (dataset,) = encode_datasets(config, [(data.valid, data.valid_split)], display)
    pairs, loaded = dataset.pairs, load_base_model(config, display)
    model = loaded.model
    engine = choose_engine(config.train.engine, model, config.logps.impl)
    display.note(f"engine: {engine.note}")
    results = {"base": evaluate_with_progress(model, pairs, config, engine, display, "Base model")}
    if adapter is not None:
        record = get_dict(load_adapter(model, adapter), RECORD_KEY)
        display.warn(advice.adapter_mismatch(record, loaded, encoder.renderer.text))
        results["adapter"] = evaluate_with_progress(
            model, pairs, config, engine, display, "Adapter"
        )
    return results


def generate(
    config: SimPOConfig,
    prompt: str,
    adapter: str | Path | None = None,
    *,
    max_tokens: int = 200,
    display: Display | None = None,
) -> dict[str, str]:
    """Generate the base model's response to one user turn, and the adapter's if there is one.

    Args:
        adapter: folder of an mlx-lm adapter. max_tokens: maximum length of a response.

    Returns:
        The base model's response as "base"; with an adapter, the adapter's as "adapter".

    Raises:
        SimPOError: a model, adapter or prompt that cannot be read or used.
    """
    display = display or Display()
    loaded = load_base_model(config, display)
    model, tokenizer = loaded.model, loaded.tokenizer
    encoder = create_encoder(tokenizer, config, display)
    responses = {"base": generate_response(model, tokenizer, encoder, prompt, max_tokens)}
    if adapter is not None:
        record = get_dict(load_adapter(model, adapter), RECORD_KEY)
        display.warn(advice.adapter_mismatch(record, loaded, encoder.renderer.text))
        responses["adapter"] = generate_response(model, tokenizer, encoder, prompt, max_tokens)
    return responses


class Inspection(NamedTuple):
    """A dataset as it would be trained on. summary: see `data.inspection.summarize`."""

    pairs: Sequence[EncodedPair]
    encoder: Encoder
    summary: dict[str, Any]


def inspect(
    config: SimPOConfig, data: str, split: str | None = None, display: Display | None = None
) -> Inspection:
    """Read and tokenize a dataset without training on it, however many records are quarantined.

    Args:
        data: file, folder or Hugging Face dataset, instead of the one in the configuration.

    Raises:
        SimPOError: a dataset or tokenizer that cannot be read, or a dataset without a valid pair.
    """
    lenient = replace(config, data=replace(config.data, max_quarantined=1.0))
    encoder, (dataset,) = encode_datasets(lenient, [(data, split)], display or Display())
    return Inspection(dataset.pairs, encoder, summarize(*dataset, encoder))
