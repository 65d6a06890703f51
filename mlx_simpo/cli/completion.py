"""``mlx-simpo completion``: scripts with which a shell completes commands, options and settings.

A script holds all names, so that completing starts no Python: the interpreter alone would take
longer than a person waits for a Tab.
"""

import argparse
import re
from collections.abc import Iterator
from shlex import quote
from typing import Any, NamedTuple

from ..config.schema import all_settings
from ..config.simpo_config import SimPOConfig
from .arguments import Parser
from .output import print_text

SHELLS = ("bash", "zsh", "fish")
_ABOUT = """\
Print a script that completes commands, options and settings; load it in the shell's own file:
bash: eval "$(mlx-simpo completion bash)" in ~/.bashrc; zsh: the same with zsh in ~/.zshrc, after
compinit; fish: mlx-simpo completion fish | source in ~/.config/fish/config.fish.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("completion", help="print a script for the shell's Tab key")
    parser.description = _ABOUT
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the script."""
    from .main import build_parser

    print_text(script(options.shell, build_parser()))


class Command(NamedTuple):
    """A command as a shell completes it.

    path: the words that name it. follow: the words that may come next, with what they are. options:
    its options, with their help. takes_settings: whether settings may follow.
    """

    path: str
    follow: dict[str, str]
    options: dict[str, str]
    takes_settings: bool


def script(shell: str, parser: Parser) -> str:
    """Return the script for a shell, with the commands of a parser."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](list(_commands(parser)))


def _commands(parser: Parser, path: str = "") -> Iterator[Command]:
    """Yield a parser's command and all below it."""
    follow = {name: _summary(inner) for name, inner in parser.commands.items()}
    for action in parser.arguments():
        follow |= {} if parser.commands else dict.fromkeys(action.choices or (), action.help or "")
    options = {
        name: _short((action.help or "") % {"default": action.default})
        for name in parser.option_names()
        if (action := parser.option(name)) and name.startswith("--")
    }
    options |= dict.fromkeys(parser.named, "")
    yield Command(path, follow, options, parser.takes_settings)
    for name, inner in parser.commands.items():
        yield from _commands(inner, f"{path} {name}".strip())


def _summary(parser: Parser) -> str:
    return _short(parser.description or "")


def _short(text: str) -> str:
    """Return the beginning of a help text, which a shell shows beside a name."""
    return re.split(r"[.;:\n]", text, maxsplit=1)[0][:60].strip()


def _settings() -> dict[str, str]:
    """Return the settings with their "=", and what they are."""
    settings = all_settings(SimPOConfig)
    return {f"{name}=": _short(item.metadata["help"]) for name, item, _ in settings}


def _as_typed(path: str) -> str:
    """Return what a script compares: the words so far, a space, and the next word."""
    return path if " " in path else f" {path}"


# --- bash, also the 3.2 of macOS, which has no compopt ---------------------------------------

_BASH = """\
# Completion of mlx-simpo for bash: eval "$(mlx-simpo completion bash)"
_mlx_simpo() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local path= follow= options= settings= word i
    COMPREPLY=()
    # bash splits words at "=": after it comes a value, which may be a file.
    case $previous:$current in
        =:* | *:= | -c:* | --config:*) return ;;
    esac
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$path ${COMP_WORDS[i]}" in
COMMAND_PATTERNS
        esac
    done
    case $path in
COMMAND_WORDS
    esac
    [[ -n $settings ]] && settings="SETTINGS"
    case $current in
        -*) follow=$options ;;
        *) follow="$follow $settings" ;;
    esac
    for word in $(compgen -W "$follow" -- "$current"); do
        case $word in
            *=) COMPREPLY+=("$word") ;;
            *) COMPREPLY+=("$word ") ;;
        esac
    done
    # With no word of ours, bash completes the names of files.
}
complete -o default -o nospace -F _mlx_simpo mlx-simpo
"""


def _bash(commands: list[Command]) -> str:
    patterns, words = [], []
    for command in commands:
        path = command.path
        if path:
            patterns.append(f'            "{_as_typed(path)}") path={quote(path)} ;;')
        settings = " settings=1" if command.takes_settings else ""
        values = f'follow="{" ".join(command.follow)}" options="{" ".join(command.options)}"'
        words.append(f"        {quote(path)}) {values}{settings} ;;")
    text = _BASH.replace("COMMAND_PATTERNS", "\n".join(patterns))
    text = text.replace("COMMAND_WORDS", "\n".join(words))
    return text.replace("SETTINGS", " ".join(_settings()))


# --- zsh -------------------------------------------------------------------------------------

_ZSH = """\
#compdef mlx-simpo
# Completion of mlx-simpo for zsh: eval "$(mlx-simpo completion zsh)", after compinit
_mlx_simpo() {
    local path= word i
    local -a follow options settings
    for ((i = 2; i < CURRENT; i++)); do
        case "$path ${words[i]}" in
COMMAND_PATTERNS
        esac
    done
    case $path in
COMMAND_WORDS
    esac
    case ${words[CURRENT]} in
        -*=*) compset -P '*='; _files ;;
        -*) _describe -o option options ;;
        *=*) compset -P '*='; _files ;;
        *)
            (( $#follow )) && _describe command follow
            (( $#settings )) && _describe -S '' setting settings
            [[ -n $path ]] && _files
            ;;
    esac
}
if [[ ${zsh_eval_context[-1]} == loadautofunc ]]; then
    _mlx_simpo "$@"
else
    compdef _mlx_simpo mlx-simpo
fi
"""


def _zsh(commands: list[Command]) -> str:
    patterns, words = [], []
    for command in commands:
        path = command.path
        if path:
            patterns.append(f'            "{_as_typed(path)}") path={quote(path)} ;;')
        lists = [
            f"follow=({_described(command.follow)})",
            f"options=({_described(command.options)})",
        ]
        lists += [f"settings=({_described(_settings())})"] if command.takes_settings else []
        words.append("\n".join([f"        {quote(path)})", *(f"            {x}" for x in lists)]))
        words[-1] += "\n            ;;"
    text = _ZSH.replace("COMMAND_PATTERNS", "\n".join(patterns))
    return text.replace("COMMAND_WORDS", "\n".join(words))


def _described(names: dict[str, str]) -> str:
    """Return names with their descriptions for _describe."""
    return " ".join(quote(f"{name}:{text}") for name, text in names.items())


# --- fish ------------------------------------------------------------------------------------

_FISH = """\
# Completion of mlx-simpo for fish: mlx-simpo completion fish | source
function __mlx_simpo_path
    set -l path
    for word in (commandline -opc)[2..-1]
        switch "$path $word"
COMMAND_PATTERNS
        end
    end
    test "$path" = "$argv"
end
COMMAND_WORDS
"""


def _fish(commands: list[Command]) -> str:
    patterns, lines = [], []
    for command in commands:
        path = command.path
        if path:
            patterns += [
                f"            case {quote(_as_typed(path))}",
                f"                set path {quote(path)}",
            ]
        here = f"complete -c mlx-simpo -n '__mlx_simpo_path {path}'"
        no_files = " -f" if command.follow else ""
        for name, text in command.follow.items():
            lines.append(f"{here}{no_files} -a {name} -d {_fish_quote(text)}")
        for name, text in command.options.items():
            lines.append(f"{here} -l {name[2:]} -d {_fish_quote(text)}")
        for name, text in _settings().items() if command.takes_settings else ():
            lines.append(f"{here} -a {name} -d {_fish_quote(text)}")
    text = _FISH.replace("COMMAND_PATTERNS", "\n".join(patterns))
    return text.replace("COMMAND_WORDS", "\n".join(lines))


def _fish_quote(text: str) -> str:
    """Quote for fish, in whose single quotes only \\\\ and \\' are special."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
