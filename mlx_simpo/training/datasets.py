"""The datasets of a run as tokens: opened, encoded or read from the cache, and split."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..config.simpo_config import SimPOConfig
from ..config.sources import SourceConfig
from ..data.cache import load_or_tokenize
from ..data.encode import Encoder
from ..data.pairs import Quarantined, check_share, held_out
from ..data.rows import Source
from ..data.sources import open_source
from ..data.template_messages import template_messages
from ..data.tokens import TokenizedPairs
from ..model.loading import load_only_tokenizer
from ..paths import local_path
from ..reporting import advice
from ..reporting.display import Display


class EncodedDataset(NamedTuple):
    """The pairs of a dataset as tokens, and the records that are not used."""

    pairs: TokenizedPairs
    quarantined: list[Quarantined]


def encode_datasets(
    config: SimPOConfig, sources: Sequence[SourceConfig], display: Display
) -> tuple[Encoder, list[EncodedDataset]]:
    """Load the model's tokenizer and encode datasets with it.

    Raises:
        SimPOError: a dataset or the tokenizer cannot be read, or too many records are quarantined.
    """
    # A misspelt name is an error before the tokenizer is downloaded.
    opened = [open_dataset(config, source) for source in sources]
    tokenizer = load_only_tokenizer(
        config.model, config.revision, trust_remote_code=config.trust_remote_code
    )
    encoder = create_encoder(tokenizer, config, display)
    return encoder, [encode(encoder, source, source.name, display) for source in opened]


def open_dataset(config: SimPOConfig, source: SourceConfig) -> Source:
    """Open a dataset; its records are read when they are encoded.

    Raises:
        SimPOError: there is no such dataset, or it needs another split or subset.
    """
    # data.subset is for the Hub datasets, if there are any; a local file beside them has none.
    data = config.data
    everything = (*data.train_sources(), *data.valid_sources().values())
    beside_hub_data = any(not is_local(other.path) for other in everything)
    inherits = source.subset is None and not (beside_hub_data and is_local(source.path))
    return open_source(replace(source, subset=data.subset) if inherits else source)


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
    display.note(source.note)
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
    about_template = template_messages(encoder, result.pairs)
    for note in about_template.notes:
        display.note(f"{name}: {note}")
    for warning in about_template.warnings:
        display.warn(f"{name}: {warning}")
    return EncodedDataset(result.pairs, quarantined)
