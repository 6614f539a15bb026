"""``plot``: a run's curves."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from . import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "plot",
        help="redraw the curves from the CSV files of one run, or overlay several",
        description="Draw loss.png and error.png from train.csv and test.csv, and "
        "images-per-second.png and memory.png from speed.csv.",
    )
    parser.add_argument(
        "work_dirs", metavar="WORKDIR", nargs="+", type=Path, help="folder of a run"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: WORKDIR; must be given for several)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    # matplotlib takes a second to import
    from ..engine import plots

    output = options.output
    if output is None:
        if len(options.work_dirs) > 1:
            raise UserError(
                "several runs are drawn into one figure: say where with --output FOLDER"
            )
        output = options.work_dirs[0]
    for path in plots.draw(options.work_dirs, output, plots.ALL):
        print(path)
