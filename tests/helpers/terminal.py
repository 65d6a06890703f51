"""Commands in a terminal of their own (a pseudo-terminal), which a test reads and types into."""

import codecs
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """What a process has written to its terminal, and a keyboard."""

    def __init__(self, process: "subprocess.Popen[bytes]", descriptor: int) -> None:
        self.process = process
        self.text = ""
        self._descriptor = descriptor
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def type(self, text: str) -> None:
        """Type characters; a line ends with a newline."""
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until ``text`` has appeared since the last call; return what was written."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            if not self.read(deadline):
                pytest.fail(f"{text!r} has not appeared: {self.text!r}")
        before, _, self.text = self.text.partition(text)
        return before + text

    def type_until(self, keys: str, text: str) -> str:
        """Type keys every half a second until ``text`` appears; return what was written.

        A signal between the two moments at which readline writes its prompt and begins to wait is
        noticed with the next key only.
        """
        for _ in range(120):
            self.type(keys)
            deadline = time.monotonic() + 0.5
            while text not in self.text and self.read(deadline):
                pass
            if text in self.text:
                break
        return self.wait_for(text)

    def finish(self, seconds: float = 60) -> tuple[int, str]:
        """Read to the end; return the exit status and what was written since the last call."""
        deadline = time.monotonic() + seconds
        while self.read(deadline):
            pass
        return self.process.wait(timeout=10), self.text

    def read(self, deadline: float | None = None) -> bool:
        """Read what is there, or what comes until the deadline; return whether there may be more.

        Args:
            deadline: of time.monotonic(); default: in a minute.
        """
        left = 60.0 if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([self._descriptor], [], [], left)[0]:
            return False
        try:
            content = os.read(self._descriptor, 65536)
        except OSError:  # Linux: the last process that had the terminal is gone
            return False
        self.text += self._decoder.decode(content).replace("\r\n", "\n")
        return bool(content)


@contextmanager
def terminal(*arguments: object, columns: int = 80) -> Iterator[Terminal]:
    """Run ``mlx-simpo`` with these arguments in a terminal, which it controls."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    # The terminal must control the process, or Ctrl-C sends no signal.
    code = "import sys; from mlx_simpo.__main__ import main; main()"
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"TERM": "xterm-256color"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
