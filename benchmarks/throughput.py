"""Training speed: effdense against the naive net and every alternative.

    python benchmarks/throughput.py --depth 100 --growth-rate 12 --batch-size 64
    python benchmarks/throughput.py --arch densenet121 --batch-size 8
    python benchmarks/throughput.py --depth 40 --spatial-dims 3 --batch-size 2
    python benchmarks/throughput.py --depth 250 --growth-rate 24 --project h100

Before anything is timed, loss and gradients of every provider are compared with the naive
net's; one that disagrees gets no figure of speed. Then each provider takes one sample per
round, in a process of its own; an untimed step goes before each sample, since the first
one after the other processes' turns finds none of its data in the caches. A ratio is formed
within each round, so that a slow moment of the machine touches both sides.

--project prints what published peak rates would allow on a device that isn't here. Its
figures are no measurements and are kept in a file of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import counts, providers, roofline
from harness.case import Case, Parser, add_case_arguments, case_of, positive_int
from harness.devices import DEVICES, Device
from harness.measure import predicted_peak
from harness.report import Recorder, quantiles, table
from harness.speed import Race, WorkerError, machine_peaks
from tqdm import tqdm

from effdense.machine.environment import headline
from effdense.machine.memory import available_bytes

DEFAULT = (
    "naive",
    "naive-channels-last",
    "torchvision-memory-efficient",
    "checkpoint",
    "effdense-bottlenecks",
    "effdense-features",
)
PROJECTED = ("naive", "checkpoint", "effdense-bottlenecks", "effdense-features", "effdense-input")
BASELINES = ("naive", "naive-channels-last", "compile", "compile-channels-last")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    case = case_of(parser, args)
    default = PROJECTED if args.project else DEFAULT
    names = list(dict.fromkeys(providers.selected(parser, args.providers, default, case)))
    if "naive" not in names:
        # the gate's yardstick
        names.insert(0, "naive")
    if args.project:
        device = DEVICES[args.project]
        if case.dtype not in device.flops:
            parser.error(f"no published {case.dtype} rate of {device.name}")
        case = dataclasses.replace(case, device=args.project)
    path = args.output or Path("results") / (
        f"throughput{'-projection' if args.project else ''}-{case.label()}.csv"
    )
    with Recorder(path, "throughput", args.device, args.threads) as recorder:
        try:
            if args.project:
                project(device, case, names, recorder)
                red = False
            else:
                print(headline(recorder.environment))
                red = race(args, case, names, recorder)
        except KeyboardInterrupt:
            print(f"\ninterrupted; the rows so far are in {path}", file=sys.stderr)
            return 130
        except WorkerError as error:
            print(f"the naive net failed, so nothing can be compared: {error}", file=sys.stderr)
            return 1
    print(f"\n{path}")
    return 1 if red else 0


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_case_arguments(parser, depth=100, growth_rate=12, batch_size=64)
    parser.add_argument(
        "--providers",
        nargs="+",
        type=providers.provider_name,
        metavar="NAME",
        help=f"default: {' '.join(DEFAULT)}; also: "
        + " ".join(name for name in providers.PROVIDERS if name not in DEFAULT),
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        type=providers.provider_name,
        metavar="NAME",
        help=f"what ratios are formed to (default: those of {', '.join(BASELINES)} that run)",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=7, help="samples per provider (default 7)"
    )
    parser.add_argument(
        "--steps", type=positive_int, help="per sample (default: enough for --seconds)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.5,
        help="shortest sample; clocks of virtual machines tick in 20 ms (default 0.5)",
    )
    parser.add_argument(
        "--strict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also compare gradients in float64, <= 4 images (default: yes)",
    )
    parser.add_argument("--force", action="store_true", help="attempt what should not fit")
    parser.add_argument(
        "--project", choices=sorted(DEVICES), help="a roofline projection; nothing is run"
    )
    parser.add_argument("--output", type=Path, metavar="CSV", help="default: results/throughput-*")
    return parser


def race(args: argparse.Namespace, case: Case, names: Sequence[str], recorder: Recorder) -> bool:
    """Compare, then time, then print; whether the gate was red for anyone."""
    out: dict[str, str] = {}
    if not args.force:
        free = available_bytes(case.device)
        for name in names:
            needed = predicted_peak(name, case)
            if needed > free:
                out[name] = (
                    f"needs {needed / 2**30:.1f} GiB by prediction, machine has "
                    f"{free / 2**30:.1f} GiB free; not run"
                )
    red = False
    times: dict[str, list[float]] = {}
    with Race([name for name in names if name not in out], case, args.threads) as racers:
        gates = [("same dtype", racers.disagreements())]
        if args.strict:
            gates.append(("float64", racers.disagreements(strict=True)))
        for gate, found in gates:
            for name, each in found.items():
                recorder.add(
                    name,
                    case,
                    f"gradient error, {gate}",
                    each.gradient,
                    "1",
                    status="red" if each.red else "agrees",
                    detail=each.describe(),
                )
                if each.red:
                    red = True
                    racers.failures[name] = f"DISAGREES with the naive net: {each.describe()}"
        verdict = "RED" if red else "green"
        print(f"correctness gate: {verdict} ({', '.join(gate for gate, _ in gates)})")
        minutes = racers.warm_up(args.seconds, args.steps) * args.rounds / 60
        print(f"about {minutes:.1f} minutes for {args.rounds} rounds")
        rounds = racers.rounds(args.rounds)
        for i, found in enumerate(
            tqdm(rounds, total=args.rounds, desc="rounds", file=sys.stderr, disable=None)
        ):
            for name, seconds in found.items():
                times.setdefault(name, []).append(seconds)
                recorder.add(
                    name, case, "step time", seconds, "s", sample=i, steps=racers.steps[name]
                )
        out |= racers.failures
    peaks = machine_peaks(case, args.threads, args.seconds)
    recorder.add("machine", case, "matrix product", peaks["flops"], "FLOP/s")
    recorder.add("machine", case, "copy", peaks["bytes"], "B/s")
    for name, why in out.items():
        recorder.add(name, case, "step time", None, "s", status="failed", detail=why)
    times = {name: found for name, found in times.items() if name not in out}
    print_race(case, times, args.baselines, red, peaks)
    for name, why in out.items():
        print(f"{name}: {why}")
    return red


def print_race(
    case: Case,
    times: dict[str, list[float]],
    baselines: Sequence[str] | None,
    red: bool,
    peaks: dict[str, float],
) -> None:
    print(f"\n{case.describe()}: training steps, median [20 %, 80 %]")
    print(
        f"a {case.dtype} matrix product reaches {peaks['flops'] / 1e9:,.0f} GFLOP/s here, "
        f"a copy {peaks['bytes'] / 1e9:,.1f} GB/s"
    )
    print(
        "GFLOP/s: the naive net's arithmetic per time, recomputation not counted; GB/s: bytes "
        "of each operation, counted\n"
    )
    against = [name for name in baselines or BASELINES if name in times]
    # A wrong provider's rivals are not compared with it, nor anybody before it is mended.
    against = [] if red else against
    header = ["provider", "s/step", "images/s", "GFLOP/s", "% product", "GB/s", "% copy"]
    rows = []
    for name, found in times.items():
        low, middle, high = quantiles(found)
        flops = counts.training_flops(case) / middle
        cells = [
            name,
            f"{middle:.3f} [{low:.3f}, {high:.3f}]",
            f"{case.batch_size / middle:.1f}",
            f"{flops / 1e9:,.0f}",
            f"{100 * flops / peaks['flops']:.0f}",
        ]
        try:
            moved = sum(op.nbytes for op in roofline.operations(name, case)) / middle
            cells += [f"{moved / 1e9:.1f}", f"{100 * moved / peaks['bytes']:.0f}"]
        except ValueError:
            cells += ["", ""]
        for baseline in against:
            pairs = zip(times[baseline], found, strict=False)
            low, middle, high = quantiles([theirs / ours for theirs, ours in pairs])
            cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
        rows.append(cells)
    print(table([*header, *(f"x {name}" for name in against)], rows))
    if red:
        print("\nNo speed-up is stated while the correctness gate is red.")


def project(device: Device, case: Case, names: Sequence[str], recorder: Recorder) -> None:
    """Roofline times on a device that isn't here."""
    rate = device.flops[case.dtype]
    print(f"PROJECTION, not a measurement: {case.describe()} on {device.name}")
    print(
        f"{rate / 1e12:g} TFLOP/s {case.dtype}, {device.memory / 1e12:g} TB/s ({device.source}); "
        "every operation at the\nfull published rate, no launch overheads: lower bounds of time\n"
    )
    times, rows = {}, []
    for name in names:
        try:
            operations = roofline.operations(name, case)
        except ValueError as error:
            print(error)
            continue
        flops = sum(op.flops for op in operations)
        moved = sum(op.nbytes for op in operations)
        times[name] = roofline.seconds(operations, rate, device.memory)
        values = {"step time": (times[name], "s"), "arithmetic": (flops, "FLOP")}
        values["memory traffic"] = (moved, "B")
        for metric, (value, unit) in values.items():
            recorder.add(name, case, metric, value, unit, kind="projection", detail=device.name)
        rows.append(
            [
                name,
                f"{flops / 1e9:,.0f}",
                f"{moved / 1e9:.1f}",
                f"{1e3 * times[name]:.2f}",
                f"{case.batch_size / times[name]:,.0f}",
                f"{times['naive'] / times[name]:.2f}",
            ]
        )
    print(table(["provider", "GFLOP", "GB", "ms/step >=", "images/s <=", "x naive"], rows))


if __name__ == "__main__":
    sys.exit(main())
