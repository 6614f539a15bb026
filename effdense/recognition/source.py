"""The syntax tree of a function's code, and proof that it is that code's.

Source text may be missing, or have changed since it was imported. So it is compiled again,
and must give the very code object whose meaning is asked for.
"""

from __future__ import annotations

import ast
import functools
import linecache
import types
from collections.abc import Iterator

Definition = ast.FunctionDef | ast.Lambda


class Unreadable(Exception):
    """What a piece of code does can't be told; carries the reason."""


class Differs(Unreadable):
    """What a piece of code does is known, and something else than was asked for."""


@functools.lru_cache(maxsize=4096)
def definition(code: types.CodeType) -> Definition:
    """The definition that ``code`` was compiled from.

    Raises:
        Unreadable: where its source is missing, isn't its source, or is ambiguous.
    """
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename))
    if not text:
        raise Unreadable(f"{code.co_name} has no source that could be read")
    try:
        codes, definitions = _compiled(code.co_filename, text)
    except SyntaxError:
        codes, definitions = {}, {}
    place = (code.co_name, code.co_firstlineno)
    found = definitions.get(place, [])
    if code not in codes.get(place, []):
        raise Unreadable(f"the source of {code.co_name} is not what it was compiled from")
    if len(found) != 1:
        raise Unreadable(f"{len(found)} functions of {code.co_name}'s name start on its line")
    return found[0]


_Place = tuple[str, int]


@functools.lru_cache(maxsize=64)
def _compiled(
    filename: str, text: str
) -> tuple[dict[_Place, list[types.CodeType]], dict[_Place, list[Definition]]]:
    tree = ast.parse(text)
    codes: dict[_Place, list[types.CodeType]] = {}
    for code in _codes_in(compile(text, filename, "exec", dont_inherit=True)):
        codes.setdefault((code.co_name, code.co_firstlineno), []).append(code)
    definitions: dict[_Place, list[Definition]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            definitions.setdefault((node.name, first), []).append(node)
        elif isinstance(node, ast.Lambda):
            definitions.setdefault(("<lambda>", node.lineno), []).append(node)
    return codes, definitions


def _codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes_in(constant)
