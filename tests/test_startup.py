"""What importing the package and starting the command line load, and what they do not."""

import ast
import json
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_simpo

HEAVY = ["mlx", "mlx_lm", "datasets", "transformers", "numpy", "rich"]
LOADED = f"""
import json, sys
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


def loaded_by(code: str) -> list[str]:
    """Return which of the heavy packages are loaded after this code has run."""
    ended = python(f"{code}\n{LOADED}")
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


# --- the package -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import mlx_simpo; dir(mlx_simpo)",
        "from mlx_simpo import SimPOError, SimPOConfig, load_config, __version__",
        "import mlx_simpo.config.simpo_config, mlx_simpo.cli.main",
    ],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    assert loaded_by(code) == []


def test_the_loss_does_not_load_what_training_needs() -> None:
    assert loaded_by("from mlx_simpo import simpo_loss") == ["mlx"]


def test_every_public_name_is_loaded_and_stays() -> None:
    for name in mlx_simpo.__all__:
        value = getattr(mlx_simpo, name)
        assert value.__name__ == name
        assert vars(mlx_simpo)[name] is value
        assert name in dir(mlx_simpo)


def test_the_table_is_what_type_checkers_read() -> None:
    """What is imported under TYPE_CHECKING, what __getattr__ looks up, and __all__ agree."""
    tree = ast.parse(Path(mlx_simpo.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imports == mlx_simpo._MODULE_OF
    assert sorted(imports) == mlx_simpo.__all__


def test_no_submodule_can_take_the_place_of_a_public_name() -> None:
    """Importing a submodule sets an attribute of its name on the package."""
    submodules = {module.name for module in pkgutil.iter_modules(mlx_simpo.__path__)}
    assert submodules.isdisjoint(mlx_simpo.__all__)


@pytest.mark.parametrize(
    "module", ["hub.push", "convert.fuse", "convert.from_hf", "evaluation", "training.trainer"]
)
def test_public_functions_stay_functions_when_modules_are_imported(module: str) -> None:
    code = f"""
import mlx_simpo.{module}
from mlx_simpo import evaluate, from_hf, fuse, generate, inspect, push, train
import mlx_simpo.hub, mlx_simpo.convert
functions = [evaluate, from_hf, fuse, generate, inspect, push, train, mlx_simpo.hub.push]
functions += [mlx_simpo.convert.fuse, mlx_simpo.convert.from_hf, mlx_simpo.push]
assert all(type(function).__name__ == "function" for function in functions), functions
"""
    ended = python(code)
    assert ended.returncode == 0, ended.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mlx_simpo' has no attribute 'trian'"):
        mlx_simpo.trian  # noqa: B018
    ended = python("import mlx_simpo; mlx_simpo.trian")
    assert ended.stderr.rstrip().endswith("Did you mean: 'train'?")
    assert not hasattr(mlx_simpo, "trian")
    with pytest.raises(ImportError, match="cannot import name 'trian' from 'mlx_simpo'"):
        exec("from mlx_simpo import trian")


# --- the command line ------------------------------------------------------------------------

COMMAND_LINE = """
import sys
from mlx_simpo.__main__ import main
try:
    main()
except SystemExit as exit:
    assert exit.code in (None, 0, 2), exit.code
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["train", "--help"],
        [],
        ["help"],
        ["help", "data", "inspect"],
        ["trian"],
        ["completion", "bash"],
        ["completion", "zsh"],
        ["completion", "fish"],
        ["config", "model=x", "--lr", "1e-5"],
        ["fuse", "--help"],
        ["push", "--help"],
        ["train", "lora.rank=0"],
        ["evaluate"],
        ["generate"],
        ["generate", "-p", "x", "--top-p", "0.9"],
    ],
)
def test_the_command_line_loads_nothing_heavy_for(arguments: list[str]) -> None:
    ended = python(COMMAND_LINE + LOADED, *arguments)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == []


def test_the_first_line_of_train_comes_before_anything_heavy(tmp_path: Path) -> None:
    """The process stops itself, as soon as MLX is looked for; the line is there already."""
    code = """
import os, signal, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name in ("mlx", "mlx_lm", "numpy", "rich"):
            os.kill(os.getpid(), signal.SIGKILL)
sys.meta_path.insert(0, Stop())
from mlx_simpo.__main__ import main
main()
"""
    ended = python(code, "train", "model=m", "data.train=d", f"output={tmp_path / 'run'}", "--json")
    assert ended.returncode == -signal.SIGKILL
    output = os.fspath(tmp_path / "run")
    line = f"mlx-simpo {mlx_simpo.__version__}: training m, output in {output} …\n"
    assert (ended.stdout, ended.stderr) == ("", line)
