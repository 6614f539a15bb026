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
from pathlib import Path
from statistics import median

import draw
import torch
from harness import child
from harness.case import Parser, positive_int
from harness.grid import Configuration
from harness.report import Recorder, mebibytes, table

import effdense
from effdense.machine.environment import headline, usable_cores
from effdense.machine.measurement import in_fresh_process
from effdense.machine.memory import available_bytes
from effdense.memory.planning import CANDIDATES, Choice, choices
from effdense.reference import densenet_bc_config


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--depth", type=int, default=250, help="6 n + 4 (default 250)")
    parser.add_argument("--growth-rate", type=positive_int, default=24, help="default 24")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="default 16")
    parser.add_argument("--image-size", type=positive_int, default=32, help="default 32")
    parser.add_argument("--steps", type=positive_int, default=2, help="timed (default 2)")
    parser.add_argument("--threads", type=positive_int, default=usable_cores(), help="CPU threads")
    parser.add_argument("--output", type=Path, metavar="CSV", help="default: results/pareto-*.csv")
    args = parser.parse_args(argv)
    try:
        network = densenet_bc_config(args.depth, args.growth_rate)
        with torch.device("meta"):
            model = effdense.DenseNet(**network)
        shape = (args.batch_size, 3, args.image_size, args.image_size)
        found = choices(model, shape)
    except ValueError as error:
        parser.error(str(error))
    family = f"DenseNet-BC ({args.depth}, k {args.growth_rate})"
    name = f"pareto-bc{args.depth}-k{args.growth_rate}-b{args.batch_size}"
    path = args.output or Path("results") / f"{name}.csv"

    def configuration(save: str) -> Configuration:
        return Configuration(family, network, save, shape)

    predicted = {"+".join(each.save): each for each in found}
    rows = []
    with Recorder(path, "pareto", "cpu", args.threads) as recorder:
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
                args.threads,
                configuration=configuration(save).request(),
                samples=args.steps,
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
    draw.draw([path], path.with_suffix(".png"))
    print(f"\n{path}")
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
