"""Peak memory of one training step: effdense, the naive net and every alternative.

    python benchmarks/memory.py --depth 250
    python benchmarks/memory.py --sweep depth --growth-rate 12 --batch-size 8
    python benchmarks/memory.py --max-depth-for 12GiB --growth-rate 12 --batch-size 64
    python benchmarks/memory.py --depth 40 --spatial-dims 3 --batch-size 2

Each figure comes from a process of its own. On a CPU "peak" is the largest resident size
over the process's size before the model was built, on a GPU what torch's allocator gave
out at most; "live" is the sum of all tensors at its largest, split by role. The floor is
parameters, gradients, momentum, all features and one gradient buffer: see
harness/counts.py. What would not fit is not run; its prediction is shown, labelled.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import draw
from harness import counts, providers
from harness.case import (
    Case,
    Parser,
    add_case_arguments,
    byte_size,
    case_of,
    positive_int,
)
from harness.measure import Memory, memory, predicted_peak
from harness.report import Recorder, mebibytes, table
from tqdm import tqdm

from effdense.machine.environment import headline
from effdense.machine.memory import available_bytes
from effdense.memory.planning import largest
from effdense.memory.timeline import ROLES

SWEEPS = {
    "depth": (40, 64, 100, 160, 250),
    "batch": (4, 8, 16, 32, 64),
    "growth-rate": (8, 12, 16, 24, 32, 48),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    case = case_of(parser, args)
    if (args.sweep in ("depth", "growth-rate") or args.max_depth_for) and not case.is_cifar:
        parser.error("--sweep depth, --sweep growth-rate and --max-depth-for need a DenseNet-BC")
    if args.points and not args.sweep:
        parser.error("--points belongs to --sweep")
    try:
        cases = [case] if not args.sweep else sweep(case, args.sweep, args.points)
    except ValueError as error:
        parser.error(str(error))
    names = providers.selected(parser, args.providers, providers.DEFAULT, case)

    path = args.output or Path("results") / f"{result_name(args, case)}.csv"
    with Recorder(path, "memory", case.device, args.threads) as recorder:
        print(headline(recorder.environment))
        try:
            if args.max_depth_for:
                deepest(args, case, names, recorder)
            elif args.sweep:
                run_sweep(args, cases, names, recorder)
            else:
                run_case(args, case, names, recorder)
        except KeyboardInterrupt:
            print(f"\ninterrupted; the rows so far are in {path}", file=sys.stderr)
            return 130
    print(f"\n{path}")
    return 0


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_case_arguments(parser, depth=250, growth_rate=24, batch_size=32)
    parser.add_argument("--steps", type=positive_int, default=1, help="per measurement (default 1)")
    parser.add_argument(
        "--providers",
        nargs="+",
        type=providers.provider_name,
        metavar="NAME",
        help="default: "
        + " ".join(providers.DEFAULT)
        + "; also: "
        # opt-in: they compile for minutes, or are the naive net once more
        + " ".join(name for name in providers.PROVIDERS if name not in providers.DEFAULT),
    )
    parser.add_argument(
        "--live",
        action=argparse.BooleanOptionalAction,
        help="also split live tensor bytes by role (default: yes; in sweeps no)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--sweep", choices=sorted(SWEEPS), help="measure along one dimension")
    what.add_argument(
        "--max-depth-for",
        type=byte_size,
        metavar="SIZE",
        help='deepest DenseNet-BC that trains in so much memory, such as "12GiB"',
    )
    parser.add_argument(
        "--points", nargs="+", type=positive_int, metavar="N", help="the sweep's values"
    )
    parser.add_argument("--force", action="store_true", help="attempt what is predicted not to fit")
    parser.add_argument(
        "--memory-limit",
        type=byte_size,
        metavar="SIZE",
        help="let a measurement take no more than this, as on a smaller machine (Linux, CPU)",
    )
    parser.add_argument("--output", type=Path, metavar="CSV", help="default: results/memory-*.csv")
    return parser


def result_name(args: argparse.Namespace, case: Case) -> str:
    name = f"memory-{case.label()}"
    if args.sweep:
        name += f"-sweep-{args.sweep}"
    if args.max_depth_for:
        name += f"-max-depth-{args.max_depth_for / 2**30:g}GiB"
    return name


def sweep(case: Case, along: str, points: Sequence[int] | None) -> list[Case]:
    """The case at each value of one dimension.

    Raises:
        ValueError: for a depth that no DenseNet-BC has.
    """
    field = {"depth": "depth", "batch": "batch_size", "growth-rate": "growth_rate"}[along]
    cases = [dataclasses.replace(case, **{field: n}) for n in points or SWEEPS[along]]
    for each in cases:
        each.network()
    return cases


def run_case(
    args: argparse.Namespace, case: Case, names: Sequence[str], recorder: Recorder
) -> None:
    live = True if args.live is None else args.live
    floor = record_floor(recorder, case)
    results: dict[str, Memory] = {}
    for each, name in progress([(case, name) for name in names]):
        results[name] = measured(args, each, name, live, recorder)

    print(f"\n{case.describe()}: peak memory of a training step, MiB\n")
    header = ["provider", "peak", "x floor", "live", *ROLES]
    header += ["reserved", "process"] if case.device != "cpu" else []
    rows = [floor_row(floor)]
    rows += [row(name, result, floor, case) for name, result in results.items()]
    print(table(header, rows))
    for name, result in results.items():
        if result.status != "measured" or result.detail:
            print(f"{name}: {result.status}: {result.detail}")


def floor_row(floor: counts.Floor) -> list[str]:
    parts = {name.replace("_", " "): mebibytes(part) for name, part in floor._asdict().items()}
    total = mebibytes(floor.total)
    return ["floor (formula)", total, "1.00", total, *(parts.get(role, "") for role in ROLES)]


def row(name: str, result: Memory, floor: counts.Floor, case: Case) -> list[str]:
    peak, ratio = result.status, ""
    found = result.peak if result.peak is not None else result.predicted
    if found is not None:
        label = "" if result.peak is not None else " (predicted)"
        peak, ratio = mebibytes(found) + label, f"{found / floor.total:.2f}{label}"
    cells = [name, peak, ratio, mebibytes(result.live.get("total"))]
    cells += [mebibytes(result.live.get(role)) for role in ROLES]
    if case.device != "cpu":
        cells += [mebibytes(result.reserved), mebibytes(result.process)]
    return cells


def run_sweep(
    args: argparse.Namespace, cases: Sequence[Case], names: Sequence[str], recorder: Recorder
) -> None:
    field = {"depth": "depth", "batch": "batch_size", "growth-rate": "growth_rate"}[args.sweep]
    floors = {case: record_floor(recorder, case) for case in cases}
    peaks: dict[str, dict[Case, Memory]] = {name: {} for name in names}
    # Smallest first: an interrupted sweep has whole points.
    for case, name in progress([(case, name) for case in cases for name in names]):
        peaks[name][case] = measured(args, case, name, bool(args.live), recorder)

    print(f"\n{cases[0].describe()}, along {args.sweep}: peak MiB")
    print("growth: exponent of the peak, parameters, gradients and momentum taken off\n")
    rows = [
        [
            "floor (formula)",
            *(mebibytes(floors[case].total) for case in cases),
            growth(
                [getattr(c, field) for c in cases], [f.total - f.state for f in floors.values()]
            ),
        ]
    ]
    notes = []
    for name, found in peaks.items():
        known = [(case, m.peak) for case, m in found.items() if m.peak is not None]
        cells = [mebibytes(m.peak) if m.peak is not None else "-" for m in found.values()]
        notes += [
            f"{name} at {args.sweep} {getattr(case, field)}: {m.status}: {m.detail}"
            for case, m in found.items()
            if m.status != "measured"
        ]
        exponent = growth(
            [getattr(case, field) for case, _ in known],
            [peak - floors[case].state for case, peak in known],
        )
        rows.append([name, *cells, exponent])
        if exponent:
            recorder.add(
                name, cases[0], f"growth exponent along {args.sweep}", float(exponent), "1"
            )
    print(table(["provider", *(str(getattr(c, field)) for c in cases), "growth"], rows))
    print("\n".join(notes))
    picture = recorder.path.with_suffix(".png")
    draw.draw([recorder.path], picture)
    print(f"\n{picture}")


def growth(sizes: Sequence[float], values: Sequence[float]) -> str:
    try:
        return f"{counts.growth_exponent(list(sizes), list(values)):.2f}"
    except ValueError:
        return ""


def deepest(args: argparse.Namespace, case: Case, names: Sequence[str], recorder: Recorder) -> None:
    """The deepest net of each provider within a budget, by prediction; then the proof here.

    Where the budget is larger than what this machine can give, the proof is the deepest net
    that fits here, whose measured peak is to agree with its prediction.
    """
    budget = args.max_depth_for
    here = min(budget, int(available_bytes(case.device) * 0.9))
    rows, notes = [], []
    for name in tqdm(names, desc="providers", file=sys.stderr, disable=None):
        depth = max_depth(name, case, budget)
        if depth is None:
            rows.append([name, "none", "", "", ""])
            continue
        fitting = dataclasses.replace(case, depth=depth)
        recorder.add(
            name, fitting, "predicted peak", predicted_peak(name, fitting), "B", kind="formula"
        )
        provable = max_depth(name, case, here)
        if provable is None:
            rows.append([name, str(depth), mebibytes(predicted_peak(name, fitting)), "", ""])
            continue
        proof = dataclasses.replace(case, depth=provable)
        result = measured(args, proof, name, False, recorder)
        rows.append(
            [
                name,
                str(depth),
                mebibytes(predicted_peak(name, fitting)),
                str(provable),
                mebibytes(result.peak) if result.peak is not None else result.status,
            ]
        )
        if result.status != "measured":
            notes.append(f"{name}: {result.status}: {result.detail}")
    print(
        f"\nDeepest DenseNet-BC (k={case.growth_rate}, batch {case.batch_size}, "
        f"{case.size}, {case.dtype}) in {budget / 2**30:.1f} GiB; "
        f"run here: the deepest within {here / 2**30:.1f} GiB\n"
    )
    header = ["provider", "deepest", "predicted MiB", "depth run here", "measured MiB"]
    print(table(header, rows))
    print("\n".join(notes))


def max_depth(name: str, case: Case, budget: int) -> int | None:
    """The deepest DenseNet-BC predicted to train within ``budget`` bytes."""

    def fits(n: int) -> bool:
        return predicted_peak(name, dataclasses.replace(case, depth=6 * n + 4)) <= budget

    if not fits(1):
        return None
    return 6 * largest(fits, 1) + 4


def measured(
    args: argparse.Namespace, case: Case, name: str, live: bool, recorder: Recorder
) -> Memory:
    result = memory(
        name,
        case,
        steps=args.steps,
        threads=args.threads,
        live=live,
        force=args.force,
        memory_limit=args.memory_limit,
    )
    common = {"steps": args.steps, "status": result.status, "detail": result.detail}
    recorder.add(name, case, "peak", result.peak, "B", **common)
    values = {"baseline": result.baseline, "reserved": result.reserved, "process": result.process}
    values |= {f"live {role}": value for role, value in result.live.items()}
    for metric, value in values.items():
        if value is not None:
            recorder.add(name, case, metric, value, "B", **common)
    if result.predicted is not None:
        recorder.add(name, case, "predicted peak", result.predicted, "B", kind="formula")
    return result


def record_floor(recorder: Recorder, case: Case) -> counts.Floor:
    floor = counts.floor(case)
    for part, value in {**floor._asdict(), "total": floor.total}.items():
        recorder.add("floor", case, f"floor {part.replace('_', ' ')}", value, "B", kind="formula")
    return floor


def progress(work: Sequence[tuple[Case, str]]) -> Iterator[tuple[Case, str]]:
    """Over (case, provider), saying how long the rest will take.

    The estimate goes by each case's arithmetic; on no terminal, a line per measurement.
    """
    costs = [counts.training_flops(case) for case, _ in work]
    shape = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, about {remaining} left"
    start = time.perf_counter()
    with tqdm(total=sum(costs), bar_format=shape, file=sys.stderr, disable=None) as bar:
        for i, (case, name) in enumerate(work):
            description = f"{i + 1}/{len(work)} {name}"
            if bar.disable:
                done = sum(costs[:i])
                rest = (time.perf_counter() - start) * (sum(costs) - done) / max(1, done)
                left = f", about {rest / 60:.1f} minutes left" if i else ""
                print(description + left, file=sys.stderr)
            bar.set_description_str(description)
            yield case, name
            bar.update(costs[i])


if __name__ == "__main__":
    sys.exit(main())
