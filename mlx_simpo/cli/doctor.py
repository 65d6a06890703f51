"""``mlx-simpo doctor``."""

import argparse
from typing import Any

from ..errors import SimPOError
from .arguments import add_command
from .interrupt import exit_on_interrupt
from .output import print_json, print_text


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "doctor", run, "check this machine")
    parser.description = (
        "Show the machine, which kernel runs and why, whether its results are right, and how fast "
        "it is."
    )


def run(options: argparse.Namespace) -> None:
    """Check the machine and print the report.

    Raises:
        SimPOError: a check fails.
    """
    with exit_on_interrupt():
        from ..doctor import as_text, examine

    report = examine()
    if options.json:
        print_json(report)
    else:
        print_text(as_text(report))
    if "problem" in report or not all(check["passed"] for check in report["checks"]):
        raise SimPOError(
            "log-probabilities are not right on this machine; please report the lines above"
        )
