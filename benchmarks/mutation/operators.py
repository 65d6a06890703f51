"""Mistakes that Cosmic Ray does not make: a setting that is not passed on, a step that is left out,
chosen for rejected, a condition that always holds.

Each is one of Cosmic Ray's operators, so its machinery applies them like its own.
"""

from collections.abc import Iterator
from typing import Any

import parso
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from parso.tree import BaseNode, NodeOrLeaf

Position = tuple[tuple[int, int], tuple[int, int]]

# Names that are easily taken for each other, both ways.
SWAPS = (
    ("chosen", "rejected"),
    ("min", "max"),
    ("minimum", "maximum"),
    ("any", "all"),
    ("sum", "mean"),
    ("startswith", "endswith"),
    ("append", "extend"),
    ("floor", "ceil"),
    ("lower", "upper"),
    ("float32", "float16"),
    ("zeros", "ones"),
    ("start", "stop"),
    ("keys", "values"),
    ("queries", "keys"),
    ("train", "eval"),
    ("prompt", "response"),
)
OPENING = ("[", "{")
AUGMENTED = {
    "+=": ("-=", "="),
    "-=": ("+=", "="),
    "*=": ("/=", "="),
    "/=": ("*=", "="),
    "|=": ("&=", "="),
    "&=": ("|=", "="),
}


def replacement(code: str, prefix: str = " ") -> NodeOrLeaf:
    """Parse an expression that takes a node's place."""
    return parso.parse(prefix + code)


class DropKeyword(Operator):
    """Leave out one argument ``name=value`` of a call, so that the default holds."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        for argument in self._arguments(node):
            yield argument.start_pos, argument.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        argument = list(self._arguments(node))[index]
        siblings = argument.parent.children
        at = siblings.index(argument)
        if argument.parent is not node or node.type == "trailer":  # the only argument
            del siblings[at]
        else:
            comma = at + 1 if at + 1 < len(siblings) else at - 1
            for position in sorted({at, comma} - {-1}, reverse=True):
                del siblings[position]
        return node

    @staticmethod
    def _arguments(node: Any) -> Iterator[Any]:
        if node.type == "arglist" and node.parent.type == "trailer":
            candidates = node.children
        elif node.type == "trailer" and node.children[0].value == "(":
            candidates = node.children[1:-1]
        else:
            return
        for child in candidates:
            if child.type == "argument" and child.children[1] == "=":
                yield child

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example("f(a, b=1)", "f(a)"),
            Example("f(b=1, c=2)", "f( c=2)"),
            Example("f(b=1)", "f()"),
        )


class DropCall(Operator):
    """Leave out a statement that is a call, as ``model.train()``."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        if node.type == "simple_stmt":
            expression = node.children[0]
            if expression.type == "atom_expr" and expression.children[-1].type == "trailer":
                yield expression.start_pos, expression.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        prefix = node.get_first_leaf().prefix
        node.children[0] = replacement("pass", prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("model.train()\n", "pass\n"),)


class SwapName(Operator):
    """Take chosen for rejected, min for max, any for all."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        for _ in self._swapped(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = list(self._swapped(node))[index]
        return node

    @staticmethod
    def _swapped(node: Any) -> Iterator[str]:
        if node.type != "name" or node.is_definition():
            return
        words = node.value.split("_")
        for one, other in SWAPS:
            if one in words or other in words:
                twin = {one: other, other: one}
                yield "_".join(twin.get(word, word) for word in words)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example("f(chosen_logps)", "f(rejected_logps)"),
            Example("y = min(a, b)", "y = max(a, b)"),
        )


class FixCondition(Operator):
    """Take a condition of ``if``, ``while`` or a conditional expression as always or never true."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        for condition in self._conditions(node):
            yield condition.start_pos, condition.end_pos
            if node.type != "while_stmt":  # which would not end
                yield condition.start_pos, condition.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        conditions = list(self._conditions(node))
        choices = ("False",) if node.type == "while_stmt" else ("False", "True")
        condition = conditions[index // len(choices)]
        at = node.children.index(condition)
        node.children[at] = replacement(choices[index % len(choices)])
        return node

    @staticmethod
    def _conditions(node: Any) -> Iterator[Any]:
        if node.type in ("if_stmt", "while_stmt"):
            for keyword, condition in zip(node.children, node.children[1:], strict=False):
                if getattr(keyword, "value", None) in ("if", "elif", "while"):
                    yield condition
        elif node.type == "test":  # parso's name of a conditional expression
            yield node.children[2]
        elif node.type == "comp_if":
            yield node.children[1]

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example("if a:\n    b\n", "if False:\n    b\n"),
            Example("if a:\n    b\n", "if True:\n    b\n", occurrence=1),
            Example("x = a if b else c", "x = a if False else c"),
        )


class DropElement(Operator):
    """Leave out one element of a list, set or dictionary that is written out."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        for span in self._elements(node):
            yield span[0].start_pos, span[-1].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        span = list(self._elements(node))[index]
        inside = node.children[1].children
        first, last = inside.index(span[0]), inside.index(span[-1])
        if last + 1 < len(inside):
            last += 1
        elif first:
            first -= 1
        del inside[first : last + 1]
        return node

    @staticmethod
    def _elements(node: Any) -> Iterator[list[Any]]:
        if node.type != "atom" or node.children[0].value not in OPENING:
            return
        content = node.children[1]
        if not isinstance(content, BaseNode) or content.type not in (
            "testlist_comp",
            "dictorsetmaker",
        ):
            return
        if any(child.type in ("comp_for", "sync_comp_for") for child in content.children):
            return
        span: list[Any] = []
        for child in content.children:
            if getattr(child, "value", None) == ",":
                yield span
                span = []
            else:
                span.append(child)
        if span:
            yield span

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example("x = [a, b]", "x = [ b]"),
            Example("x = {'a': 1, 'b': 2}", "x = {'a': 1}", occurrence=1),
        )


class ChangeAugmented(Operator):
    """Take ``+=`` for ``-=``, ``*=`` for ``/=``, and each for ``=``."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        for _ in AUGMENTED.get(getattr(node, "value", ""), ()):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = AUGMENTED[node.value][index]
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("x += 1", "x -= 1"), Example("x += 1", "x = 1", occurrence=1))


OWN_OPERATORS: tuple[type[Operator], ...] = (
    DropKeyword,
    DropCall,
    SwapName,
    FixCondition,
    DropElement,
    ChangeAugmented,
)


def check_operators() -> None:
    """Make sure that ours do what their examples say.

    Raises:
        SystemExit: one does not.
    """
    for operator in OWN_OPERATORS:
        for example in operator.examples():
            code = mutate_code(example.pre_mutation_code, operator(), example.occurrence)
            if code != example.post_mutation_code:
                raise SystemExit(
                    f"{operator.__name__}: {example.pre_mutation_code!r} becomes {code!r} "
                    f"instead of {example.post_mutation_code!r}"
                )
