"""The command line ``python -m effdense COMMAND``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .engine.errors import UserError, one_line_errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with status 2 and one line for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m effdense")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_plot(commands)
    options = parser.parse_args(arguments)
    with one_line_errors():
        options.run(options)


def _add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plot",
        help="redraw loss.png and error.png from the CSV files of one run, or overlay several",
        description="Draw loss.png and error.png from train.csv and test.csv.",
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
    parser.set_defaults(run=_plot)


def _plot(options: argparse.Namespace) -> None:
    # matplotlib takes a second to import
    from .engine import plots

    output = options.output
    if output is None:
        if len(options.work_dirs) > 1:
            raise UserError(
                "several runs are drawn into one figure: say where with --output FOLDER"
            )
        output = options.work_dirs[0]
    for path in plots.draw(options.work_dirs, output):
        print(path)


if __name__ == "__main__":
    main()
