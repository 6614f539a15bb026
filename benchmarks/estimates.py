"""Predicted against measured memory of a training step, over a grid of configurations.

    python benchmarks/estimates.py
    python benchmarks/estimates.py --part 1/5
    python benchmarks/draw.py results/estimates-*.csv --output estimates.png

For each configuration effdense.estimate predicts the peak before anything runs; then a
process of its own takes the step twice: once for its resident size, once for the sum of all
live tensors. Live bytes are to be within 3 % of the prediction, resident size within 5 % and
2 MiB, in 16 bits 20 % and 2 MiB. The exit status is 1 where one is not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from harness import child
from harness.case import Options as CommonOptions
from harness.grid import GRID, Configuration
from harness.pictures import picture, plain_numbers
from harness.results import Recorder, Row, mebibytes
from tyro.conf import arg

from effdense import Estimate
from effdense.commands import front_end
from effdense.errors import UserError
from effdense.machine.environment import headline
from effdense.machine.measurement import in_fresh_process
from effdense.machine.tables import table
from effdense.verification.comparison import near_prediction

# of live bytes
LIVE = 0.03


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    part: Annotated[str, arg(metavar="I/N")] = "1/1"
    """Every N-th configuration, from the I-th on."""

    @property
    def which(self) -> tuple[int, int]:
        first, _, second = self.part.partition("/")
        if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
            raise UserError(f"--part must be I/N with 1 <= I <= N, got {self.part!r}")
        return int(first), int(second)


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/estimates.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> int:
    index, parts = options.which
    path = options.output or Path("results") / f"estimates-{index}-of-{parts}.csv"
    missed, rows = 0, []
    torch.set_num_threads(options.threads)  # those of predictions too
    with Recorder(path, "estimates", "cpu", options.threads) as recorder:
        print(headline(recorder.environment))
        for each in GRID[index - 1 :: parts]:
            cells, good = compare(each, recorder, options.threads)
            rows.append(cells)
            missed += not good
            print(" ".join(cells), file=sys.stderr, flush=True)
    header = ["configuration", "live MiB: predicted", "measured", "error"]
    header += ["resident MiB: predicted", "measured", "error"]
    print(f"\n{table([*header, ''], rows)}")
    picture(draw, [path], path.with_suffix(".png"))
    print(f"\n{missed} of {len(rows)} missed\n{path}")
    return 1 if missed else 0


def compare(each: Configuration, recorder: Recorder, threads: int) -> tuple[list[str], bool]:
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
    good = within(each, predicted, answer["live"], answer["peak"])
    return [*cells, "" if good else "missed"], good


def measured(each: Configuration, threads: int) -> dict[str, Any]:
    """``live`` and ``peak`` bytes from a fresh process, or ``error``."""
    return in_fresh_process(child.configured, threads, configuration=each.request())


def within(each: Configuration, predicted: Estimate, live: int, resident: int) -> bool:
    """Whether a prediction is as near as it is to be."""
    assert predicted.resident is not None
    allowed = near_prediction(resident, getattr(torch, each.amp or each.dtype))
    near = abs(predicted.resident - resident) <= allowed
    return near and abs(predicted.peak - live) <= LIVE * live


def draw(figure: Any, rows: list[Row]) -> None:
    """Errors of predictions against the measured size."""
    axes = figure.subplots()
    sizes: list[float] = []
    furthest = 10.0
    for metric, marker, colour in (("peak", "s", "#E69F00"), ("live", "o", "#0072B2")):
        predicted = {
            r["arch"]: float(r["value"]) for r in rows if r["metric"] == f"predicted {metric}"
        }
        own = {r["arch"]: float(r["value"]) for r in rows if r["metric"] == metric and r["value"]}
        errors = [100 * (predicted[arch] / value - 1) for arch, value in own.items()]
        sizes += [value / 2**20 for value in own.values()]
        furthest = max([furthest, *map(abs, errors)])
        label = {"peak": "peak resident size", "live": "peak live tensor bytes"}[metric]
        places = [value / 2**20 for value in own.values()]
        axes.plot(places, errors, marker, color=colour, label=f"against {label}", markersize=5)
    if not sizes:
        raise ValueError("no measurement to draw")
    low, high = min(sizes) / 1.2, max(sizes) * 1.2
    line = [low * (high / low) ** (i / 200) for i in range(201)]
    for sign in (-1, 1):
        axes.plot([low, high], [100 * LIVE * sign] * 2, "--", color="#0072B2", linewidth=0.8)
        for dtype, style in ((torch.float32, "--"), (torch.bfloat16, ":")):
            most = [near_prediction(int(size * 2**20), dtype) / 2**20 for size in line]
            allowed = [sign * 100 * n / size for n, size in zip(most, line, strict=True)]
            axes.plot(line, allowed, style, color="#E69F00", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    # every point, the misses above all
    axes.set_ylim(-1.1 * furthest, 1.1 * furthest)
    plain_numbers(axes.xaxis)
    axes.set_xlabel("measured peak of a training step, MiB")
    axes.set_ylabel("prediction's error, %")
    axes.set_title(f"effdense.estimate over {len(predicted)} configurations")
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
