"""The push command: ``mlx-simpo push FOLDER OWNER/NAME``."""

import argparse
import sys
from typing import Any

from .output import print_json, refuse_settings


def add_push(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    about = (
        "Send a run, a PEFT adapter or a model to the Hugging Face Hub, with a model card. Log in "
        "with `hf auth login` first."
    )
    parser = commands.add_parser("push", help="send it to the Hugging Face Hub", description=about)
    parser.set_defaults(run=run_push)
    parser.add_argument("folder", metavar="FOLDER", help="output of a training or an export")
    parser.add_argument("repo", metavar="REPO", help="model repository on the Hub, owner/name")
    parser.add_argument(
        "--private", action="store_true", help="make the repository private; it must not be public"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would go, and send nothing"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to send to; default main")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run_push(options: argparse.Namespace) -> None:
    """The push command: what went, or in a dry run would go, to stdout.

    Raises:
        SimPOError: settings, which it does not take, or anything that `hub.push` refuses.
    """
    from ..hub.push import push

    refuse_settings(options, "push")
    result = push(
        options.folder,
        options.repo,
        private=options.private,
        dry_run=options.dry_run,
        revision=options.revision,
        message=options.message,
    )
    if options.json:
        print_json(result.as_dict())
        return
    text = as_text(result) if result.url is None else f"{result.url}\n"
    # Half an emoji in a card, or a file name of other bytes, must not end the command.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode())


def as_text(plan: Any) -> str:
    """A dry run (`hub.Push`): repository, files with their sizes, what stays and why, the card."""
    from ..hub.markdown import printable

    where = f"branch {plan.revision}" if plan.revision else "its main branch"
    seen = (
        "private" if plan.private else "public if it is new, unless your account makes private ones"
    )
    total = sum(e.size for e in plan.files)
    width = max(len(f"{e.size:,}") for e in plan.files)
    lines = [
        "dry run: nothing is sent",
        f"repository: {plan.repo}, {where}; {seen}",
        f"\ngoes ({len(plan.files)} files, {total:,} bytes):",
        *(
            f"  {e.size:>{width},}  {printable(e.name)}" + (f"  ({e.note})" if e.note else "")
            for e in plan.files
        ),
    ]
    if plan.stays:
        lines += ["\nstays:", *(f"  {printable(name)}  ({why})" for name, why in plan.stays)]
    return "\n".join([*lines, f"\n{'─' * 30} README.md {'─' * 30}\n{plan.card}"])
