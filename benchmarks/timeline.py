"""Live memory through one training step, by what it is for: naive and effdense.

    python benchmarks/timeline.py --depth 100 --growth-rate 12 --batch-size 16
    python benchmarks/draw.py results/timeline-*.csv --output timeline.png

Every tensor's storage of one step is recorded, when it was made and when it died, in this
process, with optimizer state in place. Recording slows a step down, so times are shares of
the step. Rows are ``--points`` moments of each step, the highest of each stretch of time.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import draw
import torch
from harness import providers
from harness.case import Parser, add_case_arguments, case_of, positive_int
from harness.report import Recorder, mebibytes, table

from effdense.machine.environment import headline
from effdense.memory.timeline import ROLES, Moment, live_memory

DEFAULT = ("naive", "effdense-features")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_case_arguments(parser, depth=100, growth_rate=12, batch_size=16)
    parser.add_argument(
        "--providers",
        nargs="+",
        type=providers.provider_name,
        metavar="NAME",
        help=f"default: {' '.join(DEFAULT)}",
    )
    parser.add_argument("--points", type=positive_int, default=400, help="moments (default 400)")
    parser.add_argument(
        "--output", type=Path, metavar="CSV", help="default: results/timeline-*.csv"
    )
    args = parser.parse_args(argv)
    case = case_of(parser, args)
    names = providers.selected(parser, args.providers, DEFAULT, case)
    for name in names:
        if providers.find(name)[0].compiled:
            parser.error(f"a compiled network can't be recorded, got {name}")
    torch.set_num_threads(args.threads)
    path = args.output or Path("results") / f"timeline-{case.label()}.csv"
    rows = []
    with Recorder(path, "timeline", case.device, args.threads) as recorder:
        print(headline(recorder.environment))
        for name in names:
            small = dataclasses.replace(case, batch_size=2)
            providers.setup(name, small).step()
            moments = live_memory(lambda name=name: providers.setup(name, case))  # type: ignore[misc]
            end = moments[-1].seconds
            for sample, moment in enumerate(thinned(moments, args.points)):
                share = 100 * moment.seconds / end
                common = {"sample": sample, "detail": moment.phase}
                recorder.add(name, case, "moment", share, "%", **common)
                for role, nbytes in moment.parts.items():
                    recorder.add(name, case, f"live {role}", nbytes, "B", **common)
            highest = max(moments, key=lambda moment: moment.total)
            rows.append(
                [name, mebibytes(highest.total), *(mebibytes(highest.parts[r]) for r in ROLES)]
            )
    print(f"\n{case.describe()}: live MiB at the step's highest moment\n")
    print(table(["provider", "total", *ROLES], rows))
    draw.draw([path], path.with_suffix(".png"))
    print(f"\n{path}\n{path.with_suffix('.png')}")
    return 0


def thinned(moments: Sequence[Moment], points: int) -> list[Moment]:
    """The highest moment of each of so many equal stretches of time that has any."""
    end = moments[-1].seconds
    highest: dict[int, Moment] = {}
    for moment in moments:
        stretch = min(points - 1, int(points * moment.seconds / end)) if end > 0 else 0
        if stretch not in highest or moment.total > highest[stretch].total:
            highest[stretch] = moment
    return [highest[stretch] for stretch in sorted(highest)]


if __name__ == "__main__":
    sys.exit(main())
