"""The curves of one run or of several, drawn from their CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import UserError
from .records import number, write_atomically

# What is drawn: the axis, and of which files which columns with which dashes.
_CURVES: dict[str, tuple[str, tuple[tuple[str, str, str], ...]]] = {
    "loss": ("loss", (("train", "loss", "--"), ("test", "loss", "-"))),
    "error": ("error (%)", (("train", "error", "--"), ("test", "error", "-"))),
    "learning-rate": ("learning rate", (("train", "lr", "-"),)),
    "images-per-second": ("images / s", (("speed", "images_per_second", "-"),)),
    "memory": (
        "peak memory of the largest process\nover its start (MiB)",
        (("speed", "memory_mib", "-"),),
    ),
}
SCORES, ALL = ("loss", "error"), tuple(_CURVES)
# A loss that is so many times the usual one would press all others into a line.
_DWARFS = 10


def draw(
    work_dirs: Sequence[Path],
    output: Path,
    quantities: Sequence[str] = SCORES,
    best: int | None = None,
) -> list[Path]:
    """Draw quantities over the epochs: training dashed, test solid, one colour per run.

    The axis of losses is logarithmic where one epoch's dwarfs the rest.

    Args:
        work_dirs: folders that hold a train.csv and a test.csv.
        output: folder for the pictures, such as loss.png; made if it is not there.
        quantities: of :data:`ALL`; those that no run has recorded are left out.
        best: an epoch to be marked, of a single run.

    Returns:
        The files.

    Raises:
        UserError: where there is no run, or the output folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {output}: {error.strerror}") from None
    return save(figures(work_dirs, quantities, best), output)


def save(drawn: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write figures as PNG, each called by its quantity; the files.

    Raises:
        UserError: where the folder cannot be written.
    """
    paths = {folder / f"{quantity}.png": figure for quantity, figure in drawn.items()}
    for path, figure in paths.items():
        write_atomically(path, partial(figure.savefig, dpi=120))
    return list(paths)


def figures(
    work_dirs: Sequence[Path], quantities: Sequence[str], best: int | None = None
) -> dict[str, Figure]:
    """The figures of :func:`draw` by quantity.

    Raises:
        UserError: where there is no run.
    """
    runs = []
    for name, path in _distinct_names(work_dirs):
        tables = {part: read(path / f"{part}.csv") for part in ("train", "test")}
        if (path / "speed.csv").exists():
            tables["speed"] = read(path / "speed.csv", ("images_per_second", "memory_mib"))
        runs.append((name, tables))
    found = {}
    for quantity in quantities:
        label, curves = _CURVES[quantity]
        lines = [
            (f"C{number}", name, part, dashes, tables[part]["epoch"], tables[part][column])
            for number, (name, tables) in enumerate(runs)
            for part, column, dashes in curves
            if column in tables.get(part, ())
        ]
        if quantity not in SCORES and not any(epochs for *_, epochs, _ in lines):
            continue
        figure = Figure(figsize=(6.4, 4.0))
        # not by a layout engine, which would measure all texts at every drawing
        figure.subplots_adjust(left=0.15, right=0.97, bottom=0.13, top=0.96)
        axes = figure.subplots()
        for colour, name, part, dashes, epochs, values in lines:
            words = [name] * (len(runs) > 1) + [part] * (len(curves) > 1)
            # markers: a run's first epoch is a single point
            style: Any = {"color": colour, "marker": ".", "markersize": 4}
            axes.plot(epochs, values, dashes, label=", ".join(words) or None, **style)
        axes.set(xlabel="epoch", ylabel=label)
        drawn = [y for *_, values in lines for y in values if math.isfinite(y)]
        if quantity == "loss" and _has_a_dwarfing(drawn):
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.05 * max(drawn, default=0) or 1)
        if best is not None:
            axes.axvline(best, color="0.5", linestyle=":", label=f"best epoch, {best}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        found[quantity] = figure
    return found


def _has_a_dwarfing(losses: Sequence[float]) -> bool:
    """Whether the largest of positive losses dwarfs the usual one."""
    ranked = sorted(losses)
    return bool(ranked) and ranked[0] > 0 and ranked[-1] > _DWARFS * ranked[len(ranked) // 2]


def read(path: Path, columns: Sequence[str] = SCORES) -> dict[str, list[float]]:
    """The columns of a CSV file; a last row that was cut short is left out.

    Raises:
        UserError: if it is missing or is not what a run writes.
    """
    try:
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
            values = [list(map(number, row)) for row in rows if len(row) == len(header)]
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no run: there is no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not {"epoch", *columns} <= set(header):
        names = " and ".join([", ".join(["epoch", *columns[:-1]]), columns[-1]])
        raise UserError(f"cannot read {path}: it has no columns {names}")
    by_column = zip(*values, strict=True) if values else [()] * len(header)
    return {name: list(column) for name, column in zip(header, by_column, strict=True)}


def _distinct_names(work_dirs: Sequence[Path]) -> list[tuple[str, Path]]:
    """Each folder's name, or its whole path where two names are the same."""
    names = [path.resolve().name for path in work_dirs]
    if len(set(names)) < len(names):
        names = [str(path) for path in work_dirs]
    return list(zip(names, work_dirs, strict=True))
