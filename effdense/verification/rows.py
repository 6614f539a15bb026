"""Rows of a report: what was compared, how far it was off, and the verdict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ..errors import first_line

Status = Literal["ok", "FAILED", "measured", "not checked"]

TOLERANCE = 1e-10
"""Largest accepted relative error in float64."""


@dataclass(frozen=True)
class Row:
    """One claim, and what came of it."""

    claim: str
    compared: str
    """What was."""
    error: str
    """The largest, with its unit where it has one."""
    limit: str
    """The largest accepted, likewise."""
    status: Status

    @property
    def failed(self) -> bool:
        return self.status == "FAILED"


def not_checked(claim: str, why: str) -> Row:
    return Row(claim, why, "", "", "not checked")


def judged(claim: str, compared: str, error: float, limit: float) -> Row:
    # written so that a NaN fails
    status: Status = "ok" if error <= limit else "FAILED"
    return Row(claim, compared, f"{error:.1e}", f"{limit:.0e}" if limit else "0", status)


def guarded(claim: str, check: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a check, and one more that says how it ended where it raised an error."""
    try:
        yield from check()
    except Exception as error:
        yield Row(claim, f"{type(error).__name__}: {first_line(error)}", "", "", "FAILED")


class Largest:
    """The largest error of each claim, and whose it is."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[float, str]]] = defaultdict(list)

    def add(self, claim: str, name: str, error: float) -> None:
        self._found[claim].append((error, name))

    def rows(
        self, dtype: str, tolerance: float = TOLERANCE, what: str = "tensors"
    ) -> Iterator[Row]:
        for claim, errors in self._found.items():
            error, name = max(errors, key=lambda pair: with_nan_last(pair[0]))
            count = f", {len(errors)} {what}" if len(errors) > 1 else ""
            worst = f", worst {name}" if name and error != 0 else ""
            yield judged(claim, f"{dtype}{count}{worst}", error, tolerance)


def with_nan_last(error: float) -> float:
    return math.inf if math.isnan(error) else error
