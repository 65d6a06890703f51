"""The wrong versions of a module: all that the operators can make, and a seeded sample of them."""

import ast
import difflib
import random
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator

from .operators import OWN_OPERATORS

# Of Cosmic Ray's replacements, those that a test could miss: a shift of a float, an order of None
# raise at once, and `is` for `==` rarely differs.
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}
BITS = {"BitOr", "BitAnd"}
ORDER = {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"}
IDENTITY = {"Is", "IsNot"}
UNARY = {"USub_UAdd", "Delete_USub", "Delete_Not", "Delete_Invert"}
REMEMBERING = ("cache", "lru_cache", "cached_property")  # without them the results are the same


class Mutant(NamedTuple):
    """One wrong version of a module.

    module: its path in the repository. definition: the function or class that is changed.
    line: where, from 1. before, after: the lines that differ, stripped and joined. code: the whole
    wrong module.
    """

    module: str
    operator: str
    definition: str
    line: int
    before: str
    after: str
    code: str


class Position(NamedTuple):
    """Where an operator can change a module: its n-th possibility."""

    module: Path
    operator: type[Operator]
    occurrence: int
    definition: str
    line: int


@cache
def operators() -> tuple[type[Operator], ...]:
    """Return the operators in use, Cosmic Ray's and ours."""
    names = [name for name in cosmic_ray.plugins.operator_names() if _is_worth_a_test(name)]
    classes = [cosmic_ray.plugins.get_operator(name) for name in names]
    return (*(kind for kind in classes if not kind.arguments()), *OWN_OPERATORS)


def _is_worth_a_test(name: str) -> bool:
    kind, _, change = name.removeprefix("core/").partition("_")
    if kind == "ReplaceUnaryOperator":
        return change in UNARY
    if kind not in ("ReplaceBinaryOperator", "ReplaceComparisonOperator"):
        return True
    return any(set(change.split("_")) <= group for group in (ARITHMETIC, BITS, ORDER, IDENTITY))


def positions(module: Path) -> dict[Any, list[Position]]:
    """Return what can be changed in a module, by kind of change and position in the text.

    A position where one of several replacements can be made (``<`` by ``<=``, ``>``) is one entry.
    """
    nodes = list(ast_nodes(get_ast(module.read_text(encoding="utf-8"))))
    choices: dict[Any, list[Position]] = defaultdict(list)
    for operator in operators():
        kind = operator.__name__.partition("_")[0]
        occurrence = 0
        for node in nodes:
            for start, end in operator().mutation_positions(node):
                if not _is_annotation(node) and not _remembers(operator, node):
                    definition = ASTQuery(node).get_definition_name() or ""
                    at = Position(module, operator, occurrence, definition, start[0])
                    choices[kind, start, end].append(at)
                occurrence += 1
    return choices


def _is_annotation(node: Any) -> bool:
    """Types are read by the type checker and no test."""
    while node.parent is not None:
        parent = node.parent
        if parent.type == "annassign" and node is parent.children[1]:
            return True
        if parent.type == "tfpdef" and node is not parent.children[0]:
            return True
        if parent.type == "funcdef" and parent.children[parent.children.index(node) - 1] == "->":
            return True
        node = parent
    return False


def _remembers(operator: type[Operator], node: Any) -> bool:
    return operator.__name__ == "RemoveDecorator" and any(
        word in node.get_code() for word in REMEMBERING
    )


def sample(root: Path, modules: list[Path], count: int | None, seed: int) -> list[Mutant]:
    """Return ``count`` wrong versions (None: one at every position), in the order of the modules.

    Every position has the same chance, and at a position every replacement.
    """
    choose = random.Random(seed)
    every = [choices for module in modules for choices in positions(module).values()]
    order = list(range(len(every)))
    choose.shuffle(order)
    chosen: list[tuple[int, Mutant]] = []
    for number in order:
        if count is not None and len(chosen) == count:
            break
        mutant = _mutant(root, choose.choice(every[number]))
        if mutant is not None:
            chosen.append((number, mutant))
    return [mutant for _, mutant in sorted(chosen, key=lambda item: item[0])]


def _mutant(root: Path, position: Position) -> Mutant | None:
    """Return the wrong version, or None if it is no Python or the same program."""
    original = position.module.read_text(encoding="utf-8")
    code = mutate_code(original, position.operator(), position.occurrence)
    if code is None or not _is_another_program(original, code):
        return None
    before, after = _changed_lines(original, code)
    return Mutant(
        str(position.module.relative_to(root)),
        position.operator.__name__,
        position.definition,
        position.line,
        before,
        after,
        code,
    )


def _is_another_program(original: str, code: str) -> bool:
    try:
        return ast.dump(ast.parse(code)) != ast.dump(ast.parse(original))
    except SyntaxError:
        return False


def _changed_lines(original: str, code: str) -> tuple[str, str]:
    changes = list(_differences(original, code))
    return tuple(
        " ⏎ ".join(line[2:].strip() for line in changes if line.startswith(sign)) for sign in "-+"
    )


def _differences(original: str, code: str) -> Iterator[str]:
    yield from difflib.ndiff(original.splitlines(), code.splitlines())
