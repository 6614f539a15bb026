"""Tables of text: columns for the terminal, and Markdown's for both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


def columns(rows: Sequence[Sequence[Any]], right: Collection[int] = ()) -> str:
    """Rows in columns two spaces apart, those numbered in ``right`` aligned to the right.

    A row may be shorter than the others.
    """
    lines = ["  ".join(row).rstrip() for row in _padded(rows, right)]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, padded for a terminal: the first column left, the others right."""
    number = len(header)
    first, *rest = _padded([header, *rows], range(1, number))
    widths = [len(cell) for cell in first]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [first, rule, *rest])


def _padded(rows: Sequence[Sequence[Any]], right: Collection[int]) -> list[list[str]]:
    cells = [[str(cell) for cell in row] for row in rows]
    widths: dict[int, int] = {}
    for row in cells:
        for i, cell in enumerate(row):
            widths[i] = max(widths.get(i, 0), len(cell))
    return [
        [
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ]
        for row in cells
    ]
