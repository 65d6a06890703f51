"""YAML without surprises: decimal numbers, true, false and null; everything else is text.

PyYAML implements YAML 1.1, in which ``1e-6`` is text, ``no`` is false, ``010`` is 8, ``1:30`` is 90
and the last of two equal keys wins silently. Its safe loader creates no objects, but a few lines of
aliases of aliases can stand for more values than fit into memory: there are no aliases here.
"""

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from ..errors import SimPOError, one_line

_BOOL, _INT, _FLOAT, _NULL = (
    f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "null")
)
_NUMBER = list("-+.0123456789")
# A number with a point, an exponent or both; YAML 1.1 requires a point and a signed exponent.
_FLOAT_TEXT = re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$")


class StrictLoader(yaml.SafeLoader):
    """Reads decimal numbers, true, false and null; a repeated key or an alias is an error."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Build the tree of the text.

        Raises:
            yaml.YAMLError: a value is an alias.
        """
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            line = event.start_mark.line + 1
            raise yaml.YAMLError(
                f"*{event.anchor} is an alias; write its value again (line {line})"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Build a mapping, all of whose keys must be different.

        Raises:
            yaml.YAMLError: a key appears twice, or cannot be a key.
        """
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"a name must be text, not {key!r} (line {line})")
            if key in seen:
                raise yaml.YAMLError(f"{key!r} appears twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep)


# Keep PyYAML's null; the patterns for bool, int, float and dates are replaced.
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == _NULL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|false)$"), list("tf"))
StrictLoader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), _NUMBER)
StrictLoader.add_implicit_resolver(_FLOAT, _FLOAT_TEXT, _NUMBER)


class StrictDumper(yaml.SafeDumper):
    """Quotes every text that this loader, or any YAML 1.1 loader, would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that appears twice out twice: `StrictLoader` reads no aliases."""
        return True

    # What YAML normalizes to \n unless it is an escape in double quotes.
    ESCAPED = re.compile("[\r\x85\u2028\u2029]")

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Represent text so that it reads back unchanged."""
        style = '"' if self.ESCAPED.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


StrictDumper.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
StrictDumper.add_implicit_resolver(_FLOAT, _FLOAT_TEXT, _NUMBER)
StrictDumper.add_representer(str, StrictDumper.represent_text)


class InlineDumper(StrictDumper):
    """Writes every value on one line."""

    ESCAPED = re.compile("[\n\r\x85\u2028\u2029]")


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text.

    Args:
        where: the file or setting, to be named in the message.

    Raises:
        SimPOError: the text is not valid YAML.
    """
    try:
        return yaml.load(text, StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SimPOError(f"{where} is not valid YAML: {one_line(error)}") from None


def key_lines(text: str) -> dict[str, int]:
    """Return the line, from 1 on, of every key of valid YAML text; nested keys have dots."""
    lines: dict[str, int] = {}
    nodes = [("", yaml.compose(text, StrictLoader))]
    while nodes:
        prefix, node = nodes.pop()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
            lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            nodes.append((f"{prefix}{key.value}.", value))
    return lines


def dump_yaml(values: dict) -> str:
    """Return YAML text that `parse_yaml` reads back as ``values``, in the same order."""
    return yaml.dump(values, Dumper=StrictDumper, sort_keys=False, allow_unicode=True)


def dump_inline(value: Any) -> str:
    """Return YAML text of one line that `parse_yaml` reads back as ``value``."""
    text = yaml.dump(
        value,
        Dumper=InlineDumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=True,
        width=math.inf,
    )
    # After a plain scalar PyYAML marks the end of the document.
    return text.removesuffix("\n").removesuffix("\n...")
