"""The picture of a benchmark's results, drawn again from their rows.

    python benchmarks/draw.py results/throughput-*.csv --output throughput.png

What it shows is the benchmark's own ``draw``; the rows say which benchmark that is.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from harness import results
from harness.pictures import picture
from tyro.conf import Positional, arg

from effdense.commands import front_end
from effdense.errors import UserError

DRAWN = {"memory", "throughput", "scaling", "estimates", "pareto", "timeline", "convergence"}
DRAWN |= {"precision"}


@dataclass(frozen=True)
class Options:
    rows: Annotated[Positional[tuple[Path, ...]], arg(metavar="CSV")]
    """Results of one benchmark."""
    output: Annotated[
        Path | None,
        arg(metavar="FILE", help_behavior_hint="(default: the first CSV's name with .png)"),
    ] = None
    """PNG, SVG or PDF."""


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/draw.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    output = options.output or options.rows[0].with_suffix(".png")
    try:
        names = {row["benchmark"] for path in options.rows for row in results.read(path)}
        if len(names) != 1 or not names <= DRAWN:
            raise UserError(
                f"expected results of one of {', '.join(sorted(DRAWN))}, got "
                f"{', '.join(sorted(names)) or 'no rows'}"
            )
        picture(importlib.import_module(names.pop()).draw, options.rows, output)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    print(output)


if __name__ == "__main__":
    main()
