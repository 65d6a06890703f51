"""From the words after a command to its options, its settings and its configuration file.

`words` sorts them. Then argparse reads the command's own options, and options of other tools become
our settings, whose values may depend on each other.
"""

import argparse
import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..config.aliases import as_text, as_words, meaning, plain_name
from ..config.simpo_config import load_config, read_file
from ..config.value_types import RawText, plain_value
from ..errors import SimPOError, messages_of
from . import mistakes
from .arguments import Parser
from .setting_names import setting_named
from .words import Foreign, Setting, SortedWords, sort_words


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


def read_command_line(parser: Parser, words: Iterable[str]) -> CommandLine:
    """Read the words after a command, whose parser this is."""
    line = sort_words(parser, words)
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
    # A configuration file is told by its name, wherever it is among the arguments.
    ends = mistakes.YAML if parser.takes_settings else ()
    plain = deque(p for p in line.plain if not p.word.endswith(ends))
    configs = [p.word for p in line.plain if p.word.endswith(ends)]
    arguments = []
    for action in parser.arguments():
        arguments += line.named.get(action.dest, [])
        most = len(plain) if action.nargs == "*" else int(action.dest not in line.named)
        arguments += [plain.popleft().word for _ in range(min(most, len(plain)))]
    for word, before in plain:
        if parser.takes_settings and mistakes.may_be_config(word):
            configs.append(word)
        elif line.named:
            dest = next(iter(line.named))
            line.mistakes.append(mistakes.set_twice(dest, [*line.typed[dest], word]))
        elif parser.takes_settings:
            line.mistakes.append(_misplaced(parser, line, word, before))
        else:
            line.mistakes.append(f"unexpected word {word!r}; leave it out")
    return arguments, configs


def _misplaced(parser: Parser, line: SortedWords, word: str, before: str) -> str:
    """Return the message for a word too many; options that were typed already are not suggested."""
    if "data" in line.typed and mistakes.is_data_file(word):
        return mistakes.set_twice("--data", [*line.typed["data"], word])
    options = [
        name
        for name in parser.option_names()
        if (action := parser.option(name)) is not None and action.dest not in line.typed
    ]
    return mistakes.misplaced_word(word, before, options)


def _one_config(option: str | None, words: Sequence[str], line: SortedWords) -> str | None:
    """Return the configuration file, of which a command line has one at most."""
    files = [*words, *([option] if option is not None else [])]
    if len(files) > 1:
        line.mistakes.append(
            f"one configuration file at most, not {' and '.join(files)}; settings are written as "
            "name=value, without spaces"
        )
    return files[0] if len(files) == 1 else None


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
    value = foreign.value
    here = meaning(foreign.name, RawText(value) if isinstance(value, str) else value, others)
    assert here is not None
    if not here.is_same:
        line.mistakes.append(f"{foreign.typed}: {as_words(here)}")
        return None
    settings = [Setting(name, as_text(v), foreign.typed) for name, v in here.settings.items()]
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


def mistakes_of_settings(parser: Parser, line: CommandLine) -> list[str]:
    """Return what else is wrong with the settings, beside the mistakes of the words.

    A model that is missing is not told: it may be one of the words that could not be read.
    """
    if not parser.takes_settings:
        return []
    try:
        load_config(line.options.config, ["model=model", *line.options.settings])
    except SimPOError as error:
        return [message for message in messages_of(error) if message not in line.mistakes]
    return []
