"""Sorts the words of a command line: options, settings, and words that are neither.

One pass, in which each option takes its values; whether these are valid is not looked at here.
Mistakes are collected and not raised: a user is told all of them at once.
"""

import argparse
import re
import shlex
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..config.aliases import ALIASES, meaning, plain_name
from ..config.yaml import dump_inline
from . import mistakes
from .arguments import Parser
from .setting_names import Kind, Known, is_section, is_setting, kinds, setting_named

_OPTION = re.compile(r"--?[A-Za-z]\S*")
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_BOOLEANS = ("true", "false", "unsloth")  # the last: of --use_gradient_checkpointing


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
    named: dict[str, list[str]] = field(default_factory=dict)
    typed: dict[str, list[str]] = field(default_factory=dict)
    settings: list[Setting] = field(default_factory=list)
    foreign: list[Foreign] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)


def sort_words(parser: Parser, words: Iterable[str]) -> SortedWords:
    """Sort the words after a command, whose parser this is."""
    return _Sorter(parser, words).sort()


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
            is_list = any(a.dest == dest and a.nargs == "*" for a in self.parser.arguments())
            values = self._values("values" if is_list else "value", value)
            self.line.typed.setdefault(dest, []).append(_typed(word, values, value))
            self.line.named[dest] = values or [""]
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
            # With a value, argparse complains.
            values, words = [], [word.replace("_", "-") if value is None else word]
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
        needs_one = here is not None and True in here.settings.values() and kind != "flag"
        if values == [""] or (not values and needs_one):
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
            may_be_any = not values and kind is not None  # a value like a=b
            if (_is_setting_word if may_be_any else _stands_alone)(self.words[0]):
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
        if not self.parser.takes_settings:
            is_spaced = False
        elif is_name and not value and (equals or is_setting(name)):  # model= X, model X
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
            command, option = self.parser.prog.partition(" ")[2], f"--{name}"
            is_option = self.parser.option(option) is not None
            fix = f"write {option} {value} for" if is_option else "leave out"
            self.line.mistakes.append(f"{command} takes no settings; {fix} {word!r}")
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
    """Return whether a word is name=value with the name of a setting."""
    name, equals, _ = word.partition("=")
    return bool(equals) and is_setting(name)


def _stands_alone(word: str) -> bool:
    """Whether a word cannot be the value of the word before it."""
    name, equals, _ = word.partition("=")
    has_name = equals != "" and _NAME.fullmatch(name) is not None
    is_apart = _OPTION.fullmatch(name) is not None or word.endswith(mistakes.YAML)
    return is_apart or has_name or mistakes.lacks_equals(word)
