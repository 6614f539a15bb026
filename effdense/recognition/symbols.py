"""What a capture computes with: symbols for tensors, and what Python needs beside them."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .evidence import ABSENT, PLAIN
from .source import Definition


class Symbol:
    """A tensor: the node of its value, its rank where known, and what it may be a view of."""

    __slots__ = ("bases", "node", "rank")

    def __init__(self, node: int, rank: int | None = None, bases: Iterable[Symbol] = ()) -> None:
        self.node, self.rank, self.bases = node, rank, tuple(bases)


@dataclass(frozen=True)
class Unknown:
    """A scalar that depends on tensors or modes; ``key`` says on what."""

    key: Any


@dataclass(frozen=True, eq=False)
class Method:
    """A function bound to an object, or the name of a tensor's method."""

    function: Any
    owner: Any


@dataclass(frozen=True, eq=False)
class Super:
    after: type
    owner: Any


@dataclass(frozen=True, eq=False)
class Closure:
    """A function that was defined while interpreting."""

    node: Definition
    scope: Scope
    defaults: list[Any]
    named_defaults: dict[str, Any]


class Reference(list):
    """A list from outside, which may be read and not changed."""


class Scope:
    def __init__(self, names: dict[str, Any], outer: Scope | types.FunctionType) -> None:
        self.names, self.outer = names, outer

    def function(self) -> types.FunctionType:
        outer = self.outer
        return outer.function() if isinstance(outer, Scope) else outer


class Raised(Exception):
    """The code that is followed raises."""


class Return(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class Break(Exception):
    pass


class Continue(Exception):
    pass


def bound_arguments(
    spec: ast.arguments,
    defaults: list[Any],
    named_defaults: dict[str, Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Arguments by name, as Python binds them."""
    names = [argument.arg for argument in (*spec.posonlyargs, *spec.args)]
    only = [argument.arg for argument in spec.kwonlyargs]
    bound = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | named_defaults
    # in the order of declaration: super() asks for the first
    bound = {name: bound[name] for name in (*names, *only) if name in bound}
    given = dict(zip(names, args, strict=False))
    rest = dict(kwargs)
    for name in (*names, *only):
        if name in rest:
            if name in given:
                raise Raised
            given[name] = rest.pop(name)
    merged = {name: given.get(name, bound.get(name, ABSENT)) for name in (*names, *only)}
    if any(value is ABSENT for value in merged.values()):
        raise Raised
    if spec.vararg is not None:
        merged[spec.vararg.arg] = tuple(args[len(names) :])
    elif len(args) > len(names):
        raise Raised
    if spec.kwarg is not None:
        merged[spec.kwarg.arg] = rest
    elif rest:
        raise Raised
    return merged


def symbols_in(values: Any) -> Iterator[Symbol]:
    for value in values:
        if isinstance(value, Symbol):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from symbols_in(value)


def spelled(values: Any) -> Any:
    """Constants among an operation's arguments, so that it is told apart from others."""
    if isinstance(values, dict):
        return tuple((name, spelled(value)) for name, value in values.items())
    if isinstance(values, Unknown):
        return values
    if isinstance(values, (list, tuple)):
        return tuple(spelled(value) for value in values)
    if isinstance(values, Symbol):
        return "node", values.node
    return repr(values)


def is_plain(values: Any) -> bool:
    return all(isinstance(value, (*PLAIN, Unknown)) for value in values)


def has_unknown(values: Any) -> bool:
    for value in values:
        if isinstance(value, Unknown):
            return True
        if isinstance(value, slice) and has_unknown((value.start, value.stop, value.step)):
            return True
        if isinstance(value, (list, tuple)) and has_unknown(value):
            return True
    return False


# Of what is known of a tensor, what differs where a layer is run again in backward.
_OF_GRADIENTS = frozenset({"is_grad_enabled", "requires_grad", "is_leaf"})


def of_gradients(values: Any) -> bool:
    """Whether what hangs on gradients being asked for is among values, or keys of unknown ones."""
    if isinstance(values, Unknown):
        return of_gradients(values.key)
    if isinstance(values, slice):
        return of_gradients((values.start, values.stop, values.step))
    if isinstance(values, dict):
        return of_gradients(tuple(values.values()))
    if isinstance(values, (list, tuple)):
        return any(map(of_gradients, values))
    return isinstance(values, str) and values in _OF_GRADIENTS


def flat_index(index: Any) -> list[Any]:
    found: list[Any] = []
    for each in index if isinstance(index, tuple) else [index]:
        if isinstance(each, slice):
            found += [each.start, each.stop, each.step]
        else:
            found.append(each)
    return found


def state_of(arguments: Any) -> Any:
    """What can be changed in what a call is given."""
    if isinstance(arguments, Symbol):
        return arguments.node
    if isinstance(arguments, dict):
        return [(name, state_of(value)) for name, value in arguments.items()]
    if isinstance(arguments, (list, tuple)):
        return [state_of(value) for value in arguments]
    return id(arguments)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Symbol) and isinstance(other, Symbol):
        return one.node == other.node
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (*PLAIN, Unknown)) and type(one) is type(other):
        return bool(one == other)
    return one is other


def scalar(size: Any) -> Any:
    if isinstance(size, (tuple, list)) and len(set(size)) == 1:
        return size[0]
    return size
