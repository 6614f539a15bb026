"""Peak memory of one training step: effdense, the naive net and every alternative.

    python benchmarks/memory.py --depth 250         # in two minutes what matters most
    python benchmarks/memory.py --depth 250 --all   # every alternative
    python benchmarks/memory.py --sweep depth --growth-rate 12 --batch-size 8
    python benchmarks/memory.py --max-depth-for 12GiB --growth-rate 12 --batch-size 64
    python benchmarks/memory.py --arch densenet121 --spatial-dims 3 --image-size 256
    python benchmarks/memory.py --arch densenet121 --batch-size 256 --device cuda --predict

Each figure comes from a process of its own. On a CPU "peak" is the largest resident size
over the process's size before the model was built, on a GPU what torch's allocator gave
out at most; "all tensors" is their sum where it is largest, split by what they are for. The
floor is parameters, gradients, momentum, all features and one gradient buffer: see
harness/counts.py. What would not fit is not run; its prediction is shown, labelled.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from harness import counts, providers, results
from harness.case import Case, CaseOptions, objection
from harness.measure import Memory, estimated, memory, predicted_peak
from harness.pictures import FLOOR_COLOUR, colour, describe, picture, plain_numbers
from harness.results import Kind, Recorder, Row, mebibytes
from tqdm import tqdm
from tyro.conf import arg

from effdense.commands import front_end
from effdense.errors import UserError
from effdense.machine.environment import headline
from effdense.machine.memory import available_bytes
from effdense.machine.sizes import parse_size
from effdense.machine.tables import Growing, table
from effdense.memory.planning import largest

QUICK = (
    "effdense-features",
    "effdense-bottlenecks",
    "naive",
    "checkpoint",
)
"""Of providers.DEFAULT, what says most in two minutes, the quickest first."""
VOLUMES = ("effdense-features", "effdense-slabs", *QUICK[1:])
"""Likewise in 3-D, where a layer's bottleneck is what is large."""

STATE = ("parameters", "gradients", "optimizer", "input")
SAVED = ("features", "bottlenecks")

SWEEPS = {
    "depth": (40, 64, 100, 160, 250),
    "batch-size": (4, 8, 16, 32, 64),
    "growth-rate": (8, 12, 16, 24, 32, 48),
}


@dataclass(frozen=True, kw_only=True)
class Options(CaseOptions):
    CIFAR_BATCH: ClassVar[int] = 32

    depth: int = 250
    """Layers of densenet_bc, 6 n + 4."""
    growth_rate: int = 24
    """Channels per layer of densenet_bc, the paper's k."""
    providers: Annotated[tuple[str, ...], providers.argument(QUICK)] = ()
    """What is compared."""
    all: bool = False
    """Compare save="input", the naive net's other layout and torchvision's networks too."""
    steps: int = 1
    """Of each measurement."""
    live: Annotated[
        Literal["yes", "no"] | None, arg(help_behavior_hint="(default: yes; in sweeps no)")
    ] = None
    """Also say what the tensors are for: by a step without data, on a GPU by another real one."""
    sweep: Annotated[
        Literal["depth", "batch-size", "growth-rate"] | None,
        arg(help_behavior_hint="(default: none)"),
    ] = None
    """Measure along one dimension."""
    points: Annotated[
        tuple[int, ...], arg(metavar="N", help_behavior_hint="(default: five or six of them)")
    ] = ()
    """The sweep's values."""
    max_depth_for: Annotated[
        str | None, arg(metavar="SIZE", help_behavior_hint="(default: not asked)")
    ] = None
    """The deepest DenseNet-BC that trains in so much memory, such as 12GiB."""
    force: bool = False
    """Attempt what is predicted not to fit."""
    memory_limit: Annotated[
        str | None, arg(metavar="SIZE", help_behavior_hint="(default: none)")
    ] = None
    """Let a measurement take no more than this, as on a smaller machine (Linux, CPU)."""
    predict: bool = False
    """Say what effdense.estimate says, of any device, and run nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sweep in ("depth", "growth-rate") or self.max_depth_for) and (
            not self.case.is_cifar
        ):
            raise UserError(
                "--sweep depth, --sweep growth-rate and --max-depth-for need a DenseNet-BC"
            )
        if self.all and self.providers:
            raise UserError("--all and --providers both say what is compared; choose one")
        if self.points and not self.sweep:
            raise UserError("--points belongs to --sweep")
        if self.sweep and self.max_depth_for:
            raise UserError("--sweep and --max-depth-for are two benchmarks; choose one")
        if self.predict and (self.sweep or self.max_depth_for or self.memory_limit):
            raise UserError(
                "--predict is of one case, and runs nothing; leave out --sweep, --max-depth-for "
                "and --memory-limit"
            )
        for name in self.names if self.predict else ():
            if providers.find(name)[0].compiled:
                raise UserError(f"what a compiler will keep can't be predicted, got {name}")
        for option, size in (
            ("--max-depth-for", self.max_depth_for),
            ("--memory-limit", self.memory_limit),
        ):
            try:
                parse_size(size or "1B")
            except ValueError as error:
                raise UserError(f"{option} {error}") from None

    @property
    def names(self) -> list[str]:
        quick: Sequence[str] = VOLUMES if self.spatial_dims == 3 else QUICK
        default = providers.DEFAULT if self.all else quick
        return providers.selected(self.providers, default, self.case)

    @property
    def runs_nothing(self) -> bool:
        return self.predict

    @property
    def cases(self) -> list[Case]:
        """The case, or the case at each value of the swept dimension."""
        if self.sweep is None:
            return [self.case]
        points = self.points or SWEEPS[self.sweep]
        cases = [dataclasses.replace(self.case, **{self.swept: n}) for n in points]  # type: ignore[arg-type]
        for each in cases:
            problem = objection(each)
            if problem:
                raise UserError(problem)
        return cases

    @property
    def swept(self) -> str:
        return (self.sweep or "").replace("-", "_")


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/memory.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> None:
    case, names, cases = options.case, options.names, options.cases
    path = options.output or Path("results") / f"{result_name(options, case)}.csv"
    here = "cpu" if options.predict else case.device
    torch.set_num_threads(options.threads)  # those of predictions too
    with Recorder(path, "memory", here, options.threads) as recorder:
        print(headline(recorder.environment))
        if options.predict:
            predict(case, names, recorder)
        elif options.max_depth_for:
            deepest(options, case, names, recorder)
        elif options.sweep:
            run_sweep(options, cases, names, recorder)
        else:
            run_case(options, case, names, recorder)
    print()
    if not options.max_depth_for and _drawable(results.read(path)):
        picture(draw, [path], path.with_suffix(".png"))
        print(path.with_suffix(".png"))
    print(path)


def result_name(options: Options, case: Case) -> str:
    name = f"memory-{case.label()}"
    if options.sweep:
        name += f"-sweep-{options.sweep}"
    if options.max_depth_for:
        name += f"-max-depth-{options.max_depth_for.replace(' ', '')}"
    return name + "-predicted" * options.predict


def predict(case: Case, names: Sequence[str], recorder: Recorder) -> None:
    """What effdense.estimate says of each provider."""
    floor = record_floor(recorder, case)
    header = ["", "needed", "times\nfloor", "all\ntensors", "when"]
    shown = Growing(header, ["floor (formula)", *names])
    print(f"\n{case.describe()}: PREDICTION of a training step's peak memory, MiB; nothing was run")
    total = mebibytes(floor.total)
    print(f"\n{shown.header()}\n{shown.row(['floor (formula)', total, '1.00', total, ''])}")
    for name in names:
        found = estimated(name, case)
        for metric, value in (("estimate", found.needed), ("estimated live", found.peak)):
            recorder.add(name, case, metric, value, "B", kind="formula", detail=found.moment)
        times = f"{found.needed / floor.total:.2f}"
        cells = [name, mebibytes(found.needed), times, mebibytes(found.peak), found.moment]
        print(shown.row(cells), flush=True)


def run_case(options: Options, case: Case, names: Sequence[str], recorder: Recorder) -> None:
    """Print each provider's row as soon as it is known."""
    live = options.live != "no"
    floor = record_floor(recorder, case)
    found = columns(case, live)
    shown = Growing(["", *found], ["floor (formula)", *names])
    print(f"\n{case.describe()}: peak memory of a training step, MiB")
    if live:
        print("training state: parameters, their gradients, momentum and the batch")
    print(f"\n{shown.header()}\n{shown.row(floor_row(floor, found))}", flush=True)
    for each, name in progress([(case, name) for name in names]):
        result = measured(options, each, name, live, recorder)
        tqdm.write(shown.row(*row(name, result, floor, found)), file=sys.stdout)
        sys.stdout.flush()


def columns(case: Case, live: bool) -> dict[str, Callable[[Memory], float | None]]:
    """Their titles, and the bytes they show; see NOTE [ the split at the peak ]."""
    shown: dict[str, Callable[[Memory], float | None]] = {"peak": lambda m: m.peak}
    shown["times\nfloor"] = lambda m: None
    on_gpu = case.device != "cpu"
    if on_gpu:
        shown |= {"reserved": lambda m: m.reserved, "process": lambda m: m.process}
    elif live:
        # torch's allocator on a GPU counts tensors too
        shown |= {"all\ntensors": lambda m: m.live.get("total")}
    if live:
        shown |= {
            "training\nstate": lambda m: _sum_of(m, STATE),
            "saved for\nbackward": lambda m: _sum_of(m, SAVED),
            "gradient\nbuffer": lambda m: m.live.get("gradient buffer"),
        }
    if live and not on_gpu:
        shown |= {"temporary\ntensors": lambda m: m.live.get("temporaries")}
    return shown


def _sum_of(found: Memory, roles: Sequence[str]) -> float | None:
    return sum(found.live[role] for role in roles) if found.live else None


def floor_row(floor: counts.Floor, shown: Collection[str]) -> list[str]:
    known = {
        "peak": floor.total,
        "all\ntensors": floor.total,
        "training\nstate": floor.state,
        "saved for\nbackward": floor.features,
        "gradient\nbuffer": floor.gradient_buffer,
        "temporary\ntensors": 0,
    }
    cells = [mebibytes(known.get(title)) for title in shown]
    return ["floor (formula)", cells[0], "1.00", *cells[2:]]


def row(
    name: str,
    result: Memory,
    floor: counts.Floor,
    shown: Mapping[str, Callable[[Memory], float | None]],
) -> tuple[list[str], str]:
    """A provider's cells, and what there is to say instead of those that are missing."""
    found = result.peak if result.peak is not None else result.predicted
    if found is None:
        return [name], f"{result.status}: {result.detail}"
    times = f"{found / floor.total:.2f}"
    if result.peak is None:
        return [name, mebibytes(found), times], f"predicted: {result.detail}"
    cells = [mebibytes(value(result)) for value in shown.values()]
    return [name, cells[0], times, *cells[2:]], result.detail


def run_sweep(
    options: Options, cases: Sequence[Case], names: Sequence[str], recorder: Recorder
) -> None:
    field = options.swept
    floors = {case: record_floor(recorder, case) for case in cases}
    peaks: dict[str, dict[Case, Memory]] = {name: {} for name in names}
    # Smallest first: an interrupted sweep has whole points.
    for case, name in progress([(case, name) for case in cases for name in names]):
        peaks[name][case] = measured(options, case, name, options.live == "yes", recorder)

    print(f"\n{cases[0].describe()}, along {options.sweep}: peak MiB")
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
            f"{name} at {options.sweep} {getattr(case, field)}: {m.status}: {m.detail}"
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
                name, cases[0], f"growth exponent along {options.sweep}", float(exponent), "1"
            )
    print(table(["provider", *(str(getattr(c, field)) for c in cases), "growth"], rows))
    print("\n".join(notes))


def growth(sizes: Sequence[float], values: Sequence[float]) -> str:
    try:
        return f"{counts.growth_exponent(list(sizes), list(values)):.2f}"
    except ValueError:
        return ""


def deepest(options: Options, case: Case, names: Sequence[str], recorder: Recorder) -> None:
    """The deepest net of each provider within a budget, by prediction; then the proof here.

    Where the budget is larger than what this machine can give, the proof is the deepest net
    that fits here, whose measured peak is to agree with its prediction.
    """
    budget = parse_size(options.max_depth_for or "")
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
        result = measured(options, proof, name, False, recorder)
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


def measured(options: Options, case: Case, name: str, live: bool, recorder: Recorder) -> Memory:
    result = memory(
        name,
        case,
        steps=options.steps,
        threads=options.threads,
        live=live,
        force=options.force,
        memory_limit=parse_size(options.memory_limit) if options.memory_limit else None,
    )
    common: dict[str, Any] = {
        "steps": options.steps,
        "status": result.status,
        "detail": result.detail,
    }
    recorder.add(name, case, "peak", result.peak, "B", **common)
    values = {"baseline": result.baseline, "reserved": result.reserved, "process": result.process}
    for metric, value in values.items():
        if value is not None:
            recorder.add(name, case, metric, value, "B", **common)
    kind: Kind = "formula" if case.device == "cpu" else "measured"
    for role, value in result.live.items():
        recorder.add(name, case, f"live {role}", value, "B", kind=kind)
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


def _drawable(rows: list[Row]) -> bool:
    return any(row["metric"] == "peak" and row["value"] for row in rows)


def draw(figure: Any, rows: list[Row]) -> None:
    """Peaks of one case as bars, or along what varies."""
    axes = figure.subplots()
    dimension = _swept(rows)
    if dimension is None:
        _memory_bars(axes, rows)
    else:
        _memory_growth(axes, rows, dimension)


def _swept(rows: list[Row]) -> str | None:
    for dimension in ("depth", "batch_size", "growth_rate"):
        if len({row[dimension] for row in rows}) > 1:
            return dimension
    return None


def _memory_bars(axes: Any, rows: list[Row]) -> None:
    peaks = {
        row["provider"]: float(row["value"]) / 2**20
        for row in rows
        if row["metric"] == "peak" and row["value"]
    }
    if not peaks:
        raise ValueError("no measured peak to draw")
    names = list(peaks)[::-1]
    bars = axes.barh(names, [peaks[name] for name in names], color=[colour(n) for n in names])
    axes.bar_label(bars, labels=[f"{peaks[name]:,.0f}" for name in names], padding=3)
    floors = [float(row["value"]) for row in rows if row["metric"] == "floor total"]
    if floors:
        axes.axvline(floors[0] / 2**20, color=FLOOR_COLOUR, linestyle="--", label="floor (formula)")
        axes.legend(loc="lower right")
    axes.set_xlabel("peak memory of a training step, MiB")
    axes.set_title(describe(rows[0]))
    axes.margins(x=0.12)


def _memory_growth(axes: Any, rows: list[Row], dimension: str) -> None:
    for provider in dict.fromkeys(row["provider"] for row in rows):
        metric = "floor total" if provider == "floor" else "peak"
        points = sorted(
            (int(row[dimension]), float(row["value"]) / 2**20)
            for row in rows
            if row["provider"] == provider and row["metric"] == metric and row["value"]
        )
        if not points:
            continue
        style: dict[str, Any] = {"marker": "o", "color": colour(provider)}
        if provider == "floor":
            style = {"linestyle": "--", "color": FLOOR_COLOUR}
        label = "floor (formula)" if provider == "floor" else provider
        axes.loglog(*zip(*points, strict=True), label=label, **style)
        axes.annotate(
            f"{points[-1][1]:,.0f}",
            points[-1],
            xytext=(7, -3),
            textcoords="offset points",
            fontsize=8,
            color=style["color"],
        )
    ticks = sorted({int(row[dimension]) for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    plain_numbers(axes.yaxis)
    axes.margins(x=0.07)
    axes.set_xlabel(dimension.replace("_", " "))
    axes.set_ylabel("peak memory of a training step, MiB")
    axes.set_title(describe(rows[0], but=dimension))
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
