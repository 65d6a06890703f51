"""The settings of one source of pairs, in the lists of data.train and data.valid."""

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from .schema import NON_EMPTY, POSITIVE, Rule, Section, setting

# Names of sources and of validation sets are parts of the names of metrics, eval/NAME/loss.
NAME = Rule("letters, digits, - and _", lambda v: re.fullmatch(r"[A-Za-z0-9_-]+", v) is not None)


@dataclass(frozen=True)
class SourceConfig(Section):
    """One file, folder or Hub dataset, and which of it is used.

    split, subset, columns and max_samples that are null are those of the section data.
    """

    path: str = setting(help="file, folder or Hub dataset of pairs, or - for stdin", rule=NON_EMPTY)
    name: str | None = setting(None, "name in counts and metrics; null: from the path", NAME)
    split: str | None = setting(None, "split of a folder or Hub dataset", NON_EMPTY)
    subset: str | None = setting(None, "configuration of a Hub dataset", NON_EMPTY)
    columns: dict[str, str] | None = setting(None, "names of its columns, as in data.columns")
    max_samples: int | None = setting(
        None, "use so many of its records, drawn at random; null: all", POSITIVE
    )
    weight: float | None = setting(
        None,
        "share of the pairs of an epoch, relative to the other sources; null: all pairs are used",
        POSITIVE,
    )


def default_name(path: str) -> str:
    """Return what a source without a name is called: its file's name without endings, or the name
    of its folder or dataset, with - for what `NAME` does not allow."""
    stem = "stdin" if path == "-" else PurePath(path).name.split(".")[0]
    return re.sub("[^A-Za-z0-9_]+", "-", stem).strip("-") or "data"


# A list or a mapping of sources, each with its settings or just with its path.
Sources = str | SourceConfig | tuple[SourceConfig, ...]
NamedSources = str | SourceConfig | dict[str, SourceConfig]
# Values of template_args: whatever a template compares or writes.
TemplateArguments = dict[str, Any]
