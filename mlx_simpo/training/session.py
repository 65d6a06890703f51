"""Preparing a run: reading and tokenizing its datasets, loading the model, attaching LoRA."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import maybe_set_recommended_wired_limit

from ..config.simpo_config import SimPOConfig
from ..data.cache import load_or_tokenize
from ..data.encode import EncodedPair, Encoder
from ..data.pairs import Quarantined, check_share, held_out
from ..data.sources import Source, open_source
from ..data.tokens import TokenizedPairs
from ..engine.choice import Engine, choose_engine
from ..errors import SimPOError
from ..evaluation import Evaluation, evaluate_pairs
from ..files import write_text
from ..kernels.choice import choose_implementation
from ..model.adapters import read_adapter_config, save_adapter
from ..model.loading import LoadedModel, load_model, load_only_tokenizer
from ..model.lora import attach_lora
from ..model.record import RECORD_KEY, get_dict, training_record
from ..paths import local_path
from ..reporting import advice
from ..reporting.display import Display
from .trainer import StepMetrics, train_steps


@dataclass
class Session:
    """A run that is ready to train: the model with LoRA attached, the pairs as tokens.

    >>> session = prepare(config)
    >>> for step in session.steps():
    ...     print(step.step, step.metrics["loss"])
    ...     if step.step % 100 == 0:
    ...         session.save(f"adapter-{step.step}")

    adapter: the content of mlx-lm's adapter_config.json. record: what the adapter is trained on
    (`model.record.training_record`). display: where notes and progress of all methods go.
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
        """Train, one optimizer step after another; see `trainer.train_steps`."""
        return train_steps(self.model, self.train, self.config, self.engine)

    def evaluate(self, title: str = "Evaluating") -> Evaluation:
        """Evaluate the current weights on the validation pairs.

        Raises:
            SimPOError: there are no validation pairs.
        """
        if not self.valid:
            raise SimPOError(
                "there are no validation pairs; set data.valid, or data.valid_fraction above 0"
            )
        return evaluate_with_progress(
            self.model, self.valid, self.config, self.engine, self.display, title
        )

    def save(self, folder: str | Path) -> Path:
        """Save the current adapter with its configuration and chat template.

        Returns:
            The folder.

        Raises:
            SimPOError: the folder cannot be written.
        """
        metadata = {"model": self.config.model, RECORD_KEY: self.record}
        path = save_adapter(folder, self.model, {**metadata, **self.adapter})
        write_text(path / "config.yaml", self.config.to_yaml())
        # An adapter needs the template it was trained with, which is not always the tokenizer's
        # own.
        if self.encoder.renderer.text is not None:
            write_text(path / "chat_template.jinja", self.encoder.renderer.text)
        return path


def prepare(config: SimPOConfig, display: Display | None = None) -> Session:
    """Prepare a run up to its first step; every error of the input is raised here.

    Args:
        display: where notes and progress go; default: stderr.

    Raises:
        SimPOError: data, a model or settings that cannot be read or used.
    """
    display = display or Display()
    data = config.data
    if data.train is None:
        raise SimPOError("data.train is missing; name a file, a folder or a Hugging Face dataset")
    # First, so that a kernel that cannot run here is reported before anything is read.
    choose_implementation(config.logps.impl)
    datasets = [(data.train, data.train_split)]
    datasets += [] if data.valid is None else [(data.valid, data.valid_split)]
    # All records are checked before a model of gigabytes is downloaded.
    encoder, encoded = encode_datasets(config, datasets, display)
    if data.valid is None:
        train, valid = hold_out(encoded[0].pairs, config)
    else:
        train, valid = (dataset.pairs for dataset in encoded)
    if config.train.eval_every is not None and not valid:
        raise SimPOError(
            f"train.eval_every is {config.train.eval_every}, but there are no validation pairs; "
            "set data.valid, or data.valid_fraction above 0"
        )
    loaded = load_base_model(config, display)  # its weights are read when first used
    model, template = loaded.model, encoder.renderer.text
    if config.lora.init_from is not None:
        initial = get_dict(read_adapter_config(config.lora.init_from), RECORD_KEY)
        display.warn(advice.adapter_mismatch(initial, loaded, template))
    adapter = attach_lora(model, config.lora, config.seed)
    maybe_set_recommended_wired_limit()  # or macOS may page weights out between steps
    engine = choose_engine(config.train.engine, model, config.logps.impl)
    record = training_record(loaded, config, template)
    return Session(
        config,
        model,
        encoder.tokenizer,
        encoder,
        adapter,
        train,
        valid,
        [record for dataset in encoded for record in dataset.quarantined],
        engine,
        display,
        record,
    )


class EncodedDataset(NamedTuple):
    """The pairs of a dataset as tokens, and the records that are not used."""

    pairs: TokenizedPairs
    quarantined: list[Quarantined]


def encode_datasets(
    config: SimPOConfig, datasets: Sequence[tuple[str, str | None]], display: Display
) -> tuple[Encoder, list[EncodedDataset]]:
    """Load the model's tokenizer and encode datasets with it.

    Args:
        datasets: (name, split) of each.

    Raises:
        SimPOError: a dataset or the tokenizer cannot be read, or too many records are quarantined.
    """
    # A misspelt name is an error before the tokenizer is downloaded.
    sources = [open_dataset(config, name, split) for name, split in datasets]
    tokenizer = load_only_tokenizer(
        config.model, config.revision, trust_remote_code=config.trust_remote_code
    )
    encoder = create_encoder(tokenizer, config, display)
    names = [name for name, _ in datasets]
    return encoder, [encode(encoder, *both, display) for both in zip(sources, names, strict=True)]


def open_dataset(config: SimPOConfig, name: str, split: str | None) -> Source:
    """Open a dataset; its records are read when they are encoded.

    Raises:
        SimPOError: there is no such dataset, or it needs another split or subset.
    """
    data = config.data
    # data.subset is for the Hub dataset, if there is one; a local file beside it has no subsets.
    beside_hub_data = name == data.valid and data.train is not None and not is_local(data.train)
    subset = None if beside_hub_data and is_local(name) else data.subset
    return open_source(name, split, subset)


def is_local(name: str) -> bool:
    """Whether a dataset's name is a local file or folder."""
    return local_path(name).exists()


def hold_out(pairs: TokenizedPairs, config: SimPOConfig) -> tuple[TokenizedPairs, TokenizedPairs]:
    """Split pairs into (training pairs, held-out pairs); see `data.pairs.held_out`."""
    # Whole prompts are held out: responses to one prompt in both parts would leak.
    held = held_out(pairs.prompts(), config.data.valid_fraction, config.seed)
    return pairs.take(np.flatnonzero(~held)), pairs.take(np.flatnonzero(held))


def create_encoder(tokenizer: Any, config: SimPOConfig, display: Display) -> Encoder:
    """Create the encoder for these settings, and note which chat template it uses."""
    encoder = Encoder(tokenizer, config.data)
    display.note(f"chat template: {encoder.renderer.origin}")
    return encoder


def encode(encoder: Encoder, source: Source, name: str, display: Display) -> EncodedDataset:
    """Encode one dataset, or read its tokens from the cache.

    Raises:
        SimPOError: it cannot be read, or too many of its records are quarantined.
    """
    result = load_or_tokenize(encoder, source, partial(display.progress, "Tokenizing"))
    for warning in result.warnings:
        display.warn(warning)
    quarantined = result.quarantined
    check_share(len(result.pairs), quarantined, encoder.config.max_quarantined, name)
    display.note(result.note)
    if quarantined:
        first = quarantined[0]
        display.warn(
            f"{name}: {len(quarantined)} records quarantined, e.g. {first.reason}: {first.location}"
        )
    display.note(advice.truncation(result.pairs, encoder.config))
    return EncodedDataset(result.pairs, quarantined)


def load_base_model(config: SimPOConfig, display: Display) -> LoadedModel:
    """Load the model of these settings, and warn about what will be slow or different.

    Raises:
        SimPOError: it cannot be loaded.
    """
    loaded = load_model(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    display.warn(advice.slow_blas())
    display.warn(advice.slow_on_cpu(loaded.dtype, "quantization" in loaded.config))
    # The caches show whether mlx-lm runs a sliding window; config.json only says that it exists.
    caches = make_prompt_cache(loaded.model)
    display.warn(advice.ignored_window(loaded.config, caches, config.data.max_length))
    return loaded


def evaluate_with_progress(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    config: SimPOConfig,
    engine: Engine,
    display: Display,
    title: str,
) -> Evaluation:
    """Evaluate pairs with a progress bar; see `evaluate_pairs`."""
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
