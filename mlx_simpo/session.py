"""A run made ready: data read and tokenized, model loaded, LoRA attached."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import maybe_set_recommended_wired_limit

from . import advice
from .checkpoint import write_text
from .config import SimPOConfig
from .data.encode import EncodedPair, Encoder, encode_pairs
from .data.pairs import PairSet, Quarantined, check_share, load_pairs, split_pairs
from .data.records import Pair
from .engine import Engine, choose_engine
from .errors import SimPOError
from .evaluation import Evaluation, evaluate_pairs
from .model.adapters import save_adapter
from .model.loading import load_model
from .model.lora import attach_lora
from .paths import local_path
from .report import Report
from .trainer import StepMetrics, train_steps


@dataclass
class Session:
    """A run that is ready to train: model with LoRA attached, pairs as tokens.

    >>> session = prepare(config)
    >>> for step in session.steps():
    ...     print(step.step, step.metrics["loss"])
    ...     if step.step % 100 == 0:
    ...         session.save(f"adapter-{step.step}")
    """

    config: SimPOConfig
    model: nn.Module
    tokenizer: Any
    encoder: Encoder
    adapter: dict[str, Any]
    train: list[EncodedPair]
    valid: list[EncodedPair]
    left_out: list[Quarantined]
    engine: Engine
    report: Report

    def steps(self) -> Iterator[StepMetrics]:
        """Train; see `trainer.train_steps`."""
        return train_steps(self.model, self.train, self.config, self.engine)

    def evaluate(self, title: str = "Evaluating") -> Evaluation:
        """Evaluate the model as it is now on the validation pairs.

        Raises:
            SimPOError: there are none.
        """
        if not self.valid:
            raise SimPOError("there are no validation pairs; give data.valid or a valid_fraction")
        return evaluate_with_bar(
            self.model, self.valid, self.config, self.engine, self.report, title
        )

    def save(self, folder: str | Path) -> Path:
        """Write the adapter as it is now, with the configuration and template it belongs to.

        Raises:
            SimPOError: the folder cannot be written.
        """
        path = save_adapter(folder, self.model, {"model": self.config.model, **self.adapter})
        write_text(path / "config.yaml", self.config.to_yaml())
        if self.encoder.renderer.text is not None:
            write_text(path / "chat_template.jinja", self.encoder.renderer.text)
        return path


def prepare(config: SimPOConfig, report: Report | None = None) -> Session:
    """Everything up to the first step; what is wrong with the input shows up here.

    Raises:
        SimPOError: unreadable or unusable data, model or settings.
    """
    report = report or Report()
    data = config.data
    if data.train is None:
        raise SimPOError("data.train is missing; name a file, folder or Hugging Face data set")
    training = read_pairs(config, data.train, data.train_split)
    validation = (
        PairSet([]) if data.valid is None else read_pairs(config, data.valid, data.valid_split)
    )
    model, tokenizer = read_model(config, report)  # the weights are read when first used
    encoder = make_encoder(tokenizer, config, report)
    train = encode(encoder, training, data.train, report)
    if data.valid is not None:
        valid = encode(encoder, validation, data.valid, report)
    else:
        train, valid = hold_out(train, training.pairs, config)
    if config.train.eval_every is not None and not valid:
        raise SimPOError(
            f"train.eval_every is {config.train.eval_every}, but there are no validation pairs; "
            "give data.valid or a data.valid_fraction above 0"
        )
    adapter = attach_lora(model, config.lora, config.seed)
    maybe_set_recommended_wired_limit()
    left_out = training.quarantined + validation.quarantined
    engine = choose_engine(config.train.engine, model)
    return Session(
        config, model, tokenizer, encoder, adapter, train, valid, left_out, engine, report
    )


def read_pairs(config: SimPOConfig, name: str, split: str | None) -> PairSet:
    """The pairs of one source; SimPOError if too many of its records are unusable."""
    data = config.data
    is_file_beside_hub_data = name == data.valid and local_path(name).exists()
    found = load_pairs(
        name,
        split,
        None if is_file_beside_hub_data else data.subset,
        implicit_string_prompts=data.implicit_string_prompts,
    )
    check_share(len(found.pairs), found.quarantined, data.max_quarantined, name)
    return found


def hold_out(
    encoded: list[EncodedPair], pairs: Sequence[Pair], config: SimPOConfig
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """(training pairs, held-out pairs); see `data.pairs.split_pairs`."""
    usable = {pair.index for pair in encoded}
    found = [pair for pair in pairs if pair.index in usable]
    _, held_out = split_pairs(found, config.data.valid_fraction, config.seed)
    held = {pair.index for pair in held_out}
    train = [pair for pair in encoded if pair.index not in held]
    return train, [pair for pair in encoded if pair.index in held]


def make_encoder(tokenizer: Any, config: SimPOConfig, report: Report) -> Encoder:
    """The encoder of these settings; says which chat template runs."""
    encoder = Encoder(tokenizer, config.data)
    report.note(f"chat template: {encoder.renderer.origin}")
    return encoder


def encode(encoder: Encoder, found: PairSet, name: str, report: Report) -> list[EncodedPair]:
    """A source's pairs as tokens; what is refused on the way joins ``found.quarantined``."""
    with report.progress("Tokenizing", len(found.pairs)) as advance:
        encoded, refused = encode_pairs(encoder, found.pairs, advance)
    found.quarantined += refused
    check_share(len(encoded), found.quarantined, encoder.config.max_quarantined, name)
    if found.quarantined:
        first = found.quarantined[0]
        report.warn(
            f"{name}: {len(found.quarantined)} records left out, e.g. {first.reason}: {first.place}"
        )
    report.note(advice.truncation(encoded, encoder.config))
    return encoded


def read_model(config: SimPOConfig, report: Report) -> tuple[nn.Module, Any]:
    """(model, tokenizer); says what will be slow."""
    loaded = load_model(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    report.advise(advice.slow_blas())
    report.advise(advice.slow_on_cpu(loaded.dtype, "quantization" in loaded.config))
    return loaded.model, loaded.tokenizer


def evaluate_with_bar(
    model: nn.Module,
    pairs: list[EncodedPair],
    config: SimPOConfig,
    engine: Engine,
    report: Report,
    title: str,
) -> Evaluation:
    """`evaluate_pairs`, with a progress bar."""
    options = config.train
    with report.progress(title, len(pairs)) as advance:
        return evaluate_pairs(
            model,
            pairs,
            config.objective,
            options.batch_size,
            advance,
            engine,
            options.max_tokens_per_step,
        )
