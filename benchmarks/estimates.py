"""Predicted against measured memory of a training step, over a grid of configurations.

    python benchmarks/estimates.py
    python benchmarks/estimates.py --part 1/5
    python benchmarks/draw.py results/estimates-*.csv --output estimates.png

For each configuration effdense.estimate predicts the peak before anything runs; then a
process of its own takes the step twice: once for its resident size, once for the sum of all
live tensors. Live bytes are to be within 3 % of the prediction, resident size within 5 % or
30 MiB. The exit status is 1 where one is not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import draw
from harness import child
from harness.case import Parser, positive_int
from harness.grid import GRID, Configuration
from harness.report import Recorder, mebibytes, table

from effdense import Estimate
from effdense.machine.environment import headline, usable_cores
from effdense.machine.measurement import in_fresh_process

# Of live bytes; of resident size, or that many bytes where they are more.
LIVE, RESIDENT, RESIDENT_BYTES = 0.03, 0.05, 30 << 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="every N-th")
    parser.add_argument("--threads", type=positive_int, default=usable_cores(), help="CPU threads")
    parser.add_argument(
        "--output", type=Path, metavar="CSV", help="default: results/estimates-I-of-N.csv"
    )
    args = parser.parse_args(argv)
    index, parts = args.part
    path = args.output or Path("results") / f"estimates-{index}-of-{parts}.csv"
    missed, rows = 0, []
    with Recorder(path, "estimates", "cpu", args.threads) as recorder:
        print(headline(recorder.environment))
        for each in GRID[index - 1 :: parts]:
            cells, good = run(each, recorder, args.threads)
            rows.append(cells)
            missed += not good
            print(" ".join(cells), file=sys.stderr, flush=True)
    header = ["configuration", "live MiB: predicted", "measured", "error"]
    header += ["resident MiB: predicted", "measured", "error"]
    print(f"\n{table([*header, ''], rows)}")
    draw.draw([path], path.with_suffix(".png"))
    print(f"\n{missed} of {len(rows)} missed\n{path}")
    return 1 if missed else 0


def part(text: str) -> tuple[int, int]:
    """An argparse type: "2/5"."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text!r}")
    return int(first), int(second)


def run(each: Configuration, recorder: Recorder, threads: int) -> tuple[list[str], bool]:
    """A row of the table, and whether the prediction holds."""
    start = time.perf_counter()
    predicted = each.predicted()
    seconds = time.perf_counter() - start
    assert predicted.resident is not None
    by_prediction = {"live": predicted.peak, "peak": predicted.resident}
    for metric, nbytes in by_prediction.items():
        recorder.add(each.save, each, f"predicted {metric}", nbytes, "B", kind="formula")
    recorder.add(each.save, each, "prediction time", seconds, "s")
    answer = measured(each, threads)
    if "error" in answer:
        recorder.add(each.save, each, "live", None, "B", status="failed", detail=answer["error"])
        return [each.label(), answer["error"], *[""] * 5, "failed"], False
    cells = [each.label()]
    for metric, nbytes in by_prediction.items():
        recorder.add(each.save, each, metric, answer[metric], "B")
        error = 100 * (nbytes / answer[metric] - 1)
        cells += [mebibytes(nbytes), mebibytes(answer[metric]), f"{error:+.2f} %"]
    good = within(predicted, answer["live"], answer["peak"])
    return [*cells, "" if good else "missed"], good


def measured(each: Configuration, threads: int) -> dict[str, Any]:
    """``live`` and ``peak`` bytes from a fresh process, or ``error``."""
    return in_fresh_process(child.configured, threads, configuration=each.request())


def within(predicted: Estimate, live: int, resident: int) -> bool:
    """Whether a prediction is as near as it is to be."""
    assert predicted.resident is not None
    allowed = max(RESIDENT * resident, RESIDENT_BYTES)
    near = abs(predicted.resident - resident) <= allowed
    return near and abs(predicted.peak - live) <= LIVE * live


if __name__ == "__main__":
    sys.exit(main())
