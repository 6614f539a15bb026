"""The command line ``python -m effdense COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands import convert_report, env, evaluate, graph, plan, plot, predict, verify
from .errors import one_line_errors

_COMMANDS = (verify, graph, env, plan, convert_report, plot, evaluate, predict)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with status 2 and one line for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m effdense")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    with one_line_errors():
        status = options.run(options)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
