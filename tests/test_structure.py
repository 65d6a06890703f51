"""The project's rules about its own code, read from the source."""

import ast
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from house_rules import (
    MAX_LINES,
    Violation,
    code_lines,
    long_modules,
    phrase_violations,
    repeated,
    silent_raises,
    word_violations,
)

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
    ["objectives", "paths", "device", "randomness"],
    ["files", "blas"],
    ["kernels"],
    ["config"],
    ["runs", "data", "model"],
    ["engine"],
    ["evaluation"],
    ["reporting", "planning"],
    ["sampling"],
    ["training", "hub", "convert"],
    ["api", "generation", "doctor"],
    ["__init__"],
    ["cli"],
    ["__main__"],
]
# The order within a room, from the bottom up.
ROOMS = {
    # What a record goes through.
    "data": [
        ["rows", "order"],
        ["text_files", "tables", "forms", "guesses", "messages"],
        ["json_rows", "csv_rows", "columns"],
        ["sources", "records", "sampling"],
        ["memory", "thinking", "template_args", "prompt_words"],
        ["render"],
        ["pairs", "boundary", "special_tokens", "truncation", "preambles", "shingles"],
        ["official", "dropped"],
        ["encode", "near"],
        ["tokens"],
        [
            *("tokenize", "keys", "inspection", "export", "template_messages", "mixing"),
            "duplicates",
        ],
        ["cache", "overview"],
    ],
    # From a micro-batch to a message.
    "planning": [["largest", "peak", "memory_limits"], ["memory"], ["memory_errors"]],
    # What pairs of tokens go through.
    "engine": [
        [
            *("reference", "figures", "trunk", "vocabulary", "agreement", "delta_rule"),
            "stopwatch",
        ],
        ["attention", "plan", "head"],
        ["prefix_cache"],
        ["operations", "collate_stacked", "collate_shared", "token_logps", "trial_shapes"],
        ["gradient_checkpointing", "attention_shapes", "head_timing", "pass_timing", "lora_linear"],
        ["shared_prefix", "fused_attention"],
        ["fused_delta_rule"],
        ["operation_choice"],
        ["choice", "attention_timing"],
        ["calibration"],
        ["calibrated"],
    ],
    # From the machine to the report.
    "doctor": [
        ["machine", "kernel", "texts", "attempts", "text"],
        ["operations"],
        ["examples"],
        ["equality"],
        ["steps"],
        ["examine"],
    ],
}
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def name_of(path: Path) -> str:
    """Return a module's name in FLOORS: its room's if it is in one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def lines_where(condition: Callable[[ast.AST], bool], paths: Iterable[Path]) -> list[str]:
    """Return "file:line" of every node in these files that the condition holds for."""
    return [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for path in paths
        for node in ast.walk(TREES[path])
        if condition(node)
    ]


def imported(path: Path) -> Iterator[str]:
    """Yield the absolute names of all modules that a file imports, and of what it takes from
    them."""
    folder = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(folder[: len(folder) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [above, node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_rooms(path: Path) -> set[str]:
    """Return the names in FLOORS of what a file imports from the package."""
    names = (name.split(".") for name in imported(path))
    inner = [parts[1] if parts[1:] else "" for parts in names if parts[0] == "mlx_simpo"]
    return {name if name in LEVEL else "__init__" for name in inner}


# --- house rules: what each is for stands in house_rules.py ----------------------------------


@pytest.mark.parametrize("rule", [word_violations, phrase_violations, silent_raises])
def test_the_package_keeps_the_house_rules(rule: Callable[[Path], list[Violation]]) -> None:
    violations = [violation for path in FILES for violation in rule(path)]
    assert not violations, "\n" + "\n".join(map(str, violations))


def test_modules_have_at_most_300_lines() -> None:
    assert MAX_LINES == 300
    assert long_modules(FILES) == []


def test_at_most_1_percent_of_the_lines_are_repeated() -> None:
    lines = sum(len(code_lines(path)) for path in FILES)
    violations = repeated(FILES)
    assert len(violations) / lines <= 0.01, "\n" + "\n".join(map(str, violations))


# --- size ------------------------------------------------------------------------------------


def test_the_median_module_has_at_most_130_lines() -> None:
    assert statistics.median(len(path.read_text("utf-8").splitlines()) for path in FILES) <= 130


def test_functions_have_at_most_60_lines() -> None:
    def is_long(node: ast.AST) -> bool:
        return isinstance(node, FUNCTION) and (node.end_lineno or 0) - node.lineno >= 60

    assert lines_where(is_long, FILES) == []


# --- output and errors -----------------------------------------------------------------------


def test_only_the_command_line_prints_and_asks() -> None:
    def is_terminal_access(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in ("print", "input", "breakpoint")

    library = [path for path in FILES if name_of(path) not in ("cli", "__main__")]
    assert lines_where(is_terminal_access, library) == []


def test_only_the_command_line_uses_standard_output() -> None:
    def is_stdout(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "stdout"

    library = [path for path in FILES if name_of(path) not in ("cli", "__main__", "blas")]
    assert lines_where(is_stdout, library) == []


def test_errors_of_any_kind_are_caught_only_to_be_raised_again() -> None:
    def swallows_everything(node: ast.AST) -> bool:
        if not isinstance(node, ast.ExceptHandler):
            return False
        names = ast.walk(node.type) if node.type else iter(())
        caught = {name.id for name in names if isinstance(name, ast.Name)}
        if node.type is not None and not caught & {"Exception", "BaseException"}:
            return False
        last = node.body[-1]
        return not (isinstance(last, ast.Raise) and last.exc is None)

    assert lines_where(swallows_everything, FILES) == []


# --- documentation ---------------------------------------------------------------------------


def test_modules_have_docstrings() -> None:
    def lacks_docstring(node: ast.AST) -> bool:
        return isinstance(node, ast.Module) and not ast.get_docstring(node)

    assert lines_where(lacks_docstring, FILES) == []


def test_the_public_names_exist_in_order() -> None:
    assert list(mlx_simpo.__all__) == sorted(set(mlx_simpo.__all__))
    assert [name for name in mlx_simpo.__all__ if not hasattr(mlx_simpo, name)] == []


def definition(name: str) -> ast.ClassDef | ast.FunctionDef:
    """Return the source of a public name: a dataclass without a docstring makes one up."""
    path = ROOT / (getattr(mlx_simpo, name).__module__.replace(".", "/") + ".py")
    nodes = [n for n in TREES[path].body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    return [node for node in nodes if node.name == name][-1]  # overloads come before it


def test_public_names_have_docstrings() -> None:
    assert [name for name in mlx_simpo.__all__ if not ast.get_docstring(definition(name))] == []


def test_public_functions_are_annotated() -> None:
    incomplete = []
    for name in mlx_simpo.__all__:
        node = definition(name)
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            incomplete += [f"{name}({a.arg})" for a in arguments if a.annotation is None]
            incomplete += [f"{name} ->"] if node.returns is None else []
    assert incomplete == []


# --- imports ---------------------------------------------------------------------------------


def test_only_the_comparison_with_torch_imports_it() -> None:
    libraries = {"torch", "trl", "peft", "liger_kernel", "tensorflow", "jax"}
    imports = {
        str(path.relative_to(ROOT)): libraries & {name.split(".")[0] for name in imported(path)}
        for path in FILES + EXAMPLES
        if path != TORCH_SIDE
    }
    assert {path: names for path, names in imports.items() if names} == {}


def test_the_comparison_with_torch_imports_it_within_functions() -> None:
    top = [node for node in TREES[TORCH_SIDE].body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in top}
    assert names.isdisjoint({"torch", "transformers", "peft"})


def test_every_module_is_on_a_floor() -> None:
    assert {name_of(path) for path in FILES} == LEVEL.keys()


def test_imports_point_downwards() -> None:
    upwards = []
    for path in FILES:
        name = name_of(path)
        for other in sorted(imported_rooms(path) - {name}):
            if LEVEL[other] >= LEVEL[name]:
                upwards.append(f"{path.relative_to(ROOT)} imports {other}")
    assert upwards == []


@pytest.mark.parametrize("room", ROOMS)
def test_imports_within_a_room_point_downwards(room: str) -> None:
    level = {name: number for number, names in enumerate(ROOMS[room]) for name in names}
    files = {path.stem: path for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__"}
    assert files.keys() == level.keys()
    upwards = []
    for name, path in files.items():
        modules = [module.split(".") for module in imported(path)]
        inner = {m[2] for m in modules if m[:2] == ["mlx_simpo", room] and len(m) > 2}
        upwards += [f"{name} imports {o}" for o in sorted(inner) if level[o] >= level[name]]
    assert upwards == []


def test_the_objectives_import_nothing_of_ours() -> None:
    assert imported_rooms(PACKAGE / "objectives.py") == set()


def test_every_folder_of_the_package_is_in_the_wheel() -> None:
    """The build leaves out whatever .gitignore names without its place ("runs/", not "/runs/")."""
    patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    ignored = {pattern.strip("/") for pattern in patterns if not pattern.startswith("/")}
    for folder in {path.parent for path in FILES}:
        assert (folder / "__init__.py").is_file(), folder
        assert not ignored & set(folder.relative_to(ROOT).parts), folder
