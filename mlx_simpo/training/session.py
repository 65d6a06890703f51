"""A run made ready: data read and tokenized, model loaded, LoRA attached."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import maybe_set_recommended_wired_limit

from ..config.simpo_config import SimPOConfig
from ..data.cache import tokenized
from ..data.encode import EncodedPair, Encoder
from ..data.pairs import Quarantined, check_share, held_out
from ..data.sources import Source, open_source
from ..data.tokens import TokenizedPairs
from ..engine.choice import Engine, choose_engine
from ..errors import SimPOError
from ..evaluation import Evaluation, evaluate_pairs
from ..files import write_text
from ..kernels.choice import choose
from ..model.adapters import read_adapter_config, save_adapter
from ..model.loading import LoadedModel, load_model, load_only_tokenizer
from ..model.lora import attach_lora
from ..model.record import RECORD_KEY, differences_from_training, get_dict, training_record
from ..paths import local_path
from ..reporting import advice
from ..reporting.display import Display
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
    train: Sequence[EncodedPair]
    valid: Sequence[EncodedPair]
    quarantined: list[Quarantined]
    engine: Engine
    display: Display
    record: dict[str, Any]

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
            self.model, self.valid, self.config, self.engine, self.display, title
        )

    def save(self, folder: str | Path) -> Path:
        """Write the adapter as it is now, with the configuration and template it belongs to.

        Raises:
            SimPOError: the folder cannot be written.
        """
        known = {"model": self.config.model, RECORD_KEY: self.record}
        path = save_adapter(folder, self.model, {**known, **self.adapter})
        write_text(path / "config.yaml", self.config.to_yaml())
        if self.encoder.renderer.text is not None:
            write_text(path / "chat_template.jinja", self.encoder.renderer.text)
        return path


def prepare(config: SimPOConfig, display: Display | None = None) -> Session:
    """Everything up to the first step; what is wrong with the input shows up here.

    Raises:
        SimPOError: unreadable or unusable data, model or settings.
    """
    display = display or Display()
    data = config.data
    if data.train is None:
        raise SimPOError("data.train is missing; name a file, folder or Hugging Face data set")
    choose(config.logps.impl)  # what cannot run here is said before anything is read
    training = read_pairs(config, data.train, data.train_split)
    validation = None if data.valid is None else read_pairs(config, data.valid, data.valid_split)
    # All records are looked at before a model of gigabytes is fetched.
    tokenizer = load_only_tokenizer(
        config.model, config.revision, trust_remote_code=config.trust_remote_code
    )
    encoder = make_encoder(tokenizer, config, display)
    train = encode(encoder, training, data.train, display)
    if data.valid is not None and validation is not None:
        valid = encode(encoder, validation, data.valid, display)
    else:
        train, valid = hold_out(train, config)
    quarantined = training.quarantined + (validation.quarantined if validation else [])
    if config.train.eval_every is not None and not valid:
        raise SimPOError(
            f"train.eval_every is {config.train.eval_every}, but there are no validation pairs; "
            "give data.valid or a data.valid_fraction above 0"
        )
    loaded = read_model(config, display)  # the weights are read when first used
    model, template = loaded.model, encoder.renderer.text
    if config.lora.init_from is not None:
        warn_of_mismatch(read_adapter_config(config.lora.init_from), loaded, template, display)
    adapter = attach_lora(model, config.lora, config.seed)
    maybe_set_recommended_wired_limit()
    engine = choose_engine(config.train.engine, model, config.logps.impl)
    record = training_record(loaded, config, template)
    return Session(
        config,
        model,
        tokenizer,
        encoder,
        adapter,
        train,
        valid,
        quarantined,
        engine,
        display,
        record,
    )


@dataclass
class Records:
    """A source that is there, and its records that are left out, known once it is encoded."""

    source: Source
    quarantined: list[Quarantined] = field(default_factory=list)


def read_pairs(config: SimPOConfig, name: str, split: str | None) -> Records:
    """The source of this name; its records are read when they are encoded.

    Raises:
        SimPOError: there is no such source, or it needs another split or subset.
    """
    data = config.data
    # A subset is the Hub data's; it does not keep a file from being evaluated on beside it.
    beside_hub_data = name == data.valid and data.train is not None and not is_local(data.train)
    subset = None if beside_hub_data and is_local(name) else data.subset
    return Records(open_source(name, split, subset))


def is_local(name: str) -> bool:
    """Whether a name is a file or folder here."""
    return local_path(name).exists()


def hold_out(pairs: TokenizedPairs, config: SimPOConfig) -> tuple[TokenizedPairs, TokenizedPairs]:
    """(training pairs, held-out pairs); see `data.pairs.held_out`."""
    held = held_out(pairs.prompts(), config.data.valid_fraction, config.seed)
    return pairs.take(np.flatnonzero(~held)), pairs.take(np.flatnonzero(held))


def make_encoder(tokenizer: Any, config: SimPOConfig, display: Display) -> Encoder:
    """The encoder of these settings; says which chat template runs."""
    encoder = Encoder(tokenizer, config.data)
    display.note(f"chat template: {encoder.renderer.origin}")
    return encoder


def encode(encoder: Encoder, found: Records, name: str, display: Display) -> TokenizedPairs:
    """A source's pairs as tokens, kept on disk; what is left out joins ``found.quarantined``.

    Raises:
        SimPOError: the source cannot be read, or too many of its records are unusable.
    """
    made = tokenized(encoder, found.source, partial(display.progress, "Tokenizing"))
    found.quarantined += made.quarantined
    for warning in made.warnings:
        display.warn(warning)
    check_share(len(made.pairs), found.quarantined, encoder.config.max_quarantined, name)
    display.note(made.note)
    if found.quarantined:
        first = found.quarantined[0]
        display.warn(
            f"{name}: {len(found.quarantined)} records left out, e.g. {first.reason}: {first.place}"
        )
    display.note(advice.truncation(made.pairs, encoder.config))
    return made.pairs


def read_model(config: SimPOConfig, display: Display) -> LoadedModel:
    """The model of these settings; says what will be slow."""
    loaded = load_model(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    display.advise(advice.slow_blas())
    display.advise(advice.slow_on_cpu(loaded.dtype, "quantization" in loaded.config))
    caches = make_prompt_cache(loaded.model)
    display.advise(advice.ignored_window(loaded.config, caches, config.data.max_length))
    return loaded


def warn_of_mismatch(
    adapter: dict[str, Any], loaded: LoadedModel, template: str | None, display: Display
) -> None:
    """Say where a model differs from the one that an adapter's record names."""
    for difference in differences_from_training(get_dict(adapter, RECORD_KEY), loaded, template):
        display.warn(f"{difference}: the adapter may not fit")


def evaluate_with_bar(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    config: SimPOConfig,
    engine: Engine,
    display: Display,
    title: str,
) -> Evaluation:
    """`evaluate_pairs`, with a progress bar."""
    options = config.train
    with display.progress(title, len(pairs)) as advance:
        return evaluate_pairs(
            model,
            pairs,
            config.objective,
            options.batch_size,
            advance,
            engine,
            options.max_tokens_per_step,
        )
