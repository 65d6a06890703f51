"""The settings of the section data: which pairs are read, and how they become tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from .schema import FRACTION, NON_EMPTY, POSITIVE, SHARE, Rule, Section, join, setting
from .sources import (
    NAME,
    NamedSources,
    SourceConfig,
    Sources,
    TemplateArguments,
    default_name,
)

_AT_LEAST_TWO = Rule("2 or greater", lambda v: v >= 2)


@dataclass(frozen=True)
class DataConfig(Section):
    """Which pairs are read, and how they become tokens."""

    NAME: ClassVar[str] = "data"

    train: Sources | None = setting(
        None,
        "preference pairs to train on: a file, a folder, a Hub dataset, - for stdin; or a list of "
        "sources, [{path: …, split: …, subset: …, columns: …, max_samples: …, weight: …}, …]",
        NON_EMPTY,
        # A resumed run compares the pairs themselves.
        on_resume="free",
    )
    train_split: str | None = setting(
        None, "split to train on, of a folder or Hub dataset", NON_EMPTY, "free"
    )
    valid: NamedSources | None = setting(
        None,
        "preference pairs to evaluate on, or several sets by name, {chat: …, safety: …}; null: "
        "hold out data.valid_fraction",
        NON_EMPTY,
        on_resume="free",
    )
    valid_split: str | None = setting(
        None, "split to evaluate on, of a folder or Hub dataset", NON_EMPTY, "free"
    )
    valid_main: str | None = setting(
        None,
        "which of several validation sets decides what the best adapter is, early stopping and the "
        "result; null: the first",
        NON_EMPTY,
    )
    folder: str | None = setting(
        None,
        "folder with train.jsonl and valid.jsonl, as for mlx_lm; instead of train and valid",
        NON_EMPTY,
        on_resume="free",
    )
    subset: str | None = setting(
        None,
        "configuration of a Hub dataset that has several of them (load_dataset's name)",
        NON_EMPTY,
        on_resume="free",
    )
    columns: dict[str, str] | None = setting(
        None,
        "names that the data has for prompt, chosen, rejected, system and tools, e.g. {prompt: "
        "question}",
        NON_EMPTY,
        on_resume="free",
    )
    max_samples: int | None = setting(
        None,
        "use so many records of each training source, drawn at random, for a trial; null: all",
        POSITIVE,
        on_resume="free",
    )
    valid_max: int | None = setting(
        500,
        "evaluate on so many pairs of each validation set at most, drawn at random; null: all",
        POSITIVE,
        on_resume="free",
    )
    valid_fraction: float = setting(
        0.05, "fraction of the training prompts to hold out if data.valid is null", FRACTION
    )
    max_length: int = setting(
        1024, "maximum number of tokens of prompt and response together", _AT_LEAST_TWO
    )
    max_prompt_length: int = setting(
        512,
        "minimum number of tokens that a prompt keeps if a pair is too long: first the prompt is "
        "cut, on the left, then the responses, on the right",
        POSITIVE,
    )
    chat_template: str = setting(
        "auto",
        "auto: the tokenizer's own, or plain text if it has none; none: plain text; anything else: "
        "a template file, or the Jinja text itself",
        NON_EMPTY,
        on_resume="free",  # its text is compared
    )
    template_args: TemplateArguments | None = setting(
        None,
        "arguments for the chat template, e.g. {enable_thinking: false}; evaluate and generate use "
        "them, too",
        NON_EMPTY,
    )
    score: Literal["all", "after_thinking"] = setting(
        "all",
        "which part of a response with thinking counts: all of it, or what comes after_thinking",
    )
    compat: Literal["official"] | None = setting(
        None,
        "official: tokenize as princeton-nlp/SimPO does, which scores the assistant header too",
    )
    implicit_string_prompts: bool = setting(
        False,
        "use the common beginning of chosen and rejected strings as their prompt if they have none",
    )
    max_quarantined: float = setting(
        0.05, "stop if more than this fraction of the records has to be quarantined", SHARE, "free"
    )

    def conflicts(self) -> Iterator[str]:
        """Yield a message for all settings that exclude each other."""
        if self.max_prompt_length >= self.max_length:
            yield (
                f"data.max_prompt_length is {self.max_prompt_length}; it must be less than "
                f"data.max_length ({self.max_length}), so that there is room for the responses; "
                f"set data.max_prompt_length={max(1, self.max_length // 2)}, for example"
            )
        if self.valid_split is not None and self.valid is None and self.folder is None:
            yield (
                "data.valid_split is set without data.valid; set data.valid to the folder or "
                "dataset that has this split (it may be the same as data.train)"
            )
        if self.compat == "official" and self.chat_template == "none":
            yield "data.compat=official needs a chat template; set data.chat_template=auto"
        if self.compat == "official" and self.score != "all":
            yield f"data.score is {self.score}, but data.compat=official scores all; remove one"
        if self.folder is not None and (self.train is not None or self.valid is not None):
            other = "data.train" if self.train is not None else "data.valid"
            yield f"data.folder and {other} both name data; remove one of them"
        if self.folder is not None and self.train_split is not None:
            yield (
                f"data.train_split is {self.train_split!r}, but the files of data.folder are named "
                "by their splits; remove one of the two"
            )
        yield from self._source_conflicts()

    def _source_conflicts(self) -> Iterator[str]:
        """Yield a message for what is wrong with the sources and sets taken together."""
        weighted = [source.weight is not None for source in self.train_sources()]
        if any(weighted) and not all(weighted):
            yield "only some sources of data.train have a weight; give each of them one, or none"
        by_name: dict[str, SourceConfig] = {}
        for source in self.train_sources():
            name = str(source.name)
            if by_name.setdefault(name, source) is not source:
                yield (
                    f"two sources of data.train are called {name!r}; give one another name, for "
                    f"example {{path: {source.path}, name: {name}-2}}"
                )
        sets = self._valid_by_name()
        named = [*self.valid] if isinstance(self.valid, dict) else []
        for name in named:
            if not NAME.holds(name):
                yield f"{name!r} in data.valid is the name of a set; it must be {NAME.text}"
        for name, source in sets.items():
            where = join("data.valid", name) if name else "data.valid"
            if source.weight is not None:
                yield f"{where}.weight is {source.weight}; only data.train has weights"
            if source.name is not None:
                yield (
                    f"{where}.name is {source.name!r}, but validation sets are named by their "
                    f"keys, data.valid: {{{source.name}: …}}; remove it"
                )
        if self.valid_main is not None and self.valid_main not in named:
            there = ", ".join(named) or "which has no named sets"
            name = repr(self.valid_main)
            yield f"data.valid_main is {name}; it must be a name in data.valid ({there})"

    def train_sources(self) -> tuple[SourceConfig, ...]:
        """Return the sources of data.train, each with a name and with this section's defaults."""
        if self.folder is not None:
            sources = (SourceConfig(self.folder, split="train"),)
        elif self.train is None:
            return ()
        else:
            sources = self.train if isinstance(self.train, tuple) else (_as_source(self.train),)
        return tuple(
            self._complete(source, self.train_split, source.max_samples or self.max_samples)
            for source in sources
        )

    def valid_sources(self) -> dict[str, SourceConfig]:
        """Return the sets of data.valid by name, with this section's defaults.

        The name of a set that has none is "". {} if the pairs are held out of the training pairs.
        Without a split, those of data.folder are its validation files, however these are called.
        """
        if self.folder is not None:
            return {"": self._complete(SourceConfig(self.folder), self.valid_split)}
        sets = self._valid_by_name()
        return {name: self._complete(source, self.valid_split) for name, source in sets.items()}

    def _valid_by_name(self) -> dict[str, SourceConfig]:
        """Return the sets of data.valid as they are set; the name of an unnamed one is ""."""
        if self.valid is None:
            return {}
        return self.valid if isinstance(self.valid, dict) else {"": _as_source(self.valid)}

    def _complete(
        self, source: SourceConfig, split: str | None, max_samples: int | None = None
    ) -> SourceConfig:
        """Return a source with a name, and with these defaults where it has no setting."""
        return replace(
            source,
            name=source.name or default_name(source.path),
            split=source.split or split,
            columns=source.columns or self.columns,
            max_samples=max_samples or source.max_samples,
        )


def _as_source(value: str | SourceConfig) -> SourceConfig:
    return SourceConfig(value) if isinstance(value, str) else value
