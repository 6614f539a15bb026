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


class Growing:
    """Columns whose rows are shown as they come: the first to the left, the others to the right.

    Args:
        header: a title for each, of several lines where it has line breaks.
        firsts: what will stand in the first column.
        width: of what stands in the others, at least.
    """

    def __init__(self, header: Sequence[str], firsts: Sequence[str], width: int = 7) -> None:
        titles = [title.split("\n") for title in header]
        height = max(map(len, titles))
        self._titles = [[""] * (height - len(title)) + title for title in titles]
        self._widths = [max(width, *map(len, title)) for title in titles]
        self._widths[0] = max(map(len, (*firsts, *titles[0])))

    def header(self) -> str:
        """Titles above a rule."""
        lines = [self.row(cells) for cells in zip(*self._titles, strict=True)]
        return "\n".join([*lines, "  ".join("-" * width for width in self._widths)])

    def row(self, cells: Sequence[str], said: str = "") -> str:
        """A line, of fewer cells perhaps, and what is ``said`` after them."""
        first, *rest = cells
        numbers = [c.rjust(w) for c, w in zip(rest, self._widths[1:], strict=False)]
        return "  ".join([first.ljust(self._widths[0]), *numbers, said]).rstrip()


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
