"""``mlx-simpo push``."""

import argparse
from typing import TYPE_CHECKING, Any

from .arguments import add_command
from .interrupt import exit_on_interrupt
from .output import print_json, print_text

if TYPE_CHECKING:
    from ..hub import Push


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "push", run, "send a result to the Hugging Face Hub")
    parser.description = (
        "Send a run, a PEFT adapter or a model to the Hugging Face Hub, with a model card. Log in "
        "with `hf auth login` first."
    )
    parser.add_argument("folder", metavar="FOLDER", help="output of train, fuse or convert")
    parser.add_argument("repo", metavar="REPO", help="model repository on the Hub, owner/name")
    parser.add_argument(
        "--private",
        action="store_true",
        help="make the repository private; one that is public already is an error",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be sent, and send nothing"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to send to; default: main")
    parser.add_argument("--message", metavar="TEXT", help="commit message")


def run(options: argparse.Namespace) -> None:
    """Push, and print the commit's address, what a dry run would send, or the result as JSON."""
    with exit_on_interrupt():
        from ..hub.push import push

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
    else:
        print_text(f"{result.url}\n" if result.url is not None else _dry_run_text(result))


def _dry_run_text(plan: "Push") -> str:
    """Return the repository, the files with their sizes, what stays and why, and the card."""
    from ..hub.markdown import printable

    branch = f"branch {plan.revision}" if plan.revision else "its main branch"
    visibility = (
        "private"
        if plan.private
        else "public if it is new, unless your account creates private ones"
    )
    total = sum(e.size for e in plan.files)
    width = max(len(f"{e.size:,}") for e in plan.files)
    lines = [
        "dry run: nothing is sent",
        f"repository: {plan.repo}, {branch}; {visibility}",
        f"\nto be sent ({len(plan.files)} files, {total:,} bytes):",
        *(
            f"  {e.size:>{width},}  {printable(e.name)}" + (f"  ({e.note})" if e.note else "")
            for e in plan.files
        ),
    ]
    if plan.stays:
        lines += ["\nnot sent:", *(f"  {printable(name)}  ({why})" for name, why in plan.stays)]
    return "\n".join([*lines, f"\n{'─' * 30} README.md {'─' * 30}\n{plan.card}"])
