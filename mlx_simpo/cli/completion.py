"""``mlx-simpo completion``: scripts with which a shell completes commands, options and settings.

A script holds all names, so that completing starts no Python: starting it takes longer than a
person waits for a Tab.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from shlex import quote
from typing import Any, NamedTuple

from ..config.schema import all_settings
from ..config.simpo_config import SimPOConfig
from .arguments import Parser
from .output import print_text
from .setting_names import kinds, setting_named

SHELLS = ("bash", "zsh", "fish")
_ABOUT = """\
Print a script with which the Tab key completes commands, options and settings.

bash, in ~/.bashrc:                   eval "$(mlx-simpo completion bash)"
zsh, in ~/.zshrc, after compinit:     eval "$(mlx-simpo completion zsh)"
fish, in ~/.config/fish/config.fish:  mlx-simpo completion fish | source"""


def add(commands: Any) -> None:
    """Add the command."""
    summary = "print a script for the Tab key of a shell"
    parser = commands.add_parser("completion", help=summary, description=_ABOUT)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the script."""
    from .main import build_parser

    print_text(script(options.shell, build_parser()))


class Command(NamedTuple):
    """A command as a shell completes it.

    path: the words that name it. follow: the words that may come next, with what they are. options:
    its options, with their help. valued: those of them that a value follows. settings: whether
    settings may follow.
    """

    path: str
    follow: Mapping[str, str]
    options: Mapping[str, str]
    valued: list[str]
    settings: bool


def script(shell: str, parser: Parser) -> str:
    """Return the script for a shell, with the commands of a parser."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](list(_commands(parser)))


def _commands(parser: Parser, path: str = "") -> Iterator[Command]:
    """Yield a parser's command, and all below it."""
    follow = {name: _short(inner.description) for name, inner in parser.commands.items()}
    for action in () if parser.commands else parser.arguments():
        follow |= dict.fromkeys(action.choices or (), "")
    options, valued = dict.fromkeys(parser.named, ""), list(parser.named)
    for name in parser.option_names():
        action = parser.option(name)
        if action is not None:
            options[name] = _short((action.help or "") % {"default": action.default})
            valued += [name] if action.nargs != 0 else []
    if parser.takes_settings:
        for option, (name, text) in _setting_options().items():
            options.setdefault(option, text)
            valued += [option] if kinds()[name] != "flag" else []
    yield Command(path, follow, options, valued, parser.takes_settings)
    for name, inner in parser.commands.items():
        yield from _commands(inner, f"{path} {name}".strip())


def _settings() -> dict[str, str]:
    """Return the names of all settings, and what they are."""
    return {name: _short(item.metadata["help"]) for name, item, _ in all_settings(SimPOConfig)}


def _setting_options() -> dict[str, tuple[str, str]]:
    """Return the shortest option for each setting: (the setting's name, what it is)."""
    options = {"--data": ("data.train", "pairs to train on")}
    for name, text in _settings().items():
        leaf = name.rpartition(".")[2]
        is_clear = (known := setting_named(leaf)) is not None and known.name == name
        options[f"--{leaf.replace('_', '-') if is_clear else name}"] = name, text
    return options


def _short(text: str | None) -> str:
    """Return the beginning of a help text, which a shell shows beside a name."""
    return re.split(r"[.;:(\n]", text or "", maxsplit=1)[0][:60].strip()


def _as_typed(path: str) -> str:
    """Return what a script compares: the words so far, a space, and the next word."""
    return path if " " in path else f" {path}"


# --- bash, also the 3.2 of macOS, which has no compopt ---------------------------------------

_BASH = """\
# Completion of mlx-simpo for bash: eval "$(mlx-simpo completion bash)"
_mlx_simpo() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local path= follow= options= valued= settings= word i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$path ${COMP_WORDS[i]}" in
PATTERNS
        esac
    done
    case $path in
COMMANDS
    esac
    # A value may be a file: with no word of ours, bash completes those. It splits words at "=".
    case $previous:$current in
        =:* | *:=) return ;;
    esac
    case " $valued " in
        *" $previous "*) return ;;
    esac
    case $current in
        -*) follow=$options ;;
        *) [[ -n $settings ]] && follow="$follow SETTINGS" ;;
    esac
    for word in $(compgen -W "$follow" -- "$current"); do
        case $word in
            *=) COMPREPLY+=("$word") ;;
            *) COMPREPLY+=("$word ") ;;
        esac
    done
}
complete -o default -o nospace -F _mlx_simpo mlx-simpo
"""


def _bash(commands: list[Command]) -> str:
    lines = []
    for command in commands:
        words = {"follow": command.follow, "options": command.options, "valued": command.valued}
        values = " ".join(f'{name}="{" ".join(value)}"' for name, value in words.items())
        settings = " settings=1" if command.settings else ""
        lines.append(f"        {quote(command.path)}) {values}{settings} ;;")
    names = " ".join(f"{name}=" for name in _settings())
    text = _BASH.replace("PATTERNS", _patterns(commands)).replace("COMMANDS", "\n".join(lines))
    return text.replace("SETTINGS", names)


def _patterns(commands: list[Command]) -> str:
    """Return the cases that recognize the command; bash and zsh write them alike."""
    paths = [command.path for command in commands if command.path]
    return "\n".join(f'            "{_as_typed(path)}") path={quote(path)} ;;' for path in paths)


# --- zsh -------------------------------------------------------------------------------------

# Not "path", which zsh ties to PATH.
_ZSH = """\
#compdef mlx-simpo
# Completion of mlx-simpo for zsh: eval "$(mlx-simpo completion zsh)", after compinit
_mlx_simpo() {
    local command= valued= i
    local -a follow options settings
    for ((i = 2; i < CURRENT; i++)); do
        case "$command ${words[i]}" in
PATTERNS
        esac
    done
    case $command in
COMMANDS
    esac
    case ${words[CURRENT]} in
        *=*) compset -P '*='; _files; return ;;
        -*) _describe -o option options; return ;;
    esac
    case " $valued " in
        *" ${words[CURRENT - 1]} "*) _files; return ;;
    esac
    if (( $#follow )); then
        _describe command follow
    else
        (( $#settings )) && _describe setting settings -S '='
        _files
    fi
}
if [[ ${zsh_eval_context[-1]} == loadautofunc ]]; then
    _mlx_simpo "$@"
else
    compdef _mlx_simpo mlx-simpo
fi
"""


def _zsh(commands: list[Command]) -> str:
    lines = []
    for command in commands:
        lines += [
            f"        {quote(command.path)})",
            f"            follow=({_described(command.follow)})",
            f"            options=({_described(command.options)})",
            f'            valued="{" ".join(command.valued)}"',
        ]
        lines += [f"            settings=({_described(_settings())})"] if command.settings else []
        lines.append("            ;;")
    patterns = _patterns(commands).replace(" path=", " command=")
    return _ZSH.replace("PATTERNS", patterns).replace("COMMANDS", "\n".join(lines))


def _described(names: Mapping[str, str]) -> str:
    """Return names with their descriptions for _describe."""
    return " ".join(quote(f"{name}:{text}" if text else name) for name, text in names.items())


# --- fish ------------------------------------------------------------------------------------

_FISH = """\
# Completion of mlx-simpo for fish: mlx-simpo completion fish | source
function __mlx_simpo_command
    set -l path
    for word in (commandline -opc)[2..-1]
        switch "$path $word"
PATTERNS
        end
    end
    test "$path" = "$argv"
end
COMMANDS
"""


def _fish(commands: list[Command]) -> str:
    patterns, lines = [], []
    for command in commands:
        if command.path:
            patterns.append(f"            case {quote(_as_typed(command.path))}")
            patterns.append(f"                set path {quote(command.path)}")
        here = f"complete -c mlx-simpo -n '__mlx_simpo_command {command.path}'"
        for name, text in command.follow.items():
            lines.append(f"{here} -f -a {name} -d {_fish_quote(text)}")
        for name, text in command.options.items():
            valued = " -r" if name in command.valued else ""
            option = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
            lines.append(f"{here} {option}{valued} -d {_fish_quote(text)}")
        for name, text in _settings().items() if command.settings else ():
            lines.append(f"{here} -a {name}= -d {_fish_quote(text)}")
    text = _FISH.replace("PATTERNS", "\n".join(patterns))
    return text.replace("COMMANDS", "\n".join(lines))


def _fish_quote(text: str) -> str:
    r"""Quote for fish, in whose single quotes only \\ and \' are special."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
