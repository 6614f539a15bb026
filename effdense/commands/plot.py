"""``plot``: a run's curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..errors import UserError


@dataclass(frozen=True)
class Options:
    """Draw a run's curves from its CSV files, or several runs' in the same pictures."""

    work_dirs: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="WORKDIR [WORKDIR ...]", help_behavior_hint="(required)"),
    ]
    """Folders of runs."""
    output: Annotated[
        Path | None, arg(aliases=["-o"], metavar="FOLDER", help_behavior_hint="(default: WORKDIR)")
    ] = None
    """Where to write; must be given for several runs."""

    def __post_init__(self) -> None:
        if not self.work_dirs:
            raise UserError("WORKDIR must be the folder of a run")
        if self.output is None and len(self.work_dirs) > 1:
            raise UserError(
                "several runs are drawn into one figure: say where with --output FOLDER"
            )


def run(options: Options) -> None:
    # matplotlib takes a second to import
    from ..engine import plots

    output = options.output or options.work_dirs[0]
    for path in plots.draw(options.work_dirs, output, plots.ALL):
        print(path)
