"""Checks device, threadgroup and constant, which g++ does not know, with Clang (PyPI: libclang)."""

import re
from collections.abc import Iterator
from typing import Any

from clang.cindex import Cursor, CursorKind, TranslationUnit

from .build import CALL_KERNEL, host_text
from .clang import FILE, errors, parse
from .signature import Signature

FLAGS = ["-x", "c++", "-target", "x86_64-linux-gnu", "-DMSL_ADDRESS_SPACES"]
# float4(…) or vec<T, 4>(…), not float4 f(…) or a.float4(…).
CONSTRUCTORS = re.compile(
    r"""(?<![\w.])
    ( (?:metal::)?
      (?: (?:float|half|bfloat|bool|u?char|u?short|u?int|u?long)[234] | vec<[^<>;()]*> ) )
    \s* \( (?=[^)])""",
    re.VERBOSE,
)
Kind: Any = CursorKind  # its members are created at run time
CASTS = (Kind.CSTYLE_CAST_EXPR, Kind.CXX_FUNCTIONAL_CAST_EXPR)


def address_spaces(kernel_signature: Signature, source: str, header: str = "") -> str:
    """Return Clang's errors about the pointers of a kernel with that signature, or an empty string.

    Inputs under eight elements are ``constant``, so check signatures for both sizes.
    """
    text = CONSTRUCTORS.sub(r"msl_make<\1>(", host_text(kernel_signature, source, header))
    unit = parse(text, FLAGS)
    if problems := errors(unit, text):
        return problems
    text = _with_checked_casts(text, unit)
    return errors(parse(text, FLAGS), text)


def _with_checked_casts(text: str, unit: TranslationUnit) -> str:
    """Return the text with every (type)value and type(value) as msl_cast<type>(value)."""
    code = text.encode()  # offsets count bytes
    changes: list[tuple[int, int, bytes]] = []
    kernel_end = code.index(CALL_KERNEL.encode())
    for cast in _casts(unit.cursor):
        start, end = cast.extent.start.offset, cast.extent.end.offset
        *_, value = cast.get_children()
        inside = value.extent.start.offset
        opening = code[start:inside].strip()
        if start > kernel_end:
            break
        if cast.kind == Kind.CSTYLE_CAST_EXPR:
            changes += [(start, inside, _call(opening[1:-1]) + b"("), (end, end, b")")]
        elif opening.endswith(b"("):
            changes.append((start, inside, _call(opening[:-1]) + b"("))
    for start, end, new in sorted(changes, reverse=True):
        code = code[:start] + new + code[end:]
    return code.decode()


def _call(type_: bytes) -> bytes:
    name = b"msl_cast_reference" if type_.rstrip().endswith(b"&") else b"msl_cast"
    return name + b"<" + type_ + b">"


def _casts(cursor: Cursor) -> Iterator[Cursor]:
    for child in cursor.get_children():
        if child.location.file and child.location.file.name == FILE:
            if child.kind in CASTS or _is_dependent_cast(child):
                yield child
            yield from _casts(child)


def _is_dependent_cast(cursor: Cursor) -> bool:
    """T(value) in a template, which Clang takes for a call."""
    kinds = [child.kind for child in cursor.get_children()]
    is_call = cursor.kind == Kind.CALL_EXPR
    return is_call and len(kinds) == 2 and kinds[0] == Kind.TYPE_REF
