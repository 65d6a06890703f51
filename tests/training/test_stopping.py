"""Signals during a run, in processes of their own: the first is a request, the second ends it."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.growth import open_files

from mlx_simpo.training import stopping
from mlx_simpo.training.stopping import DEFAULT_HANDLERS, exit_status, stop_on_signals

SIGINT, SIGTERM, SIGHUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
LINES = {
    SIGINT: "Ctrl-C: finishing this step, then saving; again to stop at once",
    SIGTERM: "SIGTERM: finishing this step, then saving; again to stop at once",
    SIGHUP: "SIGHUP: finishing this step, then saving; again to stop at once",
}
# A call into C that takes minutes, holds no lock of the interpreter and heeds no signal.
LONG_CALL = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
# The same in MLX: products of large matrices, as in a training step.
LONG_STEP = """
    import mlx.core as mx
    product = matrix = mx.random.normal((2000, 2000))
    for _ in range(2000):
        product = product @ matrix
    print("computing", flush=True)
    mx.eval(product)
    print("computed", flush=True)
"""
WAIT = """
    while not request:
        time.sleep(0.01)
"""


def program(block: str, before: str = "") -> str:
    """Return a program with ``block`` inside the context; afterwards it prints the request."""
    return f"""
import os, signal, sys, threading, time
from mlx_simpo.training.stopping import stop_on_signals
def notify(line):
    os.write(2, line.encode() + b"\\n")
{before}
with stop_on_signals(notify) as request:
    print("ready", flush=True)
    {block}
print(request.signal, bool(request), flush=True)
"""


@contextmanager
def killed_at_last(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Kill the process and its children at the end, or after two minutes: a failing test must not
    wait for ever."""

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(120, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        kill()


@contextmanager
def started(code: str, *command: str) -> Iterator[subprocess.Popen[str]]:
    """Start a program and wait until it is in the context."""
    process = subprocess.Popen(
        [*command, sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process, killed_at_last(process):
        assert next_output(process) == "ready", ended(process)
        yield process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait until it ends; return its exit status and what it has not yet been asked for of stdout
    and stderr. (`communicate` loses what `readline` has buffered.)"""
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = process.stdout.read(), process.stderr.read()
    return process.wait(), out, err


def next_line(process: subprocess.Popen[str]) -> str:
    """Wait for the next line that it writes to stderr."""
    assert process.stderr is not None
    return process.stderr.readline().rstrip("\n")


def next_output(process: subprocess.Popen[str]) -> str:
    """Wait for the next line that it writes to stdout."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def test_during_a_long_step_of_mlx() -> None:
    with started(program(LONG_STEP)) as process:
        assert next_output(process) == "computing"
        process.send_signal(SIGINT)
        assert next_line(process) == LINES[SIGINT]
        process.send_signal(SIGINT)
        assert ended(process) == (130, "", "mlx-simpo: interrupted\n")


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (SIGTERM, SIGTERM, 143),
        (SIGHUP, SIGHUP, 129),
        (SIGINT, SIGTERM, 143),
        (SIGTERM, SIGINT, 130),
    ],
)
def test_the_second_signal_gives_the_status(first: int, second: int, status: int) -> None:
    with started(program(LONG_CALL)) as process:
        process.send_signal(first)
        assert next_line(process) == LINES[signal.Signals(first)]
        process.send_signal(second)
        assert ended(process) == (status, "", "mlx-simpo: interrupted\n")
    assert status == exit_status(second)


@pytest.mark.parametrize("number", LINES)
def test_one_signal_lets_the_block_end(number: signal.Signals) -> None:
    with started(program(WAIT)) as process:
        process.send_signal(number)
        status, out, err = ended(process)
    assert (status, out) == (0, f"{int(number)} True\n")
    assert err == LINES[number] + "\n"


def test_a_signal_at_the_very_end_is_counted() -> None:
    with started(program("os.kill(os.getpid(), signal.SIGTERM)")) as process:
        assert ended(process) == (0, "15 True\n", LINES[SIGTERM] + "\n")


def test_afterwards_signals_act_as_before() -> None:
    with started(program(WAIT) + LONG_CALL) as process:
        process.send_signal(SIGTERM)
        assert next_output(process) == "15 True"
        process.send_signal(SIGTERM)
        assert process.wait() == -SIGTERM


def test_handlers_and_file_descriptor_are_restored() -> None:
    before = {number: signal.getsignal(number) for number in DEFAULT_HANDLERS}
    reading_end, writing_end = os.pipe()
    os.set_blocking(writing_end, False)
    signal.set_wakeup_fd(writing_end)
    try:
        files = open_files()
        with suppress(KeyError), stop_on_signals(print):
            assert signal.getsignal(SIGTERM) != before[SIGTERM]
            (listening,) = (t for t in threading.enumerate() if t.name == "signals")
            assert listening.daemon  # a process whose main thread has ended must end
            raise KeyError
        assert open_files() == files
    finally:
        restored = signal.set_wakeup_fd(-1)
        os.close(reading_end)
        os.close(writing_end)
    assert restored == writing_end
    assert {number: signal.getsignal(number) for number in DEFAULT_HANDLERS} == before
    assert "signals" not in {thread.name for thread in threading.enumerate()}


def test_what_is_said_of_a_signal_is_said_before_the_context_ends() -> None:
    lines: list[str] = []

    def say_slowly(line: str) -> None:
        time.sleep(0.1)
        lines.append(line)

    with stop_on_signals(say_slowly) as request:
        os.kill(os.getpid(), SIGTERM)
    assert (request.signal, lines) == (SIGTERM, [LINES[SIGTERM]])


def test_a_handler_that_somebody_sets_meanwhile_stays() -> None:
    before = signal.getsignal(SIGTERM)
    try:
        with stop_on_signals(print):
            signal.signal(SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(SIGTERM, before)


def test_a_call_into_c_is_not_interrupted() -> None:
    """Code that writes a file need not expect that a system call ends without having done it."""
    block = """
    def act():
        time.sleep(0.1)  # until the call has begun
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        while not request:
            time.sleep(0.01)
        os.write(writing_end, b"!")
    threading.Thread(target=act).start()
    print(ctypes.CDLL(None).read(reading_end, ctypes.create_string_buffer(1), 1), flush=True)
"""
    with started(program(block, "import ctypes; reading_end, writing_end = os.pipe()")) as process:
        assert ended(process) == (0, "1\n15 True\n", LINES[SIGTERM] + "\n")


def test_nohup_keeps_sighup_ignored() -> None:
    with started(program(WAIT), "nohup") as process:
        process.send_signal(SIGHUP)
        process.send_signal(SIGTERM)
        status, out, err = ended(process)
    assert (status, out) == (0, "15 True\n")
    assert LINES[SIGTERM] in err
    assert "SIGHUP" not in err


def test_a_handler_of_someone_else_stays() -> None:
    mine = "signal.signal(signal.SIGTERM, lambda number, frame: notify('mine'))"
    with started(program(WAIT, mine)) as process:
        process.send_signal(SIGTERM)
        assert next_line(process) == "mine"
        process.send_signal(SIGINT)
        assert next_line(process) == LINES[SIGINT]
        assert ended(process) == (0, "2 True\n", "")


def test_an_event_loop_still_gets_its_signals() -> None:
    loop = """
reading_end, writing_end = os.pipe()
os.set_blocking(writing_end, False)
signal.set_wakeup_fd(writing_end)
signal.signal(signal.SIGUSR1, lambda number, frame: None)
"""
    block = "os.kill(os.getpid(), signal.SIGUSR1); print(os.read(reading_end, 9), flush=True)"
    with started(program(block, loop)) as process:
        assert ended(process) == (0, f"{bytes([signal.SIGUSR1])!r}\nNone False\n", "")


def test_an_event_loop_that_takes_the_descriptor_costs_nothing() -> None:
    block = f"signal.set_wakeup_fd(-1); print('deaf', flush=True)\n{WAIT}\n    {LONG_CALL}"
    with started(program(block)) as process:
        assert next_output(process) == "deaf"
        process.send_signal(SIGTERM)
        assert next_line(process) == LINES[SIGTERM]
        process.send_signal(SIGTERM)
        assert ended(process) == (143, "", "mlx-simpo: interrupted\n")


def test_an_event_loop_that_begins_meanwhile_gets_its_signals_too() -> None:
    block = f"""
    reading_end, writing_end = os.pipe()
    os.set_blocking(writing_end, False)
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    signal.set_wakeup_fd(writing_end)
    print("begun", flush=True)
    {WAIT.strip()}
    os.kill(os.getpid(), signal.SIGUSR1)
    print(os.read(reading_end, 9), signal.set_wakeup_fd(-1) == writing_end, flush=True)
"""
    with started(program(block)) as process:
        assert next_output(process) == "begun"
        process.send_signal(SIGTERM)
        _, out, _ = ended(process)
        assert out == f"{bytes([SIGTERM, signal.SIGUSR1])!r} True\n15 True\n"


def test_within_another_context_the_request_is_the_same() -> None:
    block = f"""
    with stop_on_signals(notify) as inner:
        print(inner is request, flush=True)
    {WAIT}
"""
    with started(program(block)) as process:
        process.send_signal(SIGTERM)
        assert ended(process) == (0, "True\n15 True\n", LINES[SIGTERM] + "\n")


def test_outside_the_main_thread_nothing_changes() -> None:
    before = {number: signal.getsignal(number) for number in DEFAULT_HANDLERS}
    requests: list[bool] = []

    def run() -> None:
        with stop_on_signals(print) as request:
            requests.append(bool(request))
            assert {number: signal.getsignal(number) for number in DEFAULT_HANDLERS} == before

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert requests == [False]


def test_a_forked_process_ends_by_a_signal_and_does_not_count() -> None:
    block = """
    reading_end, writing_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing_end, b"!")
        time.sleep(600)
    os.read(reading_end, 1)
    os.kill(child, signal.SIGTERM)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""
    with started(program(block)) as process:
        assert ended(process) == (0, "15\nNone False\n", "")


# --- interactive sessions --------------------------------------------------------------------

# While Python computes, and within a call into C of a second.
ENDLESS = {"python": "while True: pass", "c": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000)"}


@pytest.mark.parametrize("work", ENDLESS)
def test_in_a_notebook_the_second_interrupt_keeps_the_session(work: str) -> None:
    block = f"""
    try:
        print("computing", flush=True)
        {ENDLESS[work]}
        time.sleep(0)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""
    with started(program(block, "import hashlib; sys.ps1 = 'In : '")) as process:
        assert next_output(process) == "computing"
        process.send_signal(SIGINT)
        assert next_line(process) == LINES[SIGINT]
        process.send_signal(SIGINT)
        assert ended(process) == (0, "interrupted\n2 True\n", "")


def test_in_a_notebook_a_second_sigterm_ends_the_process() -> None:
    with started(program(LONG_CALL, "sys.ps1 = 'In : '")) as process:
        process.send_signal(SIGTERM)
        assert next_line(process) == LINES[SIGTERM]
        process.send_signal(SIGTERM)
        assert process.wait() == 143


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[stopping._Listener, list[str]]]:
    """A notebook's listener, and what it does besides listening."""
    events: list[str] = []
    monkeypatch.setattr(stopping, "end_at_once", lambda number: events.append(f"end {number}"))
    monkeypatch.setattr(stopping._thread, "interrupt_main", lambda: events.append("interrupt"))
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    with stop_on_signals(lambda line: None):
        assert stopping._Listener.active is not None
        yield stopping._Listener.active, events


def test_an_interrupt_that_a_listener_sends_itself_is_not_counted(
    listener: tuple[stopping._Listener, list[str]],
) -> None:
    """It comes back through the pipe; every other one, and every other signal, is the user's."""
    active, events = listener
    for number in (SIGINT, SIGINT, SIGTERM, SIGINT, SIGINT, SIGHUP):
        active._receive(number)
    assert events == ["interrupt", "end 15", "interrupt", "end 1"]
    with pytest.raises(KeyboardInterrupt):
        active._handle(SIGINT, None)
    active._handle(SIGINT, None)  # raised once


def test_streams_whose_terminal_is_gone_lead_nowhere(
    listener: tuple[stopping._Listener, list[str]],
) -> None:
    ours, theirs = pty.openpty()
    other = os.dup(theirs)
    try:
        listener[0]._terminals = [theirs]
        listener[0]._leave_closed_terminal()
        assert os.isatty(theirs)
        os.close(ours)
        files = open_files()
        listener[0]._leave_closed_terminal()
        assert os.fstat(theirs).st_rdev == os.stat(os.devnull).st_rdev
        assert os.write(theirs, b"lost") == 4
        assert os.read(theirs, 9) == b""
        assert open_files() == files
    finally:
        os.close(theirs)
        os.close(other)


# --- terminals -------------------------------------------------------------------------------


def read_until(terminal: int, text: bytes) -> bytes:
    """Read what a program writes to its terminal, until ``text`` comes or it has ended."""
    content = b""
    while text not in content:
        try:
            content += os.read(terminal, 1024)
        except OSError:  # as Linux ends a pseudo-terminal
            break
    return content


@contextmanager
def in_a_terminal(code: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start a program in a pseudo-terminal of its own; yields it and our end of the terminal."""
    ours, theirs = pty.openpty()
    take = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", take + code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    with process, killed_at_last(process):
        os.close(theirs)
        read_until(ours, b"ready")
        yield process, ours


@pytest.mark.parametrize("terminal", [1, 2])
def test_the_cursor_is_shown_again_in_the_terminal_of_stderr(
    terminal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, bytes]] = []
    monkeypatch.setattr(os, "isatty", lambda number: number == terminal)
    monkeypatch.setattr(os, "write", lambda *file_and_text: written.append(file_and_text))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as error:
        stopping.end_at_once(SIGTERM)
    assert error.value.code == 143
    shown = b"\x1b[?25h\n" if terminal == 2 else b""
    assert written == [(2, shown + b"mlx-simpo: interrupted\n")]


def test_the_cursor_is_shown_again() -> None:
    with in_a_terminal(program(LONG_CALL)) as (process, terminal):
        process.send_signal(SIGINT)
        read_until(terminal, b"at once")
        process.send_signal(SIGINT)
        assert b"\x1b[?25h\r\nmlx-simpo: interrupted" in read_until(terminal, b"interrupted")
        assert process.wait() == 130
    os.close(terminal)


def test_a_run_whose_terminal_is_closed_ends_and_saves(tmp_path: Path) -> None:
    block = f"""
    display = Display()
    with display.progress("Training", 10) as advance:
        {WAIT.strip().replace("    ", "            ", 1)}
        advance(1, "loss 1.0")
        display.warn("saving")
        print("saving", flush=True)
        with open({str(tmp_path / "saved")!r}, "w") as file:
            file.write(f"{{request.signal}}")
"""
    before = "from mlx_simpo.reporting.display import Display"
    with in_a_terminal(program(block, before)) as (process, terminal):
        os.close(terminal)
        assert process.wait() == 0
    assert (tmp_path / "saved").read_text() == "1"


def test_a_reader_that_does_not_read_stops_nothing() -> None:
    """With `mlx-simpo … 2>&1 | less`, stderr may be a full pipe, which takes no more lines."""
    fill = """
os.set_blocking(2, False)
try:
    while True:
        os.write(2, bytes(4096))
except BlockingIOError:
    os.set_blocking(2, True)
"""
    wait = LONG_CALL.replace("hashlib.", "threading.Thread(target=report).start(); hashlib.", 1)
    report = """
def report():
    while not request:
        time.sleep(0.01)
    print("requested", flush=True)
"""
    with started(program(wait, fill + report)) as process:
        process.send_signal(SIGTERM)
        assert next_output(process) == "requested"
        process.send_signal(SIGTERM)
        assert process.wait() == 143
