"""The curves of one run or of several, drawn from their CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import UserError
from .records import number, write_atomically

_LABELS = {"loss": "loss", "error": "error (%)"}
_SPEED = {
    "images-per-second": ("images_per_second", "images / s"),
    "memory": ("memory_mib", "peak memory of the largest process\nover its start (MiB)"),
}
SCORES = tuple(_LABELS)
ALL = (*SCORES, "learning-rate", *_SPEED)
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
    paths = []
    for quantity, figure in figures(work_dirs, quantities, best).items():
        path = output / f"{quantity}.png"
        write_atomically(path, partial(figure.savefig, dpi=120))
        paths.append(path)
    return paths


def figures(
    work_dirs: Sequence[Path], quantities: Sequence[str], best: int | None = None
) -> dict[str, Figure]:
    """The figures of :func:`draw` by quantity.

    Raises:
        UserError: where there is no run.
    """
    names = _distinct_names(work_dirs)
    scores = [
        (name, {"train": read(path / "train.csv"), "test": read(path / "test.csv")})
        for name, path in names
    ]
    speeds = [
        (name, read(path / "speed.csv", [column for column, _ in _SPEED.values()]))
        for name, path in names
        if (path / "speed.csv").exists()
    ]
    found = {}
    for quantity in quantities:
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        # markers: a run's first epoch is a single point
        style: dict[str, Any] = {"marker": ".", "markersize": 4}
        is_logarithmic = False
        if quantity in _LABELS:
            for number, (name, curves) in enumerate(scores):
                prefix = f"{name}, " if len(scores) > 1 else ""
                for part, dashes in (("train", "--"), ("test", "-")):
                    x, y = curves[part]["epoch"], curves[part][quantity]
                    label = f"{prefix}{part}"
                    axes.plot(x, y, dashes, color=f"C{number}", label=label, **style)
            axes.set_ylabel(_LABELS[quantity])
            shown = [y for _, curves in scores for part in curves.values() for y in part[quantity]]
            is_logarithmic = quantity == "loss" and _has_a_dwarfing(shown)
        elif quantity == "learning-rate":
            rates = [
                (name, read(path / "train.csv", ["lr"]))
                for name, path in names
                if "lr" in read(path / "train.csv")
            ]
            for name, curve in rates:
                axes.plot(curve["epoch"], curve["lr"], label=name, **style)
            axes.set_ylabel("learning rate")
            if not any(curve["epoch"] for _, curve in rates):
                continue
        else:
            column, unit = _SPEED[quantity]
            for name, speed in speeds:
                axes.plot(speed["epoch"], speed[column], label=name, **style)
            axes.set_ylabel(unit)
            if not any(speed["epoch"] for _, speed in speeds):
                continue
        axes.set_xlabel("epoch")
        if is_logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if best is not None:
            axes.axvline(best, color="0.5", linestyle=":", label=f"best epoch, {best}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        found[quantity] = figure
    return found


def _has_a_dwarfing(losses: Sequence[float]) -> bool:
    """Whether the largest of positive losses dwarfs the usual one."""
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    return bool(finite) and finite[0] > 0 and finite[-1] > _DWARFS * finite[len(finite) // 2]


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
