"""loss.png and error.png, drawn from the CSV files of one run or of several."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .errors import UserError
from .records import write_atomically

_LABELS = {"loss": "loss", "error": "error (%)"}


def draw(work_dirs: Sequence[Path], output: Path) -> list[Path]:
    """Draw loss and error over the epochs: training dashed, test solid, one colour per run.

    Args:
        work_dirs: folders that hold a train.csv and a test.csv.
        output: folder for loss.png and error.png; made if it is not there.

    Returns:
        The two files.

    Raises:
        UserError: where there is no run, or the output folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {output}: {error.strerror}") from None
    names = _distinct_names(work_dirs)
    curves = [(name, read(path / "train.csv"), read(path / "test.csv")) for name, path in names]
    paths = []
    for quantity, label in _LABELS.items():
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for number, (name, train, test) in enumerate(curves):
            prefix = f"{name}, " if len(curves) > 1 else ""
            # markers: a run's first epoch is a single point
            style: dict[str, Any] = {"color": f"C{number}", "marker": ".", "markersize": 4}
            axes.plot(
                train["epoch"], train[quantity], linestyle="--", label=f"{prefix}train", **style
            )
            axes.plot(test["epoch"], test[quantity], label=f"{prefix}test", **style)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        path = output / f"{quantity}.png"
        write_atomically(path, partial(figure.savefig, dpi=120))
        paths.append(path)
    return paths


def read(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV file; a last row that was cut short is left out.

    Raises:
        UserError: if it is missing or is not what a run writes.
    """
    try:
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
            values = [[float(cell) for cell in row] for row in rows if len(row) == len(header)]
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no run: there is no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not {"epoch", *_LABELS} <= set(header):
        raise UserError(f"cannot read {path}: it has no columns epoch, loss and error")
    columns = zip(*values, strict=True) if values else [()] * len(header)
    return {name: list(column) for name, column in zip(header, columns, strict=True)}


def _distinct_names(work_dirs: Sequence[Path]) -> list[tuple[str, Path]]:
    """Each folder's name, or its whole path where two names are the same."""
    names = [path.resolve().name for path in work_dirs]
    if len(set(names)) < len(names):
        names = [str(path) for path in work_dirs]
    return list(zip(names, work_dirs, strict=True))
