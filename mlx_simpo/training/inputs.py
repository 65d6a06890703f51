"""What a run reads: the sources that its settings name, or rows from memory."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..config.data_config import DataConfig
from ..config.simpo_config import SimPOConfig
from ..config.sources import NAME, SourceConfig
from ..data.memory import memory_source
from ..data.overview import TRAIN, VALID
from ..data.rows import Source
from ..data.sampling import sample_records
from ..data.sources import data_files, looks_like_hub_id, open_source, split_names
from ..errors import SimPOError
from ..paths import local_path
from ..reporting.display import Display, count_text

# What the validation files of data.folder may be called: by mlx-lm, the Hub, and people.
VALID_SPLITS = ("valid", "validation", "val", "dev")


class OpenedSource(NamedTuple):
    """A source to be looked at. role: `data.overview.TRAIN`, VALID, or "" if that is not said."""

    name: str
    role: str
    source: Source


class TrainInputs(NamedTuple):
    """The training sources by name, and their weights, or None if all their pairs are used."""

    sources: dict[str, Source]
    weights: tuple[float, ...] | None


def open_train(config: SimPOConfig, rows: Any, display: Display) -> TrainInputs:
    """Open the training sources, or ``rows`` (see `data.memory.memory_source`) if not None.

    Raises:
        SimPOError: there are none, they cannot be opened, or rows and settings both name them.
    """
    data = config.data
    if rows is not None:
        _check_alone("train", data, "train", "folder", "train_split")
        source = memory_source(rows, "train", data.columns)
        return TrainInputs({"train": sample(source, data.max_samples, config, display)}, None)
    configs = data.train_sources()
    if not configs:
        raise SimPOError(
            "data.train is missing; name a file, a folder or a Hugging Face dataset, or pass rows "
            "from memory: train(config, train=rows)"
        )
    if data.folder is not None:
        _check_folder(data.folder)
    sources = {str(source.name): open_dataset(config, source, display) for source in configs}
    weights = tuple(source.weight for source in configs if source.weight is not None)
    return TrainInputs(sources, weights or None)


def open_valid(config: SimPOConfig, rows: Any, display: Display) -> dict[str, Source]:
    """Open the validation sets by name, {} if there are none; the name of an unnamed one is "".

    Args:
        rows: instead of those of the settings, if not None; or several sets of rows by name.

    Raises:
        SimPOError: they cannot be opened, or rows and settings both name them.
    """
    data = config.data
    if rows is not None:
        _check_alone("valid", data, "valid", "folder")
        return _valid_rows(rows, data)
    configs = data.valid_sources()
    if data.folder is not None and data.valid_split is None:
        configs = _folder_valid(data.folder, configs[""])
    return {name: open_dataset(config, source, display) for name, source in configs.items()}


def open_inspected(
    config: SimPOConfig, data: Any, split: str | None, display: Display
) -> list[OpenedSource]:
    """Open what is to be looked at: see `api.inspect`.

    Raises:
        SimPOError: it cannot be opened, or there is nothing.
    """
    if data is None:
        if not config.data.train_sources() and not config.data.valid_sources():
            raise SimPOError(
                "there is nothing to look at; name a file, a folder or a Hugging Face dataset, or "
                "a configuration with data.train"
            )
        if split is not None:
            raise SimPOError(
                f"the split is {split!r}, but no data are named; set data.train_split instead"
            )
        train = open_train(config, None, display).sources if config.data.train_sources() else {}
        valid = open_valid(config, None, display)
        return [
            *(OpenedSource(name, TRAIN, source) for name, source in train.items()),
            *(OpenedSource(name or VALID, VALID, source) for name, source in valid.items()),
        ]
    columns, size = config.data.columns, config.data.max_samples
    names = [data] if isinstance(data, str | Path) else data
    if isinstance(names, list | tuple) and names and isinstance(names[0], str | Path):
        configs = [
            SourceConfig(str(name), split=split, columns=columns, max_samples=size)
            for name in names
        ]
        sources = [open_dataset(config, source, display) for source in configs]
        return [
            OpenedSource(str(name), "", source) for name, source in zip(names, sources, strict=True)
        ]
    if split is not None:
        raise SimPOError(f"the split is {split!r}, but rows from memory have none; remove it")
    rows = sample(memory_source(data, "rows", columns), size, config, display)
    return [OpenedSource("rows", "", rows)]


def _check_alone(argument: str, data: DataConfig, *settings: str) -> None:
    """Check that no setting names the data that are passed as rows; SimPOError if one does."""
    for name in settings:
        if getattr(data, name) is not None:
            raise SimPOError(
                f"{argument} has rows from memory, but data.{name} is {getattr(data, name)!r}; "
                f"set data.{name} to null, or leave {argument}=… away"
            )


def _valid_rows(rows: Any, data: DataConfig) -> dict[str, Source]:
    """Return validation rows as sources by name; SimPOError for a name that cannot be used."""
    if not isinstance(rows, Mapping):
        return {"": memory_source(rows, "valid", data.columns)}
    for name in rows or [""]:
        if not isinstance(name, str) or not NAME.holds(name):
            raise SimPOError(
                f"valid is a mapping with the name {name!r}; several validation sets need names "
                f"of {NAME.text}: {{'chat': rows, 'safety': rows}}"
            )
    return {name: memory_source(part, name, data.columns) for name, part in rows.items()}


def _check_folder(folder: str) -> None:
    """Check that data.folder is a local folder; SimPOError if not."""
    if not local_path(folder).is_dir():
        hint = f"; for a Hub dataset, set data.train={folder}" if is_on_hub(folder) else ""
        raise SimPOError(
            f"data.folder is {folder!r}, which is no folder; it must be one with train.jsonl and "
            f"valid.jsonl{hint}"
        )


def _folder_valid(folder: str, source: SourceConfig) -> dict[str, SourceConfig]:
    """Return the validation files of data.folder as a set, {} if there are none.

    Raises:
        SimPOError: it is no folder, or has files of several splits that are for validation.
    """
    _check_folder(folder)
    path = local_path(folder)
    splits = sorted(split_names(path, data_files(path)) & set(VALID_SPLITS))
    if len(splits) > 1:
        raise SimPOError(
            f"data.folder is {folder!r}, which has the splits {' and '.join(splits)}; say which "
            f"one to evaluate on: data.valid_split={splits[0]}"
        )
    return {"": replace(source, split=splits[0])} if splits else {}


def open_dataset(config: SimPOConfig, source: SourceConfig, display: Display) -> Source:
    """Open a dataset; its records are read when they are encoded.

    Raises:
        SimPOError: there is no such dataset, or it needs another split or subset.
    """
    data = config.data
    # data.subset is for the Hub datasets; a local file beside them has none.
    datasets = (source, *data.train_sources(), *data.valid_sources().values())
    is_used = any(other.subset is None and is_on_hub(other.path) for other in datasets)
    if data.subset is not None and not is_used:
        reason = "has a subset of its own"
        if not is_on_hub(source.path):
            reason = "is local; only Hub datasets have subsets"
        raise SimPOError(
            f"data.subset is {data.subset!r}, but {source.path} {reason}; remove data.subset"
        )
    if source.subset is None and is_on_hub(source.path):
        source = replace(source, subset=data.subset)
    return sample(open_source(source), source.max_samples, config, display)


def is_on_hub(name: str) -> bool:
    """Return whether a dataset's name is not that of a local file or folder, but a Hub id."""
    return looks_like_hub_id(name) and not local_path(name).exists()


def sample(source: Source, size: int | None, config: SimPOConfig, display: Display) -> Source:
    """Return a source with at most ``size`` of its records, and say so; None: all of them."""
    if size is None:
        return source
    count = source.count()
    if count <= size:
        records = count_text(count, "record")
        display.note(f"{source.name} has {records}, all of which are used (max_samples={size})")
        return source
    display.note(f"using {size:,} of {count:,} records of {source.name} (max_samples)")
    return sample_records(source, count, size, config.seed)
