"""What is kept: a folder for each machine, date and revision, and in it a CSV file for each run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from effdense.engine.records import write_atomically
from effdense.errors import UserError

from . import results
from .case import Case
from .results import ENVIRONMENT_COLUMNS, Row

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "benchmarks" / "results"
ENVIRONMENT = "environment.json"


def machine(environment: Mapping[str, Any]) -> str:
    """Its GPU's name, or its processor's, as part of a file name."""
    name = re.sub(r"\((r|tm)\)", "", (environment["gpu"] or environment["processor"]).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def kept_folder(environment: Mapping[str, Any], folder: Path = KEPT) -> Path:
    """Where what is measured in this environment belongs: with what has been there, if anything.

    Raises:
        UserError: where nobody could measure it again.
    """
    revision = environment["git_revision"]
    if "+" in revision or revision == "unknown":
        raise UserError(
            f"results are kept of a revision that is there, got {revision!r}; commit and measure "
            "again"
        )
    own, short = machine(environment), revision[:7]
    # begun before midnight, perhaps, or gone on with
    begun = sorted(folder.glob(f"{own}-????-??-??-{short}"))
    return begun[-1] if begun else folder / f"{own}-{environment['date'][:10]}-{short}"


def note_environment(folder: Path, environment: Mapping[str, Any], **seconds: float) -> None:
    """Write of what machine a folder's results are, and what each took to measure.

    What differs from run to run, a command and its threads, is in the rows alone.
    """
    about = {name: environment[name] for name in ENVIRONMENT_COLUMNS}
    for name in ("command", "threads"):
        del about[name]
    content = {**about, "seconds": {**seconds_of(folder), **seconds}}
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(folder / ENVIRONMENT, lambda path: _write(path, text))


def seconds_of(folder: Path) -> dict[str, float]:
    """What each of a folder's results took to measure, where that is known."""
    path = folder / ENVIRONMENT
    if not path.exists():
        return {}
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    return found


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def case_of(row: Row) -> Case:
    numbers = {name: int(row[name]) for name in ("depth", "growth_rate", "batch_size")}
    numbers |= {name: int(row[name]) for name in ("image_size", "spatial_dims")}
    return Case(row["arch"], **numbers, dtype=row["dtype"], device=row["device"])  # type: ignore[arg-type]


def figure_of(row: Row) -> tuple[str, ...]:
    """What a row is a sample of."""
    about: tuple[str, ...] = (
        "benchmark",
        "arch",
        "depth",
        "growth_rate",
        "batch_size",
        "image_size",
        "dtype",
    )
    about += ("spatial_dims", "device", "provider", "metric", "processes", "steps")
    return tuple(row[name] for name in about)


def source_of(row: Row) -> tuple[str, ...]:
    about = ("processor", "gpu", "git_revision", "command", "threads", "torch")
    return tuple(row[name] for name in about)


class Kept:
    """Rows of all results files, the oldest first."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = sorted(rows, key=lambda row: row["date"])

    @classmethod
    def read(cls, folder: Path = KEPT) -> Kept:
        return cls(row for path in sorted(folder.glob("*/*.csv")) for row in results.read(path))

    def of(self, benchmark: str, metric: str, case: Case | None = None, **columns: str) -> Kept:
        """The rows of a metric that have these values."""
        columns |= {"benchmark": benchmark, "metric": metric}
        return Kept(
            row
            for row in self.rows
            if all(row[name] == value for name, value in columns.items())
            and (case is None or case_of(row) == case)
        )

    def newest(self, **columns: str) -> list[Row]:
        """The rows of the newest run among those that have these values."""
        rows = [row for row in self.rows if all(row[n] == v for n, v in columns.items())]
        rows = [row for row in rows if row["value"]]
        return [row for row in rows if source_of(row) == source_of(rows[-1])]

    def runs(self) -> list[Kept]:
        """Those of each run that has a value, the newest last: times of two are not compared."""
        sources = dict.fromkeys(source_of(row) for row in self.rows if row["value"])
        return [self.run(source) for source in sources]

    def run(self, source: tuple[str, ...]) -> Kept:
        """Those of one run."""
        return Kept(row for row in self.rows if source_of(row) == source)

    def values(self, column: str) -> list[str]:
        """What is in a column, each once."""
        return list(dict.fromkeys(row[column] for row in self.rows))
