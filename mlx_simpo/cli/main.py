"""The command line: ``mlx-simpo train | evaluate | generate | data | fuse | convert | push | …``.

Results go to stdout, everything else to stderr. Settings are written as ``section.name=value``,
with the same names as in the YAML files. A command imports what it needs when it runs: MLX and
mlx-lm take more than a second, which --help and --version need not wait for.
"""

import argparse
import sys
from collections.abc import Sequence

from ..errors import SimPOError, messages_of
from ..version import __version__
from . import convert, data, doctor, evaluate, fuse, generate, interrupt, push, train
from .arguments import Parser, config_and_settings
from .output import print_error

# In the order of --help.
COMMANDS = (train, evaluate, generate, data, fuse, convert, push, doctor)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return the exit status: 0, 2 for bad input, 130 for Ctrl-C.

    `train` has some of its own.
    """
    try:
        options, rest = build_parser().parse_known_args(arguments)
        options.config, options.settings = config_and_settings(rest)
        return options.run(options) or 0
    except SimPOError as error:
        for message in messages_of(error):
            print_error(message)
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(interrupt.INTERRUPTED)
        return interrupt.STATUS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line with all its commands."""
    parser = Parser(
        prog="mlx-simpo", description="SimPO LoRA fine-tuning of language models with MLX."
    )
    parser.add_argument("--version", action="version", version=f"mlx-simpo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
