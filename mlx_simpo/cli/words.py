"""From the words of a command line to a command's options, settings and configuration file.

One pass sorts the words; then names of other tools become ours, because their values may depend on
each other, and argparse reads the options that the command has itself. Mistakes are collected and
not raised: a user is told all of them at once.
"""

import argparse
import contextlib
import re
import shlex
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..config.aliases import ALIASES, as_text, as_words, meaning, plain_name
from ..config.simpo_config import read_file
from ..config.value_types import RawText, plain_value
from ..config.yaml import dump_inline
from ..errors import SimPOError
from . import mistakes
from .arguments import Parser
from .setting_names import Kind, Known, is_section, is_setting, kinds, setting_named

_OPTION = re.compile(r"--?[A-Za-z]\S*")
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_BOOLEANS = ("true", "false")


class Setting(NamedTuple):
    """A setting of the command line. typed: the words that it was typed as."""

    name: str
    value: str
    typed: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


class Foreign(NamedTuple):
    """An option that another tool has. value: a text, a list of texts, or whether a flag is set."""

    name: str
    value: str | list[str] | bool
    typed: str


class Plain(NamedTuple):
    """A word that is neither an option nor a setting, and the word before it."""

    word: str
    before: str


@dataclass
class SortedWords:
    """The words of a command line, sorted.

    own: the command's own options, as argparse reads them. named: its arguments that were written
    as options. typed: the words of each of both.
    """

    plain: list[Plain] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    typed: dict[str, list[str]] = field(default_factory=dict)
    settings: list[Setting] = field(default_factory=list)
    foreign: list[Foreign] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)


class CommandLine(NamedTuple):
    """What a command line says.

    options: the command's own options, with ``config`` (a file or None), ``settings``
    ("name=value", each name once) and ``origins`` (a setting's name: the words that it was typed
    as). notes: what somebody is told who typed the names of another tool. mistakes: all of them;
    with any, the options are not complete.
    """

    options: argparse.Namespace
    notes: list[str]
    mistakes: list[str]


def read_words(parser: Parser, words: Iterable[str]) -> CommandLine:
    """Read the words after a command, whose parser this is."""
    line = _Sorter(parser, words).sort()
    arguments, configs = _split_plain(parser, line)
    options, complaint = argparse.Namespace(), None
    try:
        options = parser.parse_args(line.own + (["--", *arguments] if arguments else []))
    except SimPOError as error:
        complaint = str(error)
    options.config = _one_config(getattr(options, "config", None), configs, line)
    others = _others(options.config, line)
    notes = [note for foreign in line.foreign if (note := _translate(foreign, line, others))]
    line.mistakes += _repeated(parser, line)
    line.mistakes += [
        f"{setting.typed}: leave it out; {reason}"
        for setting in line.settings
        if (reason := parser.without_effect.get(setting.name))
    ]
    # A missing option may be one of those that were misspelt.
    if complaint and not (line.mistakes and "are required" in complaint):
        line.mistakes.append(complaint)
    options.settings = [str(setting) for setting in line.settings]
    options.origins = {setting.name: setting.typed for setting in line.settings}
    return CommandLine(options, notes, line.mistakes)


def _split_plain(parser: Parser, line: SortedWords) -> tuple[list[str], list[str]]:
    """Return the command's own arguments and the configuration files; note words too many."""
    plain, arguments = deque(line.plain), []
    for action in parser.arguments():
        if action.dest in line.named:
            arguments.append(line.named[action.dest])
        else:
            most = 1 if action.nargs in (None, "?") else len(plain)
            arguments += [plain.popleft().word for _ in range(min(most, len(plain)))]
    configs = []
    for word, before in plain:
        if parser.takes_settings and mistakes.may_be_config(word):
            configs.append(word)
        elif line.named:
            dest = next(iter(line.named))
            line.mistakes.append(mistakes.set_twice(dest, [*line.typed[dest], word]))
        elif parser.takes_settings:
            line.mistakes.append(mistakes.misplaced_word(word, before))
        else:
            line.mistakes.append(f"unexpected word {word!r}; leave it out")
    return arguments, configs


def _one_config(option: str | None, words: Sequence[str], line: SortedWords) -> str | None:
    """Return the configuration file, of which a command line has one at most."""
    files = [*words, *([option] if option is not None else [])]
    if len(files) > 1:
        line.mistakes.append(
            f"one configuration file at most, not {' and '.join(files)}; settings are written as "
            "name=value, without spaces"
        )
    return files[0] if files else None


def _others(config: str | None, line: SortedWords) -> dict[str, Any]:
    """Return the values of all settings, by the names that the rules of other tools look up."""
    others: dict[str, Any] = {}
    with contextlib.suppress(SimPOError):  # told when the configuration is read
        others |= _flat(read_file(config))
    for setting in line.settings:
        value = plain_value(RawText(setting.value))
        others |= {setting.name: value, plain_name(setting.name): value}
    return others | {foreign.name: _value(foreign) for foreign in line.foreign}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with their sections in their names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return flat


def _value(foreign: Foreign) -> Any:
    """Return the value of another tool's option as what its text stands for."""
    value = foreign.value
    return plain_value(RawText(value)) if isinstance(value, str) else value


def _translate(foreign: Foreign, line: SortedWords, others: Mapping[str, Any]) -> str | None:
    """Add the settings that another tool's option is; return a note of what they are.

    If they do not mean the same, they are not added, and what to write is a mistake's message.
    """
    value = _value(foreign)
    here = meaning(foreign.name, value, others)
    assert here is not None
    if not here.is_same:
        line.mistakes.append(f"{foreign.typed}: {as_words(here)}")
        return None
    settings = [
        Setting(name, as_text(foreign.value if v == value else v), foreign.typed)
        for name, v in here.settings.items()
    ]
    line.settings += settings
    ours = setting_named(foreign.name)
    if ours and [setting.name for setting in settings] == [ours.name]:
        return None  # it is our name, too
    note = f" ({here.note})" if here.note and settings else here.note
    return f"{foreign.typed}: {' '.join(map(str, settings))}{note}"


def _repeated(parser: Parser, line: SortedWords) -> Iterator[str]:
    """Yield a message for each option and setting that appears more than once."""
    typed = {name: list(words) for name, words in line.typed.items()}
    for setting in line.settings:
        # An option of the command's own may be a setting as well: --model.
        dest = next((d for d, name in parser.sets.items() if name == setting.name), setting.name)
        typed.setdefault(dest, []).append(setting.typed)
    for name, words in typed.items():
        if len(words) > 1 and not parser.may_repeat(name):
            yield mistakes.set_twice(parser.sets.get(name, name), words)


class _Sorter:
    """Sorts words in one pass."""

    def __init__(self, parser: Parser, words: Iterable[str]) -> None:
        self.parser = parser
        self.words = deque(words)
        self.line = SortedWords()

    def sort(self) -> SortedWords:
        """Sort all words."""
        before = ""
        while self.words:
            word = self.words.popleft()
            if word == "--":
                self.line.plain += [Plain(word, "") for word in self.words]
                self.words.clear()
            elif _OPTION.fullmatch(word.partition("=")[0]):
                self._option(word)
            else:
                self._word(word, before)
            before = word
        return self.line

    # --- options ---

    def _option(self, word: str) -> None:
        name, equals, text = word.partition("=")
        value = text if equals else None
        if action := self.parser.option(name):
            self._own_option(action, word, value)
        elif dest := self.parser.named.get(name):
            values = self._values("value", value)
            self.line.typed.setdefault(dest, []).append(_typed(word, values, value))
            self.line.named[dest] = values[0] if values else ""
        elif not self.parser.takes_settings:
            self._unknown(word, value)
        elif plain_name(name) in ALIASES and "." not in name:
            self._foreign_option(name, word, value)
        elif known := setting_named(name):
            values = self._values(known.kind, value)
            typed = _typed(word, values, value)
            self._set(known, values, typed)
        elif name.startswith(("--no-", "--no_")) and (known := setting_named(name[5:])):
            self._set(known, ["false"], word)
        elif name.startswith(("--no-", "--no_")) and plain_name(name[5:]) in ALIASES:
            self.line.foreign.append(Foreign(plain_name(name[5:]), False, word))
        else:
            self._unknown(word, value)

    def _own_option(self, action: argparse.Action, word: str, value: str | None) -> None:
        """Pass an option on to argparse, which reads and checks its value."""
        option = next((o for o in action.option_strings if o.startswith("--")), word)
        if action.nargs == 0:
            values, words = [], [word]  # with a value, argparse complains
        elif action.nargs is None:
            values = self._values("value", value)
            words = [f"{option}={values[0]}" if values else option]
        else:
            values = self._values("list", value)
            words = [option, *values]
        self.line.own += words
        self.line.typed.setdefault(action.dest, []).append(_typed(word, values, value))

    def _foreign_option(self, name: str, word: str, value: str | None) -> None:
        """Note an option of another tool; what it is here decides how its value is read."""
        here = meaning(name, True, {})
        names = list(here.settings) if here else []
        kind = kinds().get(names[0], "value") if names else None
        values = self._values(kind, value)
        typed = _typed(word, values, value)
        if values == [""] or (not values and kind is not None):
            self.line.mistakes.append(mistakes.no_value(names[0], typed))
        else:
            one = values[0] if values else True
            foreign = Foreign(plain_name(name), values if len(values) > 1 else one, typed)
            self.line.foreign.append(foreign)

    def _set(self, known: Known, values: Sequence[str], typed: str) -> None:
        """Note a setting, or that it has no value."""
        if not values or values == [""]:
            self.line.mistakes.append(mistakes.no_value(known.name, typed))
            return
        is_list = len(values) > 1 or (known.kind == "list" and not values[0].startswith("["))
        text = dump_inline(list(values)) if is_list else values[0]
        self.line.settings.append(Setting(known.name, text, typed))

    def _unknown(self, word: str, value: str | None) -> None:
        """Note an unknown option, with what is probably its value."""
        values = self._values(None, value)
        self.line.mistakes.append(
            mistakes.unknown_option(
                _typed(word, values, value),
                self.parser.option_names(),
                takes_settings=self.parser.takes_settings,
            )
        )

    def _values(self, kind: Kind | None, value: str | None) -> list[str]:
        """Take the values of an option from the words that follow it; [] if there are none.

        Args:
            kind: None if it may have a value or none.
            value: what is written after its "=".
        """
        if value is not None:
            return [value.lower() if kind == "flag" and value.lower() in _BOOLEANS else value]
        if kind == "flag":
            is_boolean = bool(self.words) and self.words[0].lower() in _BOOLEANS
            return [self.words.popleft().lower() if is_boolean else "true"]
        values: list[str] = []
        while self.words and not _OPTION.fullmatch(self.words[0].partition("=")[0]):
            is_other = _is_setting_word(self.words[0]) or self.words[0].endswith(mistakes.YAML)
            if is_other and (values or kind is None):
                break
            values.append(self.words.popleft())
            if kind in ("value", None):
                break
        return values

    # --- other words ---

    def _word(self, word: str, before: str) -> None:
        """Note a setting, or a word that is none; put ``model = X`` together."""
        following = self.words[0] if self.words else ""
        name, equals, value = word.partition("=")
        is_name = _NAME.fullmatch(name) is not None
        is_spaced = is_name and not equals and following.startswith("=")
        if is_name and not value and (equals or is_setting(name)):  # model= X, model X
            is_spaced = is_spaced or (following != "" and not _stands_alone(following))
        if is_spaced:
            words = [word, self.words.popleft()]
            if words[-1] == "=" and self.words:
                words.append(self.words.popleft())
            value = "".join(words[1:]).removeprefix("=")
            self.line.mistakes.append(mistakes.spaced(name, value, " ".join(words)))
        elif not (is_name and equals):
            self.line.plain.append(Plain(word, before))
        elif not self.parser.takes_settings:
            command = self.parser.prog.partition(" ")[2]
            self.line.mistakes.append(f"{command} takes no settings; leave out {word!r}")
        else:
            self._setting_word(name, value, word)

    def _setting_word(self, name: str, value: str, word: str) -> None:
        words = None if is_setting(name) else mistakes.fix(name, value)
        if words and value:
            what = (
                f"{name} is a section of settings"
                if is_section(name)
                else f"unknown setting {name!r}"
            )
            self.line.mistakes.append(f"{what}; {words}")
        elif is_setting(name) and not value:
            self.line.mistakes.append(mistakes.no_value(name, word))
        else:
            self.line.settings.append(Setting(name, value, word))


def _typed(word: str, values: Sequence[str], value: str | None) -> str:
    """Return the words of an option, quoted where a shell needs it."""
    is_flag = value is None and list(values) in (["true"], ["false"])
    return shlex.join([word] if value is not None or is_flag else [word, *values])


def _is_setting_word(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and _NAME.fullmatch(name) is not None


def _stands_alone(word: str) -> bool:
    """Whether a word cannot be the value of the word before it."""
    is_option = _OPTION.fullmatch(word.partition("=")[0]) is not None
    is_setting_word = _is_setting_word(word) or is_setting(word)
    return is_option or is_setting_word or word.endswith(mistakes.YAML)
