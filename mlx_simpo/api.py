"""The Python API behind the commands: train, evaluate, inspect (and `generation`)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .config.simpo_config import SimPOConfig
from .data.encode import EncodedPair, Encoder
from .data.inspection import summarize
from .data.mixing import Mixture
from .data.overview import InspectedSource, Overview, overview
from .engine.choice import configured_engine
from .errors import SimPOError
from .evaluation import Evaluation
from .kernels.choice import choose_implementation
from .model.adapters import check_adapter, check_fits, load_adapter
from .model.record import RECORD_KEY, get_dict
from .paths import local_path
from .planning.memory_errors import explain
from .planning.memory_limits import memory_limits
from .reporting import advice
from .reporting.display import Display, count_text
from .runs.folder import open_run
from .training.datasets import encode_datasets
from .training.inputs import open_inspected, open_valid
from .training.keep_awake import keep_awake
from .training.memory_check import check_memory
from .training.result import TrainResult
from .training.resuming import newest_checkpoint, recorded_figures
from .training.run import Run
from .training.session import Session, evaluate_with_progress, load_base_model, prepare
from .training.stopping import stop_on_signals


def train(
    config: SimPOConfig,
    display: Display | None = None,
    *,
    train: Any = None,
    valid: Any = None,
    resume: bool = False,
) -> TrainResult:
    """Train an adapter into ``config.output``, with an evaluation before and after.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP end the run after the step that is being computed; its state
    is saved, and `resume` goes on from there (docs/long_runs.md).

    Args:
        display: where notes, progress and evaluations are shown; default: stderr. train, valid:
            rows from memory, see `prepare`; a run that is resumed needs the same ones again.
            resume: go on with the run that ``config.output`` holds, bit for bit as if it had not
            ended; see `config.simpo_config.resume_config`. ``train.resume=auto`` does so if there
            is one.

    Raises:
        SimPOError: invalid input, or a loss that is not a finite number. The output folder stays
            only if a step was finished; it then has the adapter of the last finished step.
        KeyboardInterrupt, SystemExit: a signal before the first step was finished.
    """
    display = display or Display()
    limits = memory_limits(config.memory)
    with limits, open_run(config.output, "always" if resume else config.train.resume) as folder:
        if folder.resuming and train is None and not config.data.train_sources():
            raise SimPOError(
                f"the run in {config.output} was begun with rows from memory, which have to be "
                f"passed again, in Python: train(resume_config({config.output!r}), train=rows, "
                "resume=True)"
            )
        checkpoint = newest_checkpoint(folder, display) if folder.resuming else None
        resuming = checkpoint is not None
        figures = None if checkpoint is None else recorded_figures(checkpoint, config)
        session = prepare(
            config, display, train=train, valid=valid, resuming=resuming, figures=figures
        )
        display.note(_what_will_run(session))
        display.note(f"engine: {session.engine.note}")
        if checkpoint is None:
            display.note(advice.starting_loss(config.objective))
        forecast = check_memory(session)
        awake = keep_awake(config.train.keep_awake, display.note)
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


def _what_will_run(session: Session) -> str:
    """Return how much a run trains on, and in how many steps."""
    evaluated = sum(map(len, session.valid_sets.values()))
    step_pairs = count_text(session.config.train.step_pairs, "pair")
    return (
        f"{count_text(len(session.train), 'pair')} to train on, {evaluated:,} to evaluate on; "
        f"{count_text(session.total_steps, 'step')} of {step_pairs}"
    )


def evaluate(
    config: SimPOConfig,
    adapter: str | Path | None = None,
    display: Display | None = None,
    *,
    valid: Any = None,
) -> dict[str, Evaluation]:
    """Evaluate the base model on ``data.valid``, and the adapter if there is one.

    All pairs count: data.valid_max is for the evaluations of a training.

    Args:
        adapter: folder of an mlx-lm adapter. valid: rows from memory instead, see `prepare`.

    Returns:
        The base model's evaluation as "base"; with an adapter, the adapter's as "adapter". Those of
        several validation sets have the sets' names, too: "base/chat", "adapter/chat" ….

    Raises:
        SimPOError: data, a model or an adapter that cannot be read or used.
    """
    with memory_limits(config.memory):
        return _evaluate(config, adapter, display or Display(), valid)


def _evaluate(
    config: SimPOConfig, adapter: str | Path | None, display: Display, valid: Any
) -> dict[str, Evaluation]:
    """Compute what `evaluate` returns.

    Raises:
        SimPOError: see `evaluate`.
    """
    # First, so that a kernel that cannot run here is reported before anything is read.
    choose_implementation(config.logps.impl)
    if adapter is not None:
        check_adapter(adapter)  # before the base model is scored, which takes minutes
    sources = open_valid(config, valid, display)
    if not sources:
        raise _nothing_to_evaluate(config)
    encoder, datasets = encode_datasets(config, [*sources.values()], display)
    sets = {name: data.pairs for name, data in zip(sources, datasets, strict=True)}
    loaded = load_base_model(config, display)
    model = loaded.model
    if adapter is not None:
        check_fits(model, adapter)
    engine = configured_engine(config, model)
    display.note(f"engine: {engine.note}")

    def evaluate_model(name: str, title: str) -> dict[str, Evaluation]:
        return {
            f"{name}/{part}" if part else name: evaluate_with_progress(
                model, pairs, config, engine, display, f"{title} ({part})" if part else title
            )
            for part, pairs in sets.items()
        }

    results = evaluate_model("base", "Base model")
    if adapter is not None:
        record = get_dict(load_adapter(model, adapter), RECORD_KEY)
        template = encoder.renderer.text
        display.warn(advice.adapter_mismatch(record, loaded, template, config.data))
        results |= evaluate_model("adapter", "Adapter")
    return results


def _nothing_to_evaluate(config: SimPOConfig) -> SimPOError:
    """Return the error that there are no validation pairs, with what to do about it."""
    folder = config.data.folder
    if folder is None:
        return SimPOError("data.valid is missing; name the pairs to evaluate on")
    names = ", ".join(sorted(path.name for path in local_path(folder).iterdir())[:5])
    return SimPOError(
        f"data.folder is {folder!r}, which has no validation file (valid.jsonl); it has {names}: "
        "name one of its splits with data.valid_split=test"
    )


class Inspection(NamedTuple):
    """Data as they would be trained on.

    pairs: of all sources, one source after the other. summary: see `data.inspection.summarize`;
    with what `data.overview.Overview` has, and with "sources", the same for each source.
    """

    pairs: Sequence[EncodedPair]
    encoder: Encoder
    summary: dict[str, Any]
    overview: Overview


def inspect(
    config: SimPOConfig,
    data: Any = None,
    split: str | None = None,
    display: Display | None = None,
) -> Inspection:
    """Read and tokenize data without training on them, however many records are quarantined.

    Args:
        data: file, folder or Hugging Face dataset, or a list of several; or rows from memory, see
            `prepare`. None: all sources of the configuration. split: of folders and Hub datasets.

    Raises:
        SimPOError: data or a tokenizer that cannot be read, or a source without a valid pair.
    """
    lenient = replace(config, data=replace(config.data, max_quarantined=1.0))
    display = display or Display()
    opened = open_inspected(lenient, data, split, display)
    encoder, datasets = encode_datasets(lenient, [source.source for source in opened], display)
    sources = [
        InspectedSource(source.name, source.role, *dataset)
        for source, dataset in zip(opened, datasets, strict=True)
    ]
    pairs = Mixture({str(number): source.pairs for number, source in enumerate(sources)})
    together = overview(sources, pairs)
    quarantined = [record for source in sources for record in source.quarantined]
    summary = summarize(pairs, quarantined, encoder) | together.as_dict()
    summary["sources"] = [
        {
            "name": source.name,
            "role": source.role,
            **summarize(source.pairs, source.quarantined, encoder),
            "distinct_prompts": distinct,
        }
        for source, distinct in zip(sources, together.distinct, strict=True)
    ]
    return Inspection(pairs, encoder, summary, together)
