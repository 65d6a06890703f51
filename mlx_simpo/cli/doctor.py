"""``mlx-simpo doctor``."""

import argparse
import sys
from typing import Any

from ..errors import SimPOError
from .arguments import add_command
from .interrupt import exit_on_interrupt
from .output import announce, print_json, print_text


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "doctor", run, "check this machine")
    parser.description = (
        "Show the machine, which engine and which kernel run and why, whether results are right, "
        "and how fast they are computed. With --full, also what a training step costs in several "
        "ways: a minute for the small random models, more for a model of yours."
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="check attention, the delta rule and whole training steps, and time these",
    )
    parser.add_argument(
        "--model",
        help="Hub id or folder: measure what a step of this model would cost; with --full, run "
        "everything on it; default: small random models",
    )


def run(options: argparse.Namespace) -> None:
    """Check the machine and print the report: as text part by part, with --json at the end.

    Raises:
        SimPOError: a check fails, or the model cannot be loaded.
    """
    announce(f"checking this machine{f' with {options.model}' if options.model else ''}")
    with exit_on_interrupt():
        from ..doctor.examine import add_part, examine, failures
        from ..doctor.text import as_text

    report: dict[str, Any] = {}
    for part in examine(options.model, full=options.full):
        add_part(report, part)
        if not options.json:
            print_text(as_text(part.values))
            sys.stdout.flush()  # if memory runs out, macOS may end the process without a word
    if options.json:
        print_json(report)
    if failed := failures(report):
        raise SimPOError(
            f"{', '.join(failed)}: not right on this machine; please report the lines above"
        )
