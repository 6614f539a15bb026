"""The command line ``effdense COMMAND``, which ``python -m effdense COMMAND`` is too."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from .commands import COMMANDS, front_end
from .errors import UserError, one_line_errors

_PROGRAM = "effdense"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with status 2 and one line for a mistake of the user's."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if name in ("", "-h", "--help"):
        print(_usage())
        sys.exit()
    with one_line_errors():
        if name not in COMMANDS:
            meant = difflib.get_close_matches(name, COMMANDS, n=1)
            raise UserError(
                f"COMMAND must be one of {', '.join(COMMANDS)}, got {name!r}"
                + (f" (did you mean {meant[0]}?)" if meant else "")
                + f"; see {_PROGRAM} --help"
            )
    # each command imports what it needs
    command = importlib.import_module(f".commands.{name.replace('-', '_')}", __package__)
    front_end.main(command.Options, command.run, program=f"{_PROGRAM} {name}", arguments=rest[:-1])


def _usage() -> str:
    lines = [f"usage: {_PROGRAM} COMMAND [OPTIONS]", ""]
    lines += [f"  {name:<16}{what}" for name, what in COMMANDS.items()]
    return "\n".join([*lines, "", f"{_PROGRAM} COMMAND --help lists a command's options"])


if __name__ == "__main__":
    main()
