"""The Python API behind the commands: train, evaluate, inspect (and `generation`)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .config.simpo_config import SimPOConfig
from .config.sources import SourceConfig
from .data.encode import EncodedPair, Encoder
from .data.inspection import summarize
from .engine.choice import choose_engine
from .errors import SimPOError
from .evaluation import Evaluation
from .kernels.choice import choose_implementation
from .model.adapters import check_adapter, check_fits, load_adapter
from .model.record import RECORD_KEY, get_dict
from .planning.memory_errors import explain
from .reporting import advice
from .reporting.display import Display, count_text
from .runs.folder import open_run
from .training.datasets import encode_datasets
from .training.keep_awake import keep_awake
from .training.memory_check import check_memory
from .training.result import TrainResult
from .training.resuming import newest_checkpoint
from .training.run import Run
from .training.session import evaluate_with_progress, load_base_model, prepare
from .training.stopping import stop_on_signals


def train(
    config: SimPOConfig, display: Display | None = None, *, resume: bool = False
) -> TrainResult:
    """Train an adapter into ``config.output``, with an evaluation before and after.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP end the run after the step that is being computed; its state
    is saved, and `resume` goes on from there (docs/long_runs.md).

    Args:
        display: where notes, progress and evaluations are shown; default: stderr. resume: go on
            with the run that ``config.output`` holds, bit for bit as if it had not ended; see
            `config.simpo_config.resume_config`. ``train.resume=auto`` does so if there is one.

    Raises:
        SimPOError: invalid input, or a loss that is not a finite number. The output folder stays
            only if a step was finished; it then has the adapter of the last finished step.
        KeyboardInterrupt, SystemExit: a signal before the first step was finished.
    """
    display = display or Display()
    with open_run(config.output, "always" if resume else config.train.resume) as folder:
        checkpoint = newest_checkpoint(folder, display) if folder.resuming else None
        session = prepare(config, display, resuming=checkpoint is not None)
        options, steps = config.train, session.total_steps
        display.note(
            f"{count_text(len(session.train), 'pair')} to train on, {len(session.valid):,} to "
            f"evaluate on; {count_text(steps, 'step')} of {count_text(options.step_pairs, 'pair')};"
            f" engine: {session.engine.note}"
        )
        if checkpoint is None:
            display.note(advice.starting_loss(config.objective))
        forecast = check_memory(session)
        awake = keep_awake(options.keep_awake, display.note)
        with awake, stop_on_signals(display.warn) as stop:
            run = Run(session, folder, stop, checkpoint)
            folder.begin(config.to_yaml(), [q._asdict() for q in session.quarantined])
            try:
                return run.finish()
            except (RuntimeError, MemoryError) as error:
                explained = explain(error, forecast)
                if explained is None:
                    raise
                raise explained from error


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
    if not data.valid_sources():
        raise SimPOError("data.valid is missing; name the pairs to evaluate on")
    # First, so that a kernel that cannot run here is reported before anything is read.
    choose_implementation(config.logps.impl)
    if adapter is not None:
        check_adapter(adapter)  # before the base model is scored, which takes minutes
    encoder, (dataset,) = encode_datasets(config, [*data.valid_sources().values()][:1], display)
    pairs, loaded = dataset.pairs, load_base_model(config, display)
    model = loaded.model
    if adapter is not None:
        check_fits(model, adapter)
    engine = choose_engine(config.train.engine, model, config.logps.impl)
    display.note(f"engine: {engine.note}")
    results = {"base": evaluate_with_progress(model, pairs, config, engine, display, "Base model")}
    if adapter is not None:
        record = get_dict(load_adapter(model, adapter), RECORD_KEY)
        template, arguments = encoder.renderer.text, config.data.template_args or {}
        display.warn(advice.adapter_mismatch(record, loaded, template, arguments))
        results["adapter"] = evaluate_with_progress(
            model, pairs, config, engine, display, "Adapter"
        )
    return results


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
    encoder, (dataset,) = encode_datasets(
        lenient, [SourceConfig(data, split=split)], display or Display()
    )
    return Inspection(dataset.pairs, encoder, summarize(*dataset, encoder))
