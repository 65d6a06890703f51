"""The datasets of a run as tokens: encoded or read from the cache, mixed, and split."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..config.simpo_config import SimPOConfig
from ..data.cache import load_or_tokenize
from ..data.duplicates import leak_warnings
from ..data.encode import Encoder
from ..data.mixing import Mixture, SourceCounts, epoch_order
from ..data.order import draw_sample
from ..data.pairs import Quarantined, check_share, held_out
from ..data.rows import Source
from ..data.template_messages import template_messages
from ..data.tokens import StoredPairs, TokenizedPairs
from ..errors import SimPOError
from ..model.loading import load_only_tokenizer
from ..reporting import advice
from ..reporting.display import Display, count_text
from .inputs import TrainInputs, open_train, open_valid

_Pairs = TypeVar("_Pairs", bound=StoredPairs)


class EncodedDataset(NamedTuple):
    """The pairs of a dataset as tokens, and the records that are not used."""

    pairs: TokenizedPairs
    quarantined: list[Quarantined]


class RunPairs(NamedTuple):
    """The pairs of a run.

    train: those to train on. valid: those to evaluate on, by the names of their sets, of which an
    only one may be "". sources: what the run has of each training source.
    """

    train: Mixture
    valid: dict[str, StoredPairs]
    sources: dict[str, SourceCounts]


def read_pairs(
    config: SimPOConfig, train: Any, valid: Any, display: Display
) -> tuple[Encoder, RunPairs, list[Quarantined]]:
    """Read, encode, mix and split the data of a run.

    Args:
        train, valid: rows from memory instead of the settings' data, or None (`session.prepare`).

    Returns:
        What encodes pairs, the pairs, and all quarantined records.

    Raises:
        SimPOError: data that cannot be read or used.
    """
    # All are opened first: a misspelt name is an error before the tokenizer is downloaded.
    inputs, sets = open_train(config, train, display), open_valid(config, valid, display)
    if config.data.folder is not None and not sets:
        display.note(
            f"{config.data.folder} has no validation file (valid.jsonl); data.valid_fraction="
            f"{config.data.valid_fraction:g} of the training prompts are held out"
        )
    encoder, encoded = encode_datasets(config, [*inputs.sources.values(), *sets.values()], display)
    count = len(inputs.sources)
    valid_data = dict(zip(sets, encoded[count:], strict=True))
    pairs = arrange(config, inputs, encoded[:count], valid_data, display)
    return encoder, pairs, [record for data in encoded for record in data.quarantined]


def encode_datasets(
    config: SimPOConfig, sources: Sequence[Source], display: Display
) -> tuple[Encoder, list[EncodedDataset]]:
    """Load the model's tokenizer and encode datasets with it.

    Raises:
        SimPOError: a dataset or the tokenizer cannot be read, or too many records are quarantined.
    """
    tokenizer = load_only_tokenizer(
        config.model, config.revision, trust_remote_code=config.trust_remote_code
    )
    encoder = create_encoder(tokenizer, config, display)
    return encoder, [encode(encoder, source, source.name, display) for source in sources]


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
            f"{name}: {count_text(len(quarantined), 'record')} quarantined, e.g. {first.reason}: "
            f"{first.location}"
        )
    display.note(advice.truncation(result.pairs, encoder.config))
    about_template = template_messages(encoder, result.pairs)
    for note in about_template.notes:
        display.note(f"{name}: {note}")
    for warning in about_template.warnings:
        display.warn(f"{name}: {warning}")
    return EncodedDataset(result.pairs, quarantined)


def arrange(
    config: SimPOConfig,
    inputs: TrainInputs,
    train: Sequence[EncodedDataset],
    valid: dict[str, EncodedDataset],
    display: Display,
) -> RunPairs:
    """Mix the training sources, and limit the validation sets or hold one out.

    Args:
        train: of each of the inputs' sources, in their order. valid: the sets; {}: hold one out.

    Raises:
        SimPOError: no pair of a source is left to train on, though it has a weight.
    """
    parts = {name: data.pairs for name, data in zip(inputs.sources, train, strict=True)}
    pairs = Mixture(parts, inputs.weights)
    if valid:
        sets: dict[str, StoredPairs] = {
            name: limit(data.pairs, name, config, display) for name, data in valid.items()
        }
    else:
        pairs, held = hold_out(pairs, config, display)
        sets = {"": held} if len(held) else {}
    sizes = pairs.sizes
    for name in parts:
        if inputs.weights is not None and not sizes[name]:
            raise SimPOError(
                f"no pair of the source {name!r} is left to train on, because all of its prompts "
                "are held out; set data.valid, or lower data.valid_fraction or data.valid_max"
            )
    order = epoch_order(pairs, config.seed)
    counts = {
        name: SourceCounts(sizes[name], len(data.quarantined), n, n / max(1, order.num_pairs))
        for name, data, n in zip(parts, train, order.counts, strict=True)
    }
    if len(counts) > 1:
        for name, source in counts.items():
            display.note(
                f"{name}: {count_text(source.pairs, 'pair')} to train on, "
                f"{count_text(source.quarantined, 'record')} quarantined; an epoch takes "
                f"{source.per_epoch:,} of them, {source.share:.1%} of the epoch"
            )
    return RunPairs(pairs, sets, counts)


def warn_of_leaks(pairs: RunPairs, display: Display) -> None:
    """Warn of prompts that are both trained and evaluated on, exactly or nearly."""
    if pairs.valid:
        with display.progress("Comparing", len(pairs.train)) as advance:
            warnings = leak_warnings(pairs.train, pairs.valid, advance)
        for warning in warnings:
            display.warn(warning)


def hold_out(pairs: _Pairs, config: SimPOConfig, display: Display) -> tuple[_Pairs, _Pairs]:
    """Split pairs into (training pairs, held-out pairs); see `data.pairs.held_out`.

    No more than data.valid_max are held out; the others stay in the training.
    """
    # Whole prompts are held out: responses to one prompt in both parts would leak.
    fraction, max_pairs = config.data.valid_fraction, config.data.valid_max
    held = held_out(pairs.prompts(), fraction, config.seed)
    total = int(np.count_nonzero(held))
    if max_pairs is not None and total > max_pairs:
        held = held_out(pairs.prompts(), fraction, config.seed, max_pairs)
        display.note(
            f"evaluating on {np.count_nonzero(held):,} of {total:,} pairs (data.valid_max); the "
            "others are trained on"
        )
    valid = pairs.take(np.flatnonzero(held))
    # The first prompt may have more pairs than that, none of which must be trained on.
    return pairs.take(np.flatnonzero(~held)), limit(valid, "", config, display)


def limit(pairs: _Pairs, name: str, config: SimPOConfig, display: Display) -> _Pairs:
    """Return at most data.valid_max pairs of a validation set, drawn at random, and say so."""
    size = config.data.valid_max
    if size is None or len(pairs) <= size:
        return pairs
    where = f" of {name}" if name else ""
    display.note(f"evaluating on {size:,} of {len(pairs):,} pairs{where} (data.valid_max)")
    return pairs.take(draw_sample(len(pairs), size, config.seed))
