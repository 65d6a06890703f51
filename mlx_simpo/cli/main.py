"""The command line: ``mlx-simpo train | evaluate | generate | data | fuse | convert | push | …``.

Results go to stdout, everything else to stderr. `command_line` reads what was typed. A command
imports what it needs when it runs: MLX and mlx-lm take more than a second, which --help and
--version need not wait for.
"""

import os
import signal
import sys
from collections.abc import Sequence
from typing import cast

from ..errors import InvalidSettingsError, SimPOError, messages_of
from ..training.stopping import exit_status
from ..version import __version__
from . import (
    completion,
    config,
    convert,
    data,
    doctor,
    evaluate,
    fuse,
    generate,
    interrupt,
    push,
    train,
)
from .arguments import Parser
from .command_line import mistakes_of_settings, read_command_line
from .mistakes import unknown_command
from .output import print_error, print_note, print_text
from .overview import OVERVIEW

# In the order of --help.
COMMANDS = (
    train,
    evaluate,
    generate,
    data,
    fuse,
    convert,
    push,
    doctor,
    config,
    completion,
)
_HELP = ("-h", "--help")
_READER_GONE = exit_status(signal.SIGPIPE)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return the exit status: 0, 2 for bad input, 130 for Ctrl-C, 141 if the
    reader of its output has gone (``| head``).

    `train` has some of its own.
    """
    try:
        return _run(list(arguments))
    except SimPOError as error:
        for message in messages_of(error):
            print_error(message)
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(interrupt.INTERRUPTED)
        return interrupt.STATUS
    except BrokenPipeError:
        # Python writes what is left at its end, which would be another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _READER_GONE


def _run(words: list[str]) -> int:
    """Run the command that these words are, and return its exit status.

    Raises:
        InvalidSettingsError: the words have mistakes; it tells all of them.
        SimPOError: the command fails.
    """
    if words in ([], ["help"]):
        print_text(OVERVIEW)
        return 0
    if words[0] == "help":
        words = [*words[1:], _HELP[-1]]
    parser, words = _command_of(build_parser(), words)
    if any(word in words for word in _HELP):
        parser.print_help()
        return 0
    line = read_command_line(parser, words)
    if line.mistakes:
        raise InvalidSettingsError([*line.mistakes, *mistakes_of_settings(parser, line)])
    for note in line.notes:
        print_note(note)
    return line.options.run(line.options) or 0


def build_parser() -> Parser:
    """Return the parser of the command line with all its commands."""
    parser = Parser(
        prog="mlx-simpo", description="SimPO LoRA fine-tuning of language models with MLX."
    )
    parser.add_argument("--version", action="version", version=f"mlx-simpo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def _command_of(parser: Parser, words: list[str]) -> tuple[Parser, list[str]]:
    """Return the parser of the command that the first words name, and the words after them.

    Raises:
        SimPOError: there is no such command.
    """
    while parser.commands:
        first, *rest = words or [""]
        if first in parser.commands:
            parser, words = cast(Parser, parser.commands[first]), rest
        elif first in (*_HELP, "--version") or not first:
            parser.parse_args(words)  # which ends here
        else:
            raise SimPOError(unknown_command(words, list(parser.commands), parser.prog))
    return parser, words
