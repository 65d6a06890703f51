"""Signals that end a run: the first one asks it to stop after its step, the second ends it at once.

Python runs a signal's handler between two of its own instructions, and the main thread of a run is
mostly inside MLX: a step may take a minute. So the handlers here do nothing, and a thread listens
instead. The interpreter's handler in C writes each signal's number into a pipe at once
(`signal.set_wakeup_fd`), and MLX does not hold the interpreter's lock while it computes.

This module must not import anything heavy: the command line needs its exit statuses first.
"""

import _thread
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

INTERRUPTED = "mlx-simpo: interrupted\n"
SHOW_CURSOR = "\x1b[?25h"
# The signals that ask a run to end, and the handlers of a Python that has just started.
DEFAULT_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


class StopRequest:
    """Whether a run was asked to stop, and by which signal; None until then."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


def exit_status(number: int) -> int:
    """Return the exit status of a process that a signal ended, as a shell reports it: 128 + n."""
    return 128 + number


@contextmanager
def stop_on_signals(notify: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request, while the context lasts.

    The caller looks at the request after each step, and once more after the context: a signal may
    come during the last step. A second signal, of any of the three, ends the process at once with
    `exit_status`, whatever the main thread is doing. In an interactive session (a notebook, the
    Python prompt) a second SIGINT raises KeyboardInterrupt instead, which keeps the user's
    variables.

    A signal that is ignored (SIGHUP under nohup) or that has someone's own handler stays as it is.
    Within another such context the request is that context's. Outside the main thread, where
    Python allows no handlers, the request is never set.

    Args:
        notify: called once, in another thread, with a line that says what happens now.
    """
    if _Listener.active is not None:
        yield _Listener.active.request
        return
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = [n for n, handler in DEFAULT_HANDLERS.items() if signal.getsignal(n) is handler]
    if not in_main_thread or not numbers:
        yield StopRequest()
        return
    listener = _Listener(numbers, notify)
    try:
        yield listener.request
    finally:
        listener.close()


def end_at_once(number: int) -> NoReturn:
    """End the process with a signal's exit status, without any of Python's cleaning up."""
    # rich hides the cursor while it shows a progress bar, and leaves it at the bar's end.
    text = (SHOW_CURSOR + "\n" if os.isatty(2) else "") + INTERRUPTED
    with suppress(OSError, ValueError):  # stderr is closed, or its terminal is gone
        # Not through sys.stderr, which may be in the middle of a write; and not into a full pipe,
        # which would wait for its reader.
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode())
    os._exit(exit_status(number))


class _Listener:
    """A thread that reads the numbers of signals from a pipe, and the handlers that feed it."""

    active: "_Listener | None" = None

    def __init__(self, numbers: list[signal.Signals], notify: Callable[[str], None]) -> None:
        self.request = StopRequest()
        self._notify = notify
        self._numbers = numbers
        self._received = self._own_interrupts = 0
        self._must_raise = False
        self._terminals = [fd for fd in (0, 1, 2) if os.isatty(fd)]
        # Python defines ps1 for its prompt only; IPython and Jupyter do the same.
        self._interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)
        self._reading_end, self._writing_end = os.pipe()
        os.set_blocking(self._writing_end, False)
        self._messages: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(self._writing_end, warn_on_full_buffer=False)
        _Listener.active = self
        for number in numbers:
            signal.signal(number, self._handle)
            # C++ code that is writing a file need not expect an interrupted system call.
            signal.siginterrupt(number, False)

    def close(self) -> None:
        """Restore what was before. Every signal until now is counted when this returns."""
        self.restore()
        os.close(self._writing_end)
        self._thread.join()
        os.close(self._reading_end)
        for message in self._messages:
            message.join()

    def restore(self) -> None:
        """Restore the handlers and the file descriptor that were there before."""
        for number in self._numbers:
            # Someone may have set a handler since.
            if signal.getsignal(number) == self._handle:
                signal.signal(number, DEFAULT_HANDLERS[number])
        signal.set_wakeup_fd(self._previous_fd)
        _Listener.active = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Do what only the main thread can: raise KeyboardInterrupt if the thread asks for it.

        Counting is the thread's: Python calls this once for two signals that come during one
        call of MLX.

        Raises:
            KeyboardInterrupt: as above.
        """
        current_fd = signal.set_wakeup_fd(self._writing_end, warn_on_full_buffer=False)
        if current_fd != self._writing_end:
            # An event loop took our descriptor away (asyncio's puts −1 there when it ends).
            os.write(self._writing_end, bytes([number]))
            if current_fd >= 0:
                signal.set_wakeup_fd(current_fd)
        self._leave_closed_terminal()  # the thread may be later than this one's next line
        if self._must_raise:
            self._must_raise = False
            raise KeyboardInterrupt

    def _listen(self) -> None:
        while numbers := os.read(self._reading_end, 4096):
            for number in numbers:
                if number in self._numbers:
                    self._receive(number)
                elif self._previous_fd >= 0:  # an event loop's; it waits for its own signals
                    with suppress(OSError):  # full, as the interpreter ignores it too
                        os.write(self._previous_fd, bytes([number]))

    def _receive(self, number: int) -> None:
        if number == signal.SIGINT and self._own_interrupts:
            self._own_interrupts -= 1
            return
        self._received += 1
        self._leave_closed_terminal()
        if self._received == 1:
            self.request.signal = number
            # In a thread of its own: a second signal must not wait for a reader of this line.
            message = threading.Thread(target=self._say, args=(number,), daemon=True)
            self._messages.append(message)
            message.start()
        elif not (self._interactive and number == signal.SIGINT):
            end_at_once(number)
        elif _Listener.active is self:  # and not at its end
            self._must_raise = True
            self._own_interrupts += 1
            _thread.interrupt_main()  # it calls the handler, and writes the number, too

    def _say(self, number: int) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self._notify(f"{name}: finishing this step, then saving; again to stop at once")

    def _leave_closed_terminal(self) -> None:
        """Point the standard streams at /dev/null if their terminal is gone.

        Each write to it would raise an error, the first of them before the run is saved.
        """
        closed = [fd for fd in self._terminals if not os.isatty(fd)]
        if closed:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in closed:
                os.dup2(null, fd)
            os.close(null)


def _restore_in_child() -> None:
    """Let a forked process die of signals as usual, and not write their numbers into our pipe."""
    if _Listener.active is not None:
        _Listener.active.restore()


os.register_at_fork(after_in_child=_restore_in_child)
