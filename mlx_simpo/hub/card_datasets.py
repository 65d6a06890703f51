"""What a folder's record says about its data: lines of the model card.

As with all of a record, any part may be missing or of another type (see `card_values`).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .folders import Folder, PublicName, as_text, last_path_part, lookup
from .markdown import is_number


class Dataset(NamedTuple):
    """A line of the card: a dataset and the part of it that was used.

    valid_set: the name of a validation set, if it has one. weight: its share of an epoch, relative
    to the others.
    """

    title: str
    name: PublicName
    valid_set: str | None
    subset: str | None
    split: str | None
    weight: int | float | None


def datasets(folder: Folder) -> list[Dataset]:
    """Return what was trained and evaluated on, as far as the settings name it."""
    data = lookup(folder.settings, "data")
    lines = []
    for title, key, split_key in (
        ("Pairs", "train", "train_split"),
        ("Evaluation", "valid", "valid_split"),
    ):
        for valid_set, source in _sources(lookup(data, key)):
            name = folder.public_name(lookup(source, "path"))
            if name is None:
                continue
            split = as_text(lookup(source, "split")) or as_text(lookup(data, split_key))
            subset = as_text(lookup(source, "subset")) or as_text(lookup(data, "subset"))
            weight = lookup(source, "weight")
            lines.append(
                Dataset(
                    title, name, valid_set, subset, split, weight if is_number(weight) else None
                )
            )
    local = as_text(lookup(data, "folder"))
    if local is not None:
        name = PublicName(last_path_part(local), False)
        lines.append(Dataset("Pairs", name, None, None, None, None))
    return lines


def _sources(value: Any) -> Iterator[tuple[str | None, Any]]:
    """Yield (name of a validation set or None, source) of data.train or data.valid.

    Either is a path, a source (a mapping with a path), a list of these, or a mapping of names to
    these.
    """
    if isinstance(value, str):
        yield None, {"path": value}
    elif isinstance(value, list):
        for item in value:
            yield None, {"path": item} if isinstance(item, str) else item
    elif isinstance(value, Mapping) and isinstance(value.get("path"), str):
        yield None, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield str(name), {"path": item} if isinstance(item, str) else item
