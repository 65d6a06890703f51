"""The project's rules about its own code, read from the source."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_simpo

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_simpo"
TORCH_SIDE = PACKAGE / "convert" / "verify" / "torch_side.py"
FILES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES + EXAMPLES}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef

# Floors from the bottom up (ARCHITECTURE.md). A module imports from lower floors, or from its own
# room; modules and rooms that share a floor do not know each other.
FLOORS = [
    ["errors", "version"],
    ["objectives", "paths", "device"],
    ["files", "blas"],
    ["kernels"],
    ["config", "doctor"],
    ["runs", "data", "model"],
    ["engine"],
    ["evaluation"],
    ["reporting"],
    ["training", "hub", "convert", "sampling"],
    ["api"],
    ["__init__"],
    ["cli"],
    ["__main__"],
]
# The order within a room, from the bottom up.
ROOMS = {
    # What a record goes through.
    "data": [
        ["sources", "order"],
        ["records"],
        ["pairs", "render"],
        ["official"],
        ["encode"],
        ["tokens"],
        ["tokenize", "keys", "inspection"],
        ["cache"],
    ],
    # What pairs of tokens go through.
    "engine": [
        ["reference", "attention", "plan", "head"],
        ["prefix_cache", "collate_stacked", "collate_shared", "token_logps"],
        ["gradient_checkpointing", "shared_prefix"],
        ["choice"],
    ],
}
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}

modules = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def name_of(path: Path) -> str:
    """A module's name in FLOORS: its room's if it is in one."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The absolute names of all modules that are imported, and of what is taken from them."""
    folder = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(folder[: len(folder) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [above, node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    """The names in FLOORS of what a module imports from the package."""
    found = (name.split(".") for name in imported(path))
    inner = [parts[1] if parts[1:] else "" for parts in found if parts[0] == "mlx_simpo"]
    return {name if name in LEVEL else "__init__" for name in inner}


# --- size ------------------------------------------------------------------------------------


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@modules
def test_a_module_has_300_lines_at_most(path: Path) -> None:
    assert lines(path) <= 300


def test_the_usual_module_is_short() -> None:
    assert statistics.median(map(lines, FILES)) <= 130


@modules
def test_a_function_has_60_lines_at_most(path: Path) -> None:
    functions = [node for node in ast.walk(TREES[path]) if isinstance(node, FUNCTION)]
    sizes = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: size for name, size in sizes.items() if size > 60} == {}


# --- output and errors -----------------------------------------------------------------------


@modules
def test_the_library_does_not_print(path: Path) -> None:
    if name_of(path) in ("cli", "__main__"):
        return
    names = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Name)]
    assert [node.lineno for node in names if node.id in ("print", "input", "breakpoint")] == []


@modules
def test_only_the_command_line_has_standard_output(path: Path) -> None:
    if name_of(path) in ("cli", "__main__", "blas"):
        return
    attributes = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.Attribute)]
    assert [n.lineno for n in attributes if n.attr == "stdout"] == []


def caught(handler: ast.ExceptHandler) -> set[str]:
    if handler.type is None:
        return {"everything"}
    return {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}


@modules
def test_no_error_is_caught_unseen(path: Path) -> None:
    """Everything may be caught only to be raised again."""
    handlers = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.ExceptHandler)]
    for handler in handlers:
        if caught(handler) & {"everything", "Exception", "BaseException"}:
            last = handler.body[-1]
            assert isinstance(last, ast.Raise), f"line {handler.lineno}"
            assert last.exc is None, f"line {handler.lineno}"


# --- documentation ---------------------------------------------------------------------------


@modules
def test_a_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(TREES[path])


def test_the_public_names_exist_in_order() -> None:
    assert list(mlx_simpo.__all__) == sorted(set(mlx_simpo.__all__))
    assert all(hasattr(mlx_simpo, name) for name in mlx_simpo.__all__)


def definition(name: str) -> ast.ClassDef | ast.FunctionDef:
    """The source of a public name; a dataclass makes up a docstring where it has none."""
    path = ROOT / (getattr(mlx_simpo, name).__module__.replace(".", "/") + ".py")
    nodes = [n for n in TREES[path].body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    return next(node for node in nodes if node.name == name)


@pytest.mark.parametrize("name", mlx_simpo.__all__)
def test_public_things_have_docstrings(name: str) -> None:
    node = definition(name)
    assert ast.get_docstring(node), name


def test_public_functions_are_annotated() -> None:
    for name in mlx_simpo.__all__:
        node = definition(name)
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert node.returns is not None, name
            assert [a.arg for a in arguments if a.annotation is None] == [], name


# --- imports ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES + EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_is_not_imported(path: Path) -> None:
    if path == TORCH_SIDE:  # only when a comparison is made, see below
        return
    assert {name.split(".")[0] for name in imported(path)}.isdisjoint(
        {"torch", "trl", "peft", "liger_kernel", "tensorflow", "jax"}
    )


def test_the_comparison_with_torch_imports_it_in_functions_alone() -> None:
    tree = TREES[TORCH_SIDE]
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in top}  # type: ignore
    assert names.isdisjoint({"torch", "transformers", "peft"})


def test_every_module_has_its_floor() -> None:
    assert {name_of(path) for path in FILES} == LEVEL.keys()


@modules
def test_imports_point_downwards(path: Path) -> None:
    name = name_of(path)
    others = ours(path) - {name}
    assert {other for other in others if LEVEL[other] >= LEVEL[name]} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_imports_within_a_room_point_downwards(room: str) -> None:
    level = {name: number for number, names in enumerate(ROOMS[room]) for name in names}
    files = {path.stem: path for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__"}
    assert files.keys() == level.keys()
    for name, path in files.items():
        parts = [found.split(".") for found in imported(path)]
        inner = {p[2] for p in parts if p[:2] == ["mlx_simpo", room] and len(p) > 2}
        assert {other for other in inner if level[other] >= level[name]} == set(), name


def test_the_objectives_import_nothing_of_ours() -> None:
    assert ours(PACKAGE / "objectives.py") == set()
