"""The terminal of ``mlx-simpo generate --chat``."""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import SimPOError
from .interrupt import noticed_interrupt
from .output import print_error, print_text
from .responses import cut_note

if TYPE_CHECKING:
    from ..reporting.display import Display
    from ..sampling.chat import Chat

_WELCOME = "Write a message. /help shows what else you can type; Ctrl-D ends the chat."
_HELP = """\
/reset   begin a new conversation
/base    let the base model respond, or the adapter again
/help    show this
/exit    end the chat, as Ctrl-D does
Ctrl-C   stop a response"""
# A message that begins with a path or a fraction is not a command.
_COMMAND = re.compile(r"/[a-z]+")


def run_chat(chat: "Chat", max_tokens: int) -> None:
    """Respond to each line of stdin until it ends.

    In a terminal lines can be edited, Ctrl-C stops a response, and an error does not end the chat.
    Otherwise stdout has the responses and nothing else.

    Raises:
        SimPOError: stdin is not a terminal, and a line of it cannot be used.
    """
    from ..reporting.display import Display

    display = Display()
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # editing and history, where Python has it
            import readline  # noqa: F401
        display.note(_WELCOME)
    for line in iter(_typed_line, None) if is_terminal else _piped_lines():
        text = line.strip()
        if text == "/exit":
            break
        try:
            if _COMMAND.fullmatch(text):
                _run_command(chat, text, display)
            elif text:
                _respond(chat, text, max_tokens, display, is_terminal=is_terminal)
        except SimPOError as error:
            if not is_terminal:
                raise
            print_error(error)
        except KeyboardInterrupt:  # a second Ctrl-C, or one that came as the response ended
            if not is_terminal:
                raise
            print_text("\n")


def _typed_line() -> str | None:
    """Ask for a line; "" if there is none yet, None at the end."""
    try:
        return input("> ")
    except EOFError:
        print_text("\n")
        return None
    except KeyboardInterrupt:
        print_text("\n(Ctrl-D ends the chat)\n")
    except UnicodeDecodeError:
        print_error("that was not UTF-8 text; write it again")
    return ""


def _piped_lines() -> Iterator[str]:
    """Yield the lines of standard input.

    Raises:
        SimPOError: it is not UTF-8.
    """
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise SimPOError(f"standard input is not UTF-8 text ({error}); send it as UTF-8") from None


def _run_command(chat: "Chat", command: str, display: "Display") -> None:
    """Do what a line like /reset says.

    Raises:
        SimPOError: there is no such command, or no adapter.
    """
    if command == "/help":
        display.note(_HELP)
    elif command == "/reset":
        chat.reset()
        display.note("(a new conversation)")
    elif command == "/base":
        chat.toggle_adapter()
        display.note(f"(the {'adapter' if chat.uses_adapter else 'base model'} responds now)")
    else:
        raise SimPOError(f"there is no command {command}; /help shows those that there are")


def _respond(
    chat: "Chat", text: str, max_tokens: int, display: "Display", *, is_terminal: bool
) -> None:
    """Print the response to a message while it is generated."""
    last = None
    with noticed_interrupt(is_terminal) as was_interrupted:
        for part in chat.send(text, was_interrupted):
            print_text(part.text)
            sys.stdout.flush()
            last = part.response
    print_text("\n")
    sys.stdout.flush()
    if last is not None:
        display.note(cut_note([last.finish_reason], max_tokens))
