"""What a user is told about words that cannot be used, with the words that can."""

import difflib
import re
import shlex
from collections.abc import Container, Iterable, Sequence
from shlex import quote

from ..config.aliases import as_text, as_words, meaning
from ..config.hints import hint_at_name
from ..config.schema import all_settings, setting_names
from ..config.simpo_config import SimPOConfig
from ..config.value_types import RawText, is_required
from ..errors import SimPOError
from ..paths import local_path
from .setting_names import is_setting, kinds, setting_named

YAML = (".yaml", ".yml")
_DATA = re.compile(r"\.(jsonl|json|parquet|arrow|csv|tsv)(\.(gz|zst))?$")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_COLON = re.compile(r"([A-Za-z_][\w.-]*):\s*(.+)", re.DOTALL)


def fix(name: str, value: str) -> str | None:
    """Return what to type for a setting that was written with a name like this, if there is one."""
    known = setting_named(name)
    if is_setting(name) or known:
        return f"write {_setting(name if is_setting(name) or not known else known.name, value)}"
    here = meaning(name, RawText(value), {})
    return as_words(here) if here else None


def _setting(name: str, value: str) -> str:
    return quote(f"{name}={value}")


def spaced(name: str, value: str, typed: str) -> str:
    """Return the message for ``model = X``, which a shell splits into three words."""
    words = fix(name, value) or f"write {quote(name + '=' + value)}"
    return f"{typed}: {words}, without spaces"


def set_twice(name: str, typed: Sequence[str]) -> str:
    """Return the message for a setting or option that appears more than once."""
    rest = "one" if len(typed) == 2 else "all but one"
    return f"{name} is set by {' and by '.join(typed)}; remove {rest} of them"


def no_value(name: str, typed: str) -> str:
    """Return the message for a setting without a value, such as an unset variable leaves behind."""
    return f"{typed} has no value; write {_setting(name, example(name))}, or leave it out"


def example(name: str) -> str:
    """Return a value that a setting may have: its default."""
    items = {setting: item for setting, item, _ in all_settings(SimPOConfig)}
    default = items[name].default if name in items and not is_required(items[name]) else None
    if default is None:
        return "true" if kinds().get(name) == "flag" else "VALUE"
    return as_text(list(default) if isinstance(default, tuple) else default)


def unknown_option(typed: str, options: Iterable[str], *, takes_settings: bool) -> str:
    """Return the message for an option that neither we nor another tool have."""
    name = re.split("[= ]", typed, maxsplit=1)[0]
    close = difflib.get_close_matches(name.replace("_", "-"), list(options), n=1, cutoff=0.7)
    if close:
        hint = f"; did you mean {close[0]!r}?"
    else:
        plain = name.lstrip("-").replace("-", "_")
        hint = hint_at_name(plain, setting_names(SimPOConfig)) if takes_settings else ""
    return f"unknown option {typed!r}{hint}"


def is_data_file(word: str) -> bool:
    """Return whether a word ends like the name of a file of pairs."""
    return _DATA.search(word) is not None


def may_be_config(word: str) -> bool:
    """Return whether a word may be the name of a configuration file, or a misspelt one."""
    if word.endswith(YAML):
        return True
    path = None if is_data_file(word) else word
    return path is not None and _is_path(path) and not local_path(path).is_dir()


def lacks_equals(word: str) -> bool:
    """Return whether a word is a setting's name, or ``name: value`` as in a file."""
    colon = _COLON.fullmatch(word)
    return is_setting(word) or (colon is not None and setting_named(colon[1]) is not None)


def misplaced_word(word: str, before: str | None, options: Container[str] = ()) -> str:
    """Return the message for a word that is neither an option nor a setting nor a YAML file.

    Args:
        before: the word before it. options: the names of the command's own options, which say what
            a file or a text can be for it.
    """
    if before and "=" in before and _is_path(value := f"{before.partition('=')[2]} {word}"):
        return (
            f"{word!r} is a part of the name {value!r}; write {quote(f'{before} {word}')}, quoted"
        )
    if (colon := _COLON.fullmatch(word)) and (words := fix(colon[1], colon[2])):
        return f"{word!r} is not a setting of the form name=value; {words}"
    if known := setting_named(word):
        words = fix(known.name, example(known.name))
        return f"{word!r} is not a setting of the form name=value; {words}"
    if option := _option_for(word, options):
        return f"{word!r} is not a configuration file; write {option} {quote(word)}"
    if is_data_file(word):
        return f"{word!r} is not a configuration file; write {_setting('data.train', word)}"
    if _is_path(f"{word}/config.json") or (_HUB_ID.fullmatch(word) and not _is_path(word)):
        return f"{word!r} is not a configuration file; write {_setting('model', word)}"
    if _is_path(word):
        return f"{word!r} is not a configuration file; {fix('data', word)}"
    return (
        f"unexpected word {word!r}; write settings as name=value, and the name of a YAML file; "
        "text of several words needs quotes"
    )


def _option_for(word: str, options: Container[str]) -> str | None:
    """Return the option of a command that a word is probably the value of, if there is one."""
    if "--adapter" in options and _is_path(f"{word}/adapter_config.json"):
        return "--adapter"
    if is_data_file(word):
        is_new = "--output" in options and not _is_path(word)
        names = ("--output",) if is_new else ("--prompts", "--data")
    elif " " in word or not (_is_path(word) or _HUB_ID.fullmatch(word)):
        names = ("--prompt",)
    else:
        return None
    return next((name for name in names if name in options), None)


def unknown_command(words: Sequence[str], commands: Sequence[str], prefix: str) -> str:
    """Return the message for words that do not begin with a command, with what they may mean."""
    word = words[0]
    if word.startswith("-") or word.endswith(YAML):
        name = next((w for w in words if w in commands), commands[0])
        others = list(words)
        if name in others:
            others.remove(name)
        return f"the command comes first; write {prefix} {shlex.join([name, *others])}"
    close = difflib.get_close_matches(word.lower(), commands, n=1)
    meant = _COMMANDS.get(word.lower().replace("-", "_"))
    name = close[0] if close else meant
    if name and name.partition(" ")[0] in commands:
        return f"unknown command {word!r}; write {prefix} {name}"
    return f"unknown command {word!r}; the commands are {', '.join(commands)}"


# What other tools call our commands.
_COMMANDS = {
    **dict.fromkeys(
        ("simpo", "cpo", "dpo", "sft", "rlhf", "lora", "finetune", "fine_tune"), "train"
    ),
    **dict.fromkeys(("chat", "infer", "inference", "predict", "run"), "generate"),
    **dict.fromkeys(("eval", "test", "benchmark", "score"), "evaluate"),
    **dict.fromkeys(("merge", "merge_lora", "export"), "fuse"),
    **dict.fromkeys(("inspect", "preprocess", "preview", "dataset"), "data inspect"),
    **dict.fromkeys(("upload", "publish"), "push"),
    **dict.fromkeys(("env", "check", "info", "version"), "doctor"),
    **dict.fromkeys(("settings", "show", "print_config"), "config"),
}


def _is_path(name: str) -> bool:
    """Return whether there is such a file or folder."""
    try:
        return local_path(name).exists()
    except (OSError, SimPOError):
        return False
