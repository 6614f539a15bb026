"""Python's own functions, methods and operators, on symbols and constants."""

from __future__ import annotations

import ast
import math
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .source import Unreadable
from .symbols import Raised, Symbol, Unknown, has_unknown, is_plain, spelled


def _builtin_isinstance(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    value, kinds = args
    flat = kinds if isinstance(kinds, tuple) else (kinds,)
    if not all(isinstance(kind, type) for kind in flat):
        raise Unreadable("isinstance of something else than a class")
    if isinstance(value, Symbol):
        if Tensor in flat or object in flat:
            return True
        if any(issubclass(kind, Tensor) for kind in flat):
            return Unknown(("isinstance", value.node))
        return False
    if isinstance(value, Unknown):
        return Unknown(("isinstance", value.key))
    if isinstance(value, types.MappingProxyType):
        return dict in flat
    return isinstance(value, tuple(kind for kind in flat if type(kind) is type))


def _builtin_getattr(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[1], str):
        raise Unreadable("it reads an attribute by an unknown name")
    try:
        return capture.attribute(args[0], args[1])
    except AttributeError:
        if len(args) == 3:
            return args[2]
        raise Raised from None


def _builtin_hasattr(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], nn.Module) or not isinstance(args[1], str):
        raise Unreadable("it asks for an attribute of something else than a module")
    try:
        capture.attribute(args[0], args[1])
    except AttributeError:
        return False
    return True


def _builtin_number(kind: Callable[..., Any]) -> Any:
    def call(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(a, Symbol) for a in args) or has_unknown(args):
            return Unknown((kind.__name__, spelled(args)))
        flat = [v for a in args for v in (a if isinstance(a, (list, tuple)) else [a])]
        if kwargs or not is_plain(flat):
            raise Unreadable(f"it calls {kind.__name__}")
        try:
            return kind(*args)
        except Exception:
            raise Raised from None

    return call


def _builtin_bool(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return capture._truth(args[0])


def _builtin_len(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    (value,) = args
    if isinstance(value, (Symbol, Unknown)):
        return Unknown(("len", spelled(value)))
    if isinstance(value, nn.Module):
        return len(list(capture._items(value)))
    if isinstance(value, (list, tuple, dict, str, range, types.MappingProxyType)):
        return len(value)
    raise Unreadable(f"it asks for the length of a {type(value).__name__}")


def _builtin_items(kind: Callable[..., Any]) -> Any:
    """Over lists of what is gone through: enumerate, zip, reversed, list, tuple."""

    def call(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = [list(capture._items(a)) if not isinstance(a, (int, bool)) else a for a in args]
        if kwargs.keys() - {"start", "strict"}:
            raise Unreadable(f"it calls {kind.__name__}")
        found = kind(*given, **kwargs)
        return found if isinstance(found, tuple) else list(found)

    return call


def _builtin_any(kind: bool) -> Any:
    def call(capture: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        for value in capture._items(args[0]):
            if capture._truth(value) is kind:
                return kind
        return not kind

    return call


BUILTINS: dict[Any, Any] = {
    isinstance: _builtin_isinstance,
    getattr: _builtin_getattr,
    hasattr: _builtin_hasattr,
    len: _builtin_len,
    bool: _builtin_bool,
    any: _builtin_any(True),
    all: _builtin_any(False),
    **{kind: _builtin_number(kind) for kind in (int, float, str, abs, min, max, round, sum, range)},
    **{f: _builtin_number(f) for f in (math.sqrt, math.floor, math.ceil, math.log, math.prod)},
    **{kind: _builtin_items(kind) for kind in (enumerate, zip, reversed, list, tuple)},
}


ITERATORS: tuple[Any, ...] = (type({}.values()), type({}.items()), type({}.keys()))


METHODS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (list, ("append", "extend", "insert", "pop", "reverse", "copy")),
    (dict, ("items", "keys", "values", "get")),
    (types.MappingProxyType, ("items", "keys", "values", "get")),
    (str, ("startswith", "endswith", "lower", "upper", "join", "split", "format")),
)


UNARY: dict[type, Any] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}


BINARY: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


COMPARE: dict[type, Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
