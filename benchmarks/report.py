"""Tables and pictures of the documentation, from the results kept in benchmarks/results/.

    python benchmarks/report.py                       # writes every table, draws every picture
    python benchmarks/report.py --add results/*.csv   # keeps new results first

A table stands in a page between <!-- table: NAME --> and <!-- end -->; nothing between them is
written by hand. A folder of results is of one machine, date and revision; of the same figure
measured in several, the newest is shown, and below each table stands where its figures are from.
"""

from __future__ import annotations

import csv
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from harness import results
from harness.kept import KEPT, ROOT, Kept, figure_of, kept_folder, note_environment
from harness.pictures import picture
from harness.results import Row
from tables import TABLES
from tyro.conf import arg

from effdense.commands import front_end
from effdense.errors import UserError

FIGURES = ROOT / "benchmarks" / "figures"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
# a picture's name, and the measurements of bench.py that it shows
PICTURES = {
    "memory-depth": ("memory-depth",),
    "throughput": ("throughput-100", "throughput-250", "throughput-121"),
    "timeline": ("timeline",),
    "timeline-volume": ("timeline-volume",),
    "memory-volume": ("memory-volume",),
    "convergence": ("convergence",),
    "precision": ("precision",),
    "estimates": ("estimates",),
    "pareto": ("pareto",),
}


@dataclass(frozen=True)
class Options:
    add: Annotated[
        tuple[Path, ...], arg(metavar="CSV", help_behavior_hint="(default: nothing new)")
    ] = ()
    """Results to be kept: in the folder of their machine, date and revision, where they take the
    place of the same figures."""


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/report.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    for path in options.add:
        try:
            print(keep(results.read(path), path.stem))
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from None
    for page, text in written().items():
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT))
    for path in drawn():
        print(path.relative_to(ROOT))


def keep(rows: Sequence[Row], name: str, folder: Path = KEPT) -> Path:
    """Add rows of one run to the results of their machine, date and revision, under a name.

    Raises:
        UserError: where nobody could measure them again.
    """
    if not rows:
        raise UserError("no rows to keep")
    if any(row["kind"] == "projection" for row in rows):
        raise UserError("projections are not kept: they are no measurements")
    own = kept_folder(rows[0], folder)
    own.mkdir(parents=True, exist_ok=True)
    new = {figure_of(row) for row in rows}
    path = own / f"{name}.csv"
    for other in {*own.glob("*.csv"), path}:
        before = results.read(other) if other.exists() else []
        still = [row for row in before if figure_of(row) not in new]
        if other == path or len(still) < len(before):
            _write_rows(other, [*still, *(rows if other == path else ())])
    note_environment(own, rows[0])
    return path


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        columns = [*results.RESULT_COLUMNS, *results.ENVIRONMENT_COLUMNS]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def drawn() -> Iterator[Path]:
    """Draw every picture of which some machine's results hold all that it shows, the newest's."""
    for name, measured in PICTURES.items():
        folders = [
            folder
            for folder in KEPT.iterdir()
            if all((folder / f"{each}.csv").exists() for each in measured)
        ]
        if folders:
            newest = max(folders, key=lambda folder: _date(folder / f"{measured[0]}.csv"))
            paths = [newest / f"{each}.csv" for each in measured]
            benchmark = importlib.import_module(results.read(paths[0])[0]["benchmark"])
            picture(benchmark.draw, paths, FIGURES / f"{name}.png")
            yield FIGURES / f"{name}.png"
    if shutil.which("dot"):
        graph = ["graph", "densenet_bc", "--depth", "40", "--output", str(FIGURES / "graph.svg")]
        subprocess.run([sys.executable, "-m", "effdense", *graph], check=True, cwd=ROOT)
    else:
        print("graph.svg stays as it is: Graphviz's dot is not installed", file=sys.stderr)


def _date(path: Path) -> str:
    return results.read(path)[0]["date"]


def written() -> dict[Path, str]:
    """Every page with the tables that the kept results make.

    Raises:
        UserError: for a table that is none of ``TABLES``.
    """
    kept = Kept.read()
    found = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):

        def filled(mark: re.Match[str], page: Path = page) -> str:
            if mark[2] not in TABLES:
                raise UserError(f"{page.name}: no table {mark[2]}; there are {', '.join(TABLES)}")
            return f"{mark[1]}\n{TABLES[mark[2]](kept)}\n\n{mark[3]}"

        found[page] = MARKED.sub(filled, page.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
