"""Memory against time of every plan: predicted for all, measured for the best.

    python benchmarks/pareto.py
    python benchmarks/pareto.py --depth 100 --growth-rate 12 --batch-size 64

Predicted: the peak of each choice of save modes, and its time over the fastest one's by
arithmetic. Measured, each in a process of its own: peak resident size, and the time of a
step, for the choices that no other beats in both, for each single mode, and for the naive
network if it fits. In the picture predicted times are scaled by the fastest plan's measured
time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import child
from harness.case import Options as CommonOptions
from harness.grid import Configuration
from harness.pictures import picture, plain_numbers
from harness.results import Recorder, Row, mebibytes

import effdense
from effdense import models
from effdense.commands import front_end
from effdense.errors import UserError
from effdense.machine.environment import headline
from effdense.machine.measurement import in_fresh_process
from effdense.machine.memory import available_bytes
from effdense.machine.tables import table
from effdense.memory.planning import CANDIDATES, Choice, choices


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    depth: int = 250
    """Layers of a DenseNet-BC, 6 n + 4."""
    growth_rate: int = 24
    """Channels per layer, the paper's k."""
    batch_size: int = 16
    """Images."""
    image_size: int = 32
    """Pixels along each dimension."""
    steps: int = 2
    """Timed, of each plan."""


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/pareto.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    torch.set_num_threads(options.threads)  # those of predictions too
    try:
        network = models.configuration("densenet_bc", options.depth, options.growth_rate)
        with torch.device("meta"):
            model = effdense.DenseNet(**network)
        shape = (options.batch_size, 3, options.image_size, options.image_size)
        found = choices(model, shape)
    except ValueError as error:
        raise UserError(str(error)) from None
    family = f"DenseNet-BC ({options.depth}, k {options.growth_rate})"
    name = f"pareto-bc{options.depth}-k{options.growth_rate}-b{options.batch_size}"
    path = options.output or Path("results") / f"{name}.csv"

    def configuration(save: str) -> Configuration:
        return Configuration(family, network, save, shape)

    predicted = {"+".join(each.save): each for each in found}
    rows = []
    with Recorder(path, "pareto", "cpu", options.threads) as recorder:
        print(headline(recorder.environment))
        for save, each in predicted.items():
            case = configuration(save)
            recorder.add(save, case, "predicted peak", each.peak, "B", kind="formula")
            recorder.add(save, case, "predicted slowdown", each.slowdown, "1", kind="formula")
        naive = configuration("naive").predicted().peak
        recorder.add("naive", configuration("naive"), "predicted peak", naive, "B", kind="formula")
        for save in [*chosen(found), "naive"]:
            peak = predicted[save].peak if save in predicted else naive
            cells = [save, mebibytes(peak)]
            if peak > 0.9 * available_bytes():
                rows.append([*cells, "does not fit", "", ""])
                continue
            answer = in_fresh_process(
                child.configured,
                options.threads,
                configuration=configuration(save).request(),
                samples=options.steps,
            )
            if "error" in answer:
                rows.append([*cells, answer["error"], "", ""])
                continue
            recorder.add(save, configuration(save), "peak", answer["peak"], "B")
            for sample, seconds in enumerate(answer["seconds"]):
                recorder.add(save, configuration(save), "step time", seconds, "s", sample=sample)
            slowdown = f"{predicted[save].slowdown:.2f}" if save in predicted else ""
            seconds = f"{median(answer['seconds']):.2f}"
            rows.append([*cells, mebibytes(answer["peak"]), slowdown, seconds])
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    header = ["save", "predicted MiB", "measured MiB", "predicted slowdown", "s per step"]
    print(f"\n{table(header, rows)}")
    picture(draw, [path], path.with_suffix(".png"))
    print(f"\n{path}")


def chosen(found: Sequence[Choice]) -> list[str]:
    """What is measured: the single modes, and what no other choice beats in memory and time."""
    best, least = [], None
    for each in found:  # fastest first
        if least is None or each.peak < least:
            best.append(each.save)
            least = each.peak
    single = [each.save for each in found if len(set(each.save)) == 1]
    assert len(single) == len(CANDIDATES)
    return ["+".join(save) for save in dict.fromkeys([*best, *single])]


def draw(figure: Any, rows: list[Row]) -> None:
    """Seconds against memory of every plan."""
    axes = figure.subplots()
    times: dict[str, list[float]] = {}
    for row in rows:
        if row["metric"] == "step time" and row["value"]:
            times.setdefault(row["provider"], []).append(float(row["value"]))
    if not times:
        raise ValueError("no measured step time to draw")

    def values(metric: str) -> dict[str, float]:
        return {r["provider"]: float(r["value"]) for r in rows if r["metric"] == metric}

    sizes, slowdowns, peaks = values("predicted peak"), values("predicted slowdown"), values("peak")
    # the arithmetic knows ratios; the scale is the fastest plan's, measured
    fastest = next(save for save, slowdown in slowdowns.items() if slowdown == 1)
    second = median(times[fastest])
    axes.plot(
        [sizes[save] / 2**20 for save in slowdowns],
        [second * slowdown for slowdown in slowdowns.values()],
        "o",
        color="#56B4E9",
        markersize=4,
        label="every plan, predicted",
    )
    measured = {save: (peaks[save] / 2**20, median(samples)) for save, samples in times.items()}
    # far away, where it would press the plans together
    outside = measured.pop("naive", None)
    for i, (save, place) in enumerate(sorted(measured.items(), key=lambda each: each[1])):
        axes.plot(*place, "s", color="#D55E00", markersize=6)
        predicted = sizes[save] / 2**20, second * slowdowns[save]
        axes.plot(*zip(predicted, place, strict=True), "-", color="#999999", linewidth=0.8)
        modes = save.split("+")
        # a mixture by its initials, block after block; neighbours on different sides
        name = modes[0] if len(set(modes)) == 1 else " ".join(mode[0] for mode in modes)
        right, up = i % 2 == 1, i % 4 >= 2
        axes.annotate(
            name,
            place,
            xytext=(8 if right else -8, 4 if up else -10),
            textcoords="offset points",
            ha="left" if right else "right",
            fontsize=8,
            color="#D55E00",
        )
    if outside is not None:
        said = f"naive, not shown: {outside[0]:,.0f} MiB, {outside[1]:.1f} s per step"
        axes.annotate(said, (0.98, 0.04), xycoords="axes fraction", ha="right", fontsize=8)
    axes.plot([], [], "s", color="#D55E00", label="measured: resident size, median step")
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.margins(x=0.16, y=0.15)
    axes.set_xlabel("peak memory of a training step, MiB")
    axes.set_ylabel("seconds per step")
    axes.set_title(rows[0]["arch"].replace(f", {rows[0]['provider']}", ""))
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
