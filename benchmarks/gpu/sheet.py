"""A section's findings: rows, written as they are found, within a time."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from effdense.errors import first_line

from . import ROOT

Verdict = Literal["pass", "fail", "skipped", "measured", "predicted", "said"]


@dataclass(frozen=True)
class Row:
    """One finding: ``value`` in ``unit`` about ``what``, of a ``group`` of such."""

    group: str
    what: str
    verdict: Verdict
    value: float | None = None
    unit: str = ""
    note: str = ""

    def __str__(self) -> str:
        value = "" if self.value is None else f"{show(self.value)} {self.unit}".strip()
        return f"{self.verdict:9} {self.group}: {self.what}  {value}  {self.note}".rstrip()


class Sheet:
    """Rows of one section; ``seconds`` is how long it may take."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("")

    def left(self) -> float:
        """Seconds that the section may still take."""
        return self._end - time.monotonic()

    def add(self, row: Row) -> None:
        row = told(row)
        print(row, flush=True)
        with self._path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")

    def measured(self, group: str, what: str, value: float, unit: str, note: str = "") -> None:
        self.add(Row(group, what, "measured", value, unit, note))

    def check(
        self, group: str, what: str, holds: bool, value: float | None = None, note: str = ""
    ) -> None:
        self.add(Row(group, what, "pass" if holds else "fail", value, "", note))

    def skip(self, group: str, what: str, why: str) -> None:
        self.add(Row(group, what, "skipped", note=why))

    def failed(self, group: str, what: str, error: BaseException) -> None:
        self.add(Row(group, what, "fail", note=f"{type(error).__name__}: {first_line(error)}"))

    def has_time(self, group: str, what: str, seconds: float) -> bool:
        """Whether so many are left; says that ``what`` is left out where they are not."""
        if self.left() >= seconds:
            return True
        self.skip(group, what, "no time left")
        return False


def show(value: float) -> str:
    """In four figures, but whole from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def told(row: Row) -> Row:
    """As others may read it: without the folders of who ran it, and in numbers that JSON has."""
    note = row.note
    for folder, name in ((ROOT, "."), (Path.home(), "~")):
        if folder != folder.parent:
            note = re.sub(rf"{re.escape(str(folder))}(?![\w.-])", name, note)
    if row.value is None or math.isfinite(row.value):
        return dataclasses.replace(row, note=note)
    note = f"{row.value}; {note}" if note else str(row.value)
    return dataclasses.replace(row, note=note, value=None)


def as_json(rows: Mapping[str, Sequence[Row]]) -> str:
    """All rows by section, a line each."""
    sections = []
    for name, found in rows.items():
        lines = [f"  {json.dumps(dataclasses.asdict(row), allow_nan=False)}" for row in found]
        sections.append(f" {json.dumps(name)}: [\n" + ",\n".join(lines) + "\n ]")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def rows_of(path: Path) -> list[Row]:
    """What a section has written; a last line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(Row(**json.loads(line)))
        except ValueError:
            break
    return found
