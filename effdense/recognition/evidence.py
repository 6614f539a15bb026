"""What code was read together with: names, attributes of classes, functions, closures."""

from __future__ import annotations

import types
from typing import Any

ABSENT = object()
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))


class Evidence:
    """What was read outside of modules' own attributes, and whether it is still the same."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._attributes: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._functions: dict[int, tuple[types.FunctionType, Any, Any, Any]] = {}
        self._cells: dict[int, tuple[Any, Any]] = {}
        self._sequences: dict[int, tuple[Any, tuple[Any, ...]]] = {}

    def name(self, names: dict[str, Any], name: str) -> None:
        self._names[id(names), name] = names, name, names.get(name, ABSENT)

    def attribute(self, owner: type, name: str) -> None:
        self._attributes[id(owner), name] = owner, name, getattr(owner, name, ABSENT)

    def function(self, function: types.FunctionType) -> None:
        self._functions[id(function)] = (
            function,
            function.__code__,
            function.__defaults__,
            function.__kwdefaults__,
        )

    def cell(self, cell: Any) -> None:
        self._cells[id(cell)] = cell, cell.cell_contents

    def contents(self, container: Any) -> None:
        self._sequences[id(container)] = container, _contents(container)

    def key(self) -> frozenset[Any]:
        """The code that was followed, for proofs that hold for all layers alike."""
        return frozenset(kept[1] for kept in self._functions.values())

    def holds(self) -> bool:
        return (
            all(names.get(name, ABSENT) is value for names, name, value in self._names.values())
            and all(getattr(o, name, ABSENT) is v for o, name, v in self._attributes.values())
            and all(
                f.__code__ is code and f.__defaults__ is values and f.__kwdefaults__ is named
                for f, code, values, named in self._functions.values()
            )
            and all(cell.cell_contents is value for cell, value in self._cells.values())
            and all(_contents(c) == contents for c, contents in self._sequences.values())
        )


def _contents(container: Any) -> tuple[Any, ...]:
    """What a list, set or dict holds: plain values by type and value, others by identity."""
    values = [*container.items()] if isinstance(container, dict) else [*container]
    flat = [part for value in values for part in (value if isinstance(value, tuple) else [value])]
    return tuple((type(v), v if isinstance(v, PLAIN) else id(v)) for v in flat)
