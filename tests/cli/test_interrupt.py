"""Ctrl-C while modules load: one line and exit status 130, whatever is being imported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import small_run

from mlx_simpo.cli.interrupt import exit_on_interrupt

# Sends SIGINT to itself when a module is looked for.
INTERRUPTED_AT = """
import os, signal, sys
module = sys.argv.pop(1)
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from mlx_simpo.__main__ import main
main()
"""


@pytest.fixture
def settings(model_folder: Path, pairs_file: Path, tmp_path: Path) -> list[str]:
    return small_run(model_folder, pairs_file, tmp_path / "run")


@pytest.mark.parametrize(
    "module", ["argparse", "mlx_simpo.cli.train", "mlx.core", "numpy", "transformers", "rich"]
)
def test_ctrl_c_during_an_import(module: str, settings: list[str], tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", INTERRUPTED_AT, module, "train", *settings]
    ended = subprocess.run(arguments, capture_output=True, text=True)
    lines = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout, lines[-1]) == (130, "", "mlx-simpo: interrupted")
    assert len(lines) <= 2  # the announcement before it
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_ctrl_c_after_the_first_line(delay: float, settings: list[str]) -> None:
    arguments = [sys.executable, "-m", "mlx_simpo", "train", *settings]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("mlx-simpo ")
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "mlx-simpo: interrupted"
    assert "Traceback" not in rest


def test_a_handler_of_someone_else_stays() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        with exit_on_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [signal.SIGINT]


def test_the_handler_is_there_only_during_imports() -> None:
    before = signal.getsignal(signal.SIGINT)
    with exit_on_interrupt():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
