"""Ctrl-C while modules load, and in a chat; `training.stopping` has the one for runs."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ..training.stopping import INTERRUPTED, exit_status

STATUS = exit_status(signal.SIGINT)


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process with one line while the context lasts: for imports.

    KeyboardInterrupt is not enough: importlib's callbacks and modules that try several imports
    swallow it, and elsewhere it prints a page of traceback. Nothing is lost by ending at once,
    because no command has begun. A handler that someone else has set stays as it is, and so does
    SIGINT where it is ignored, as under nohup.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def noticed_interrupt(is_enabled: bool) -> Iterator[Callable[[], bool]]:
    """Notice the first Ctrl-C while the context lasts; the second one raises KeyboardInterrupt.

    The context's value tells whether there was one. KeyboardInterrupt in the middle of a token
    would leave a model's cache half written.

    Args:
        is_enabled: False: Ctrl-C does what it did before.
    """
    received: list[int] = []

    def notice(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    is_ours = is_enabled and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, notice)
    try:
        yield lambda: bool(received)
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, INTERRUPTED.encode())  # sys.stderr may be in the middle of a write
    os._exit(STATUS)
